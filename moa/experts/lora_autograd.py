"""The LoRA product of a linear layer in training, with a backward of its own.

Autograd keeps and casts every intermediate of index, scale, product and sum, and makes a gradient as large as the
whole stack for each forward. `LoraProduct` adds to the layer's output in place, keeps only the hidden values of rank R
beside inputs that are kept anyway, computes one gradient of the input, and adds each row's gradient to its own expert's
slice. Where `moa.base.kernels.build` has the library, C does the same (`csrc/lora.c`) without a copy of any slice.

Shapes: E experts, R largest rank, I and O a layer's inputs and outputs, B rows, T positions.
"""

import ctypes
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moa.base.kernels.build import library_for

LANES = 16   # numbers of the widest vector: sizes must be a multiple


def add_lora(y_BTO: Tensor, x_BTI: Tensor, weight_OI: Tensor | None, a_ERI: Tensor, b_EOR: Tensor, scale_E: Tensor,
             rows: Tensor, inactive: Tensor | None) -> Tensor:
    """`LoraProduct`, in C where these tensors and this machine allow it."""
    fits = (x_BTI.device.type == "cpu" and rows.dtype == torch.int64 and a_ERI.dtype == scale_E.dtype == torch.float32
            and x_BTI.dtype == y_BTO.dtype and x_BTI.shape[-1] % LANES == y_BTO.shape[-1] % LANES == 0)
    lora = library_for("lora", x_BTI.dtype) if fits else None
    if lora is None:
        return LoraProduct.apply(y_BTO, x_BTI, weight_OI, a_ERI, b_EOR, scale_E, rows, inactive)
    return CompiledProduct.apply(lora, y_BTO, x_BTI, weight_OI, a_ERI, b_EOR, scale_E, rows, inactive)


class LoraProduct(torch.autograd.Function):
    """y + scale * B(Ax), in place, each row by its own expert; the base's rows, `inactive` (B, 1, 1), stay as they are.

    With the frozen weight that made y out of x, the input's gradient is that of both products, and y's history is not
    looked at; without (None), y gets its gradient as any tensor does. The gradients of A and B are not returned but
    added to `.grad` of the parameters, as `backward` does with a leaf.
    """

    @staticmethod
    def forward(ctx: Any, y_BTO: Tensor, x_BTI: Tensor, weight_OI: Tensor | None, a_ERI: Tensor, b_EOR: Tensor,
                scale_E: Tensor, rows: Tensor, inactive: Tensor | None) -> Tensor:
        a_BRI, b_BRO = slices(a_ERI, b_EOR, None, rows, inactive, x_BTI.dtype)
        scale_B11 = scale_E.index_select(0, rows).view(-1, 1, 1).to(x_BTI.dtype)
        hidden_BTR = torch.bmm(x_BTI, a_BRI.transpose(1, 2)).mul_(scale_B11)   # the smallest place to scale
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
        if ctx.needs_input_grad[1]:   # the lowest layer's input has none
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
        grad_BTO, wants_x = grad_BTO.contiguous(), ctx.needs_input_grad[2]   # the lowest layer's input has none
        grad_BTI = None
        if wants_x:
            grad_BTI = torch.zeros_like(x_BTI) if weight_OI is None else grad_BTO @ weight_OI
        a_ERI, b_EOR = ctx.parameters
        call = _Call.of(x_BTI, grad_BTO, hidden_BTR, a_ERI, b_EOR, scale_E, rows, inactive)
        for name, parameter, wanted in zip("ab", (a_ERI, b_EOR), ctx.needs_input_grad[4:6], strict=True):
            if not wanted:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            setattr(call, f"to_{name}", parameter.grad.data_ptr())
            setattr(call, f"to_{name}_step", parameter.grad.stride(0))
        back_BTR = torch.empty_like(hidden_BTR)
        ctx.lora.lora_backward(ctypes.byref(call), *(ctypes.c_void_p(None if each is None else each.data_ptr())
                                                     for each in (grad_BTO, grad_BTI, back_BTR)))
        return None, grad_BTO if ctx.needs_input_grad[1] else None, grad_BTI, *[None] * 6


class _Call(ctypes.Structure):
    """`struct lora`."""

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
        call.held = flipped_BRO   # as long as the call
        return call


def slices(a_ERI: Tensor, b_EOR: Tensor, scale_E: Tensor | None, rows: Tensor, inactive: Tensor | None,
           dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (B, R, I) and B (B, R, O), scaled if `scale_E` is given, of each row's expert, without a loop over
    experts. No row reads another expert's numbers. Rows without an expert get zeros."""
    # index_select, not [rows]: the gradient of the latter adds up in whatever order the threads arrive.
    a_BRI, b_BOR = a_ERI.index_select(0, rows).to(dtype), b_EOR.index_select(0, rows)
    if scale_E is not None:
        b_BOR = b_BOR * scale_E.index_select(0, rows).view(-1, 1, 1)
    b_BRO = _contiguous(b_BOR.transpose(1, 2), dtype)   # a product with R columns that lie apart takes twice the time
    if inactive is not None:   # filled, not multiplied: expert 0 stands in, and may be no number
        a_BRI, b_BRO = a_BRI.masked_fill(inactive, 0.0), b_BRO.masked_fill(inactive, 0.0)
    return a_BRI, b_BRO


def _add(parameter: Tensor, rows: Tensor, inactive: Tensor | None, grads: Tensor) -> None:
    """Add each row's gradient to its expert's."""
    grads = _contiguous(grads, parameter.dtype)
    if inactive is not None:
        grads = grads.masked_fill(inactive, 0.0)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.index_add_(0, rows, grads)


def _contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this dtype and contiguous, with one copy at most."""
    return tensor.to(dtype, memory_format=torch.contiguous_format).contiguous()   # to() alone leaves its own dtype be
