"""The LoRA product of a linear layer in training, as autograd functions with a backward of their own.

PyTorch's autograd would save every intermediate of the indexing, scaling, products and sum, and allocate a gradient of
the size of the whole stack in each backward. `LoraProduct` adds to the layer's output in place, saves only the hidden
values of rank R besides inputs that are saved anyway, computes one gradient of the input, and adds the gradients of A
and B to the slices of the rows' experts. `CompiledProduct` does the same in C (`csrc/lora.c`) without copying slices,
where `moa.base.kernels.build` provides the library.

Shapes: E experts, R largest rank, I and O a layer's inputs and outputs, B rows, T positions.
"""

import ctypes
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moa.base.kernels.build import library_for

LANES = 16   # numbers of the widest vector: the C code needs I and O to be multiples of it


def add_lora(y_BTO: Tensor, x_BTI: Tensor, weight_OI: Tensor | None, a_ERI: Tensor, b_EOR: Tensor, scale_E: Tensor,
             rows: Tensor, inactive: Tensor | None) -> Tensor:
    """Add each row's expert to a linear layer's output: y + scale * B(Ax), in place, (B, T, O).

    Uses C where the tensors and the machine allow it. `LoraProduct` describes the arguments and the gradients.
    """
    supported = (x_BTI.device.type == "cpu" and rows.dtype == torch.int64
                 and a_ERI.dtype == scale_E.dtype == torch.float32 and x_BTI.dtype == y_BTO.dtype
                 and x_BTI.shape[-1] % LANES == y_BTO.shape[-1] % LANES == 0)
    lora = library_for("lora", x_BTI.dtype) if supported else None
    if lora is None:
        return LoraProduct.apply(y_BTO, x_BTI, weight_OI, a_ERI, b_EOR, scale_E, rows, inactive)
    return CompiledProduct.apply(lora, y_BTO, x_BTI, weight_OI, a_ERI, b_EOR, scale_E, rows, inactive)


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
