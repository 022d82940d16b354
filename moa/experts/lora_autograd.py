"""The LoRA product of a linear layer in training, as autograd functions with a backward of their own.

PyTorch's autograd would save every intermediate of the indexing, scaling, products and sum, and allocate a gradient of
the size of the whole stack in each backward. `LoraProduct` adds to the layer's output in place, saves only the hidden
values of rank R besides inputs that are saved anyway, computes one gradient of the input, and adds the gradients of A
and B to the slices of the rows' experts. `CompiledProduct` does the same in C (`csrc/lora.c`) without copying slices,
where `moa.base.kernels.build` provides the library. `GroupedProduct` does the same on a GPU, for all rows of an expert
at once.

Shapes: E experts, G experts of a batch, R largest rank, I and O a layer's inputs and outputs, B rows, T positions,
N = B * T.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moa.base.kernels.build import library_for

LANES = 16   # numbers of the widest vector: the C code needs I and O to be multiples of it
GROUPED_ON = ("cuda",)   # kinds of device on which `GroupedProduct` is faster
GROUPED_BYTES = 16       # grouped products need rows of matrices of a multiple of so many bytes


@dataclass(frozen=True, slots=True)
class RowGroups:
    """The rows of a batch, where the rows of each expert are neighbours: G experts, in the order of their rows.

    Rows without an expert come before all others: `first` is the first row with one, and the groups begin there.
    """

    first: int
    experts_G: Tensor      # (G,) on the device
    ends_G: Tensor         # (G,) int32 on the device: row behind the last one of each expert, counted from `first`
    offsets: dict[int, Tensor] = field(default_factory=dict)   # `ends_G` in positions, by T

    @classmethod
    def of(cls, rows: Sequence[int], device: torch.device | str) -> Self | None:
        """The groups of rows, of which row b has expert `rows[b]` or, if that is negative, none.

        None where the rows of an expert are apart, where a row without an expert comes later, or where no row has one.
        """
        groups = [(expert, len(list(same))) for expert, same in groupby(rows, lambda row: max(row, -1))]
        first = groups.pop(0)[1] if groups and groups[0][0] < 0 else 0
        experts = [expert for expert, _ in groups]
        if not experts or min(experts) < 0 or len(set(experts)) < len(experts):
            return None
        ends = list(accumulate(count for _, count in groups))
        return cls(first, torch.tensor(experts).to(device, non_blocking=True),
                   torch.tensor(ends, dtype=torch.int32).to(device, non_blocking=True))

    def active(self, tensor_BTD: Tensor) -> Tensor:
        """The positions of all rows with an expert, (N, D)."""
        return tensor_BTD[self.first:].flatten(0, 1)

    def offsets_G(self, length: int) -> Tensor:
        """The end of each expert's rows in positions, for rows of `length` positions: (G,) int32."""
        if length not in self.offsets:
            self.offsets[length] = self.ends_G * length
        return self.offsets[length]


def add_lora(y_BTO: Tensor, x_BTI: Tensor, weight_OI: Tensor | None, a_ERI: Tensor, b_EOR: Tensor, scale_E: Tensor,
             rows: Tensor, inactive: Tensor | None, groups: RowGroups | None = None) -> Tensor:
    """Add each row's expert to a linear layer's output: y + scale * B(Ax), in place, (B, T, O).

    Uses C or grouped products where the tensors and the machine allow it. `LoraProduct` describes the arguments and the
    gradients; `groups` are those of `rows`, or None.
    """
    if groups is not None and supports_groups(x_BTI, y_BTO, a_ERI):
        return GroupedProduct.apply(y_BTO, x_BTI, weight_OI, a_ERI, b_EOR, scale_E, groups)
    supported = (x_BTI.device.type == "cpu" and rows.dtype == torch.int64
                 and a_ERI.dtype == scale_E.dtype == torch.float32 and x_BTI.dtype == y_BTO.dtype
                 and x_BTI.shape[-1] % LANES == y_BTO.shape[-1] % LANES == 0)
    lora = library_for("lora", x_BTI.dtype) if supported else None
    if lora is None:
        return LoraProduct.apply(y_BTO, x_BTI, weight_OI, a_ERI, b_EOR, scale_E, rows, inactive)
    return CompiledProduct.apply(lora, y_BTO, x_BTI, weight_OI, a_ERI, b_EOR, scale_E, rows, inactive)


def supports_groups(x_BTI: Tensor, y_BTO: Tensor, a_ERI: Tensor) -> bool:
    """Whether the products of groups compute these tensors."""
    return (y_BTO.is_contiguous() and x_BTI.dtype == y_BTO.dtype
            and groups_fit(x_BTI.device, x_BTI.dtype, x_BTI.shape[-1], y_BTO.shape[-1], a_ERI.shape[1]))


def groups_fit(device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
    """Whether products of groups are used on this device: by PyTorch's version, the dtype and the sizes of rows."""
    return (device.type in GROUPED_ON and hasattr(nn.functional, "grouped_mm") and dtype != torch.float64
            and all(size * dtype.itemsize % GROUPED_BYTES == 0 for size in sizes))


def of_groups(a_ERI: Tensor, b_EOR: Tensor, scale_E: Tensor, groups: RowGroups,
               dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (G, R, I) and scaled B (G, O, R) of the groups' experts."""
    experts_G = groups.experts_G
    scale_G11 = scale_E.index_select(0, experts_G).view(-1, 1, 1)
    return a_ERI.index_select(0, experts_G).to(dtype), (b_EOR.index_select(0, experts_G) * scale_G11).to(dtype)


def grouped_product(x_BTI: Tensor, a_GRI: Tensor, b_GOR: Tensor, groups: RowGroups) -> Tensor:
    """B(Ax) of the rows that have an expert, by A and B from `of_groups`: (N, O). Not differentiable."""
    offsets_G = groups.offsets_G(x_BTI.shape[1])
    hidden_NR = grouped(groups.active(x_BTI), a_GRI.transpose(1, 2), offsets_G)
    return grouped(hidden_NR, b_GOR.transpose(1, 2), offsets_G)


class LoraProduct(torch.autograd.Function):
    """y + scale * B(Ax), in place, where each row has its own expert.

    The gradients of A and B are added to `.grad` of `a_ERI` and `b_EOR`, as autograd does for leaf tensors, and not
    returned.

    Args:
        y_BTO: the linear layer's output, which is overwritten.
        x_BTI: the layer's input.
        weight_OI: the layer's frozen weight, if y was computed from a detached x: the gradient of x is then that of
            both products. None if autograd propagates y's gradient through the layer.
        a_ERI: the experts' matrices A.
        b_EOR: the experts' matrices B.
        scale_E: the experts' scales.
        rows: the expert of each row, (B,).
        inactive: True at rows without an expert, whose y does not change, (B, 1, 1); None if there are none.
    """

    @staticmethod
    def forward(ctx: Any, y_BTO: Tensor, x_BTI: Tensor, weight_OI: Tensor | None, a_ERI: Tensor, b_EOR: Tensor,
                scale_E: Tensor, rows: Tensor, inactive: Tensor | None) -> Tensor:
        a_BRI, b_BRO = slices(a_ERI, b_EOR, None, rows, inactive, x_BTI.dtype)
        scale_B11 = scale_E.index_select(0, rows).view(-1, 1, 1).to(x_BTI.dtype)
        hidden_BTR = torch.bmm(x_BTI, a_BRI.transpose(1, 2)).mul_(scale_B11)   # the smallest tensor to scale
        y_BTO.baddbmm_(hidden_BTR, b_BRO)
        ctx.mark_dirty(y_BTO)
        ctx.save_for_backward(x_BTI, weight_OI, hidden_BTR, a_BRI, b_BRO, scale_B11, rows, inactive)
        ctx.parameters = a_ERI, b_EOR
        return y_BTO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTO: Tensor) -> tuple[Tensor | None, ...]:
        x_BTI, weight_OI, hidden_BTR, a_BRI, b_BRO, scale_B11, rows, inactive = ctx.saved_tensors
        a_ERI, b_EOR = ctx.parameters
        grad_BTR = torch.bmm(grad_BTO, b_BRO.transpose(1, 2)).mul_(scale_B11)
        if ctx.needs_input_grad[3]:
            _add(a_ERI, rows, inactive, torch.bmm(grad_BTR.transpose(1, 2), x_BTI))
        if ctx.needs_input_grad[4]:
            grad_BRO = torch.bmm(hidden_BTR.transpose(1, 2), grad_BTO)
            _add(b_EOR, rows, inactive, grad_BRO.transpose(1, 2))
        grad_BTI = None
        if ctx.needs_input_grad[1]:   # the input of the lowest layer needs no gradient
            grad_BTI = (torch.bmm(grad_BTR, a_BRI) if weight_OI is None
                        else (grad_BTO @ weight_OI).baddbmm_(grad_BTR, a_BRI))
        return grad_BTO if ctx.needs_input_grad[0] else None, grad_BTI, None, None, None, None, None, None


class CompiledProduct(torch.autograd.Function):
    """`LoraProduct` in C, for inputs in bfloat16 or float32 and experts in float32."""

    @staticmethod
    def forward(ctx: Any, lora: ctypes.CDLL, y_BTO: Tensor, x_BTI: Tensor, weight_OI: Tensor | None, a_ERI: Tensor,
                b_EOR: Tensor, scale_E: Tensor, rows: Tensor, inactive: Tensor | None) -> Tensor:
        y_BTO, x_BTI = y_BTO.contiguous(), x_BTI.contiguous()
        hidden_BTR = scale_E.new_empty(*x_BTI.shape[:2], a_ERI.shape[1])
        call = _Call.of(x_BTI, y_BTO, hidden_BTR, a_ERI, b_EOR, scale_E, rows, inactive)
        lora.lora_forward(ctypes.byref(call), ctypes.c_void_p(y_BTO.data_ptr()))
        ctx.mark_dirty(y_BTO)
        ctx.save_for_backward(x_BTI, weight_OI, hidden_BTR, scale_E, rows, inactive)
        ctx.parameters, ctx.lora = (a_ERI, b_EOR), lora
        return y_BTO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTO: Tensor) -> tuple[Tensor | None, ...]:
        x_BTI, weight_OI, hidden_BTR, scale_E, rows, inactive = ctx.saved_tensors
        grad_BTO = grad_BTO.contiguous()
        grad_BTI = None
        if ctx.needs_input_grad[2]:   # the input of the lowest layer needs no gradient
            grad_BTI = torch.zeros_like(x_BTI) if weight_OI is None else grad_BTO @ weight_OI
        a_ERI, b_EOR = ctx.parameters
        call = _Call.of(x_BTI, grad_BTO, hidden_BTR, a_ERI, b_EOR, scale_E, rows, inactive)
        for name, parameter, needs_grad in zip("ab", (a_ERI, b_EOR), ctx.needs_input_grad[4:6], strict=True):
            if not needs_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            setattr(call, f"to_{name}", parameter.grad.data_ptr())
            setattr(call, f"to_{name}_step", parameter.grad.stride(0))
        scratch_BTR = torch.empty_like(hidden_BTR)
        ctx.lora.lora_backward(ctypes.byref(call), *(ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
                                                     for tensor in (grad_BTO, grad_BTI, scratch_BTR)))
        return None, grad_BTO if ctx.needs_input_grad[1] else None, grad_BTI, *[None] * 6


class GroupedProduct(torch.autograd.Function):
    """`LoraProduct` for a batch in which the rows of an expert are neighbours: one product for each expert's rows.

    No slice of A or B is copied for a row or saved for the backward, so memory grows with the experts and not with the
    rows. Arguments and gradients are those of `LoraProduct`, with `groups` in place of `rows` and `inactive`.
    """

    @staticmethod
    def forward(ctx: Any, y_BTO: Tensor, x_BTI: Tensor, weight_OI: Tensor | None, a_ERI: Tensor, b_EOR: Tensor,
                scale_E: Tensor, groups: RowGroups) -> Tensor:
        offsets_G = groups.offsets_G(x_BTI.shape[1])
        a_GRI, b_GOR = of_groups(a_ERI, b_EOR, scale_E, groups, x_BTI.dtype)
        hidden_NR = grouped(groups.active(x_BTI), a_GRI.transpose(1, 2), offsets_G)
        groups.active(y_BTO).add_(grouped(hidden_NR, b_GOR.transpose(1, 2), offsets_G))
        ctx.mark_dirty(y_BTO)
        ctx.save_for_backward(x_BTI, weight_OI, hidden_NR, scale_E)
        ctx.parameters, ctx.groups = (a_ERI, b_EOR), groups
        return y_BTO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTO: Tensor) -> tuple[Tensor | None, ...]:
        x_BTI, weight_OI, hidden_NR, scale_E = ctx.saved_tensors
        (a_ERI, b_EOR), groups = ctx.parameters, ctx.groups
        offsets_G = groups.offsets_G(x_BTI.shape[1])
        a_GRI, b_GOR = of_groups(a_ERI, b_EOR, scale_E, groups, x_BTI.dtype)   # again: cheaper than to keep them
        x_NI, grad_NO = groups.active(x_BTI), groups.active(grad_BTO).contiguous()
        grad_NR = grouped(grad_NO, b_GOR, offsets_G)
        if ctx.needs_input_grad[3]:
            _add_grouped(a_ERI, groups, grouped(grad_NR.t(), x_NI, offsets_G))
        if ctx.needs_input_grad[4]:
            grad_GOR = grouped(grad_NO.t(), hidden_NR, offsets_G)
            scale_G11 = scale_E.index_select(0, groups.experts_G).view(-1, 1, 1)
            _add_grouped(b_EOR, groups, grad_GOR.to(b_EOR.dtype) * scale_G11)
        grad_BTI = None
        if ctx.needs_input_grad[1]:   # the input of the lowest layer needs no gradient
            grad_BTI = x_BTI.new_zeros(x_BTI.shape) if weight_OI is None else grad_BTO @ weight_OI
            groups.active(grad_BTI).add_(grouped(grad_NR, a_GRI, offsets_G))
        return grad_BTO if ctx.needs_input_grad[0] else None, grad_BTI, None, None, None, None, None


def grouped(left: Tensor, right: Tensor, offsets_G: Tensor) -> Tensor:
    """Products of the groups of `left`, whose ends are `offsets_G`.

    (N, K) and (G, K, M) to (N, M), a group of rows with its own matrix; or (K, N) and (N, M) to (G, K, M), the sum over
    each group. One group is one ordinary product.
    """
    if len(offsets_G) > 1:
        return nn.functional.grouped_mm(left, right, offs=offsets_G)
    return left @ right[0] if right.dim() == 3 else (left @ right).unsqueeze(0)


def _add_grouped(parameter: Tensor, groups: RowGroups, grad_G: Tensor) -> None:
    """Add each group's gradient to the slice of its expert in `parameter.grad`."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.index_add_(0, groups.experts_G, grad_G.to(parameter.dtype))


class _Call(ctypes.Structure):
    """`struct lora` of `csrc/lora.c`."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("a", "b", "scale", "rows", "inactive", "x", "hidden", "flipped",
                                                       "to_a", "to_b")),
                *((name, ctypes.c_int64) for name in ("a_step", "b_step", "to_a_step", "to_b_step")),
                *((name, ctypes.c_int32) for name in ("batch", "length", "inputs", "outputs", "ranks", "threads"))]

    @classmethod
    def of(cls, x_BTI: Tensor, y_BTO: Tensor, hidden_BTR: Tensor, a_ERI: Tensor, b_EOR: Tensor, scale_E: Tensor,
           rows: Tensor, inactive: Tensor | None) -> Self:
        (batch, length, inputs), outputs, ranks = x_BTI.shape, y_BTO.shape[-1], a_ERI.shape[1]
        flipped_BRO = hidden_BTR.new_empty(batch, ranks, outputs)
        call = cls(a_step=a_ERI.stride(0), b_step=b_EOR.stride(0), batch=batch, length=length, inputs=inputs,
                   outputs=outputs, ranks=ranks, threads=torch.get_num_threads(),
                   **{name: tensor.data_ptr() for name, tensor in (
                       ("a", a_ERI), ("b", b_EOR), ("scale", scale_E), ("rows", rows), ("x", x_BTI),
                       ("hidden", hidden_BTR), ("flipped", flipped_BRO))})
        if inactive is not None:
            call.inactive = inactive.data_ptr()
        call.scratch = flipped_BRO   # the structure points to this tensor, which must live as long
        return call


def slices(a_ERI: Tensor, b_EOR: Tensor, scale_E: Tensor | None, rows: Tensor, inactive: Tensor | None,
           dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (B, R, I) and B (B, R, O) of each row's expert; `scale_E`, if given, is multiplied into B.

    Rows without an expert get zeros. There is no loop over experts, and no row's result depends on another expert.
    """
    # index_select, not [rows]: threads add up the gradient of indexing in no fixed order.
    a_BRI, b_BOR = a_ERI.index_select(0, rows).to(dtype), b_EOR.index_select(0, rows)
    if scale_E is not None:
        b_BOR = b_BOR * scale_E.index_select(0, rows).view(-1, 1, 1)
    b_BRO = _contiguous(b_BOR.transpose(1, 2), dtype)   # a product with a strided B takes twice the time
    if inactive is not None:   # filled, not multiplied by zero: `rows` has expert 0 there, whose weights may be NaN
        a_BRI, b_BRO = a_BRI.masked_fill(inactive, 0.0), b_BRO.masked_fill(inactive, 0.0)
    return a_BRI, b_BRO


def _add(parameter: Tensor, rows: Tensor, inactive: Tensor | None, grads: Tensor) -> None:
    """Add each row's gradient to the slice of its expert in `parameter.grad`."""
    grads = _contiguous(grads, parameter.dtype)
    if inactive is not None:
        grads = grads.masked_fill(inactive, 0.0)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.index_add_(0, rows, grads)


def _contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this dtype and contiguous, with one copy at most."""
    # to() alone ignores the memory format of a tensor that has the dtype already.
    return tensor.to(dtype, memory_format=torch.contiguous_format).contiguous()
