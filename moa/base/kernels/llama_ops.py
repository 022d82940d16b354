"""Fused norms, attention over short rows and gates of llama-like models in training, forward and backward.

transformers computes each of them in five to ten operations, which take a quarter of a training step's time, and memory
for their saved tensors. Here each pass is one function in C (`csrc/pieces.c`). `fused` puts them into a model's
modules; where `moa.base.kernels.build` has no library, the modules stay as they are.

Shapes: B rows, T positions, H hidden size, N query heads, K key heads, G = N / K, D size of a head, M = B * K.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moa.base.kernels import build
from moa.base.kernels.attention import LONGEST

LANES = 16   # numbers in the widest vector; sizes must be multiples of it


@contextmanager
def fused(model: Any) -> Iterator[None]:
    """Within the block, the model's norms, MLPs and attentions that `_replacement` supports use the C functions."""
    pieces = build.library_for("pieces", model.dtype) if model.device.type == "cpu" else None
    changed = [] if pieces is None else [(module, partial(forward, pieces, module)) for module in model.modules()
                                         if (forward := _replacement(module)) is not None]
    for module, forward in changed:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in changed:
            del module.forward


def _replacement(module: Any) -> Callable[..., Any] | None:
    """The forward that replaces the module's own; None for a module whose kind or sizes are not supported."""
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

    kind = type(module)
    if kind in (llama.LlamaRMSNorm, qwen2.Qwen2RMSNorm):
        return _norm if len(module.weight) % LANES == 0 else None
    if kind in (llama.LlamaMLP, qwen2.Qwen2MLP):
        return _mlp if module.config.hidden_act == "silu" else None
    if kind in (llama.LlamaAttention, qwen2.Qwen2Attention):
        full = getattr(module, "sliding_window", None) is None and module.config._attn_implementation != "eager"
        return _attention if full and module.head_dim % (2 * LANES) == 0 else None
    return None


# The modules' forwards.

def _norm(pieces: ctypes.CDLL, module: Any, x_BTH: Tensor) -> Tensor:
    if x_BTH.dtype != module.weight.dtype:
        return type(module).forward(module, x_BTH)
    return Norm.apply(pieces, x_BTH.contiguous(), module.weight, module.variance_epsilon)


def _mlp(pieces: ctypes.CDLL, module: Any, x_BTH: Tensor) -> Tensor:
    gate, up = module.gate_proj(x_BTH), module.up_proj(x_BTH)
    if gate.numel() % LANES:
        return module.down_proj(module.act_fn(gate) * up)
    return module.down_proj(Gate.apply(pieces, gate.contiguous(), up.contiguous()))


def _attention(pieces: ctypes.CDLL, module: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor],
               attention_mask: Tensor | None = None, **more: Any) -> tuple[Tensor, None]:
    rows, length, _ = hidden_states.shape
    dropout = module.training and module.attention_dropout
    cached = more.get("cache", more.get("past_key_values")) is not None   # the second name until transformers 5.23
    if attention_mask is not None or cached or dropout or not 1 < length <= LONGEST:
        return type(module).forward(module, hidden_states, position_embeddings=position_embeddings,
                                    attention_mask=attention_mask, **more)
    cos, sin = (each.contiguous() for each in position_embeddings)
    mixed = Attention.apply(pieces, *(projection(hidden_states).view(rows, length, -1, module.head_dim)
                                      for projection in (module.q_proj, module.k_proj, module.v_proj)),
                            cos, sin, module.scaling)
    return module.o_proj(mixed), None


# The functions. Tensors are contiguous.

class Norm(torch.autograd.Function):
    """The root-mean-square norm: (..., H), (H) -> (..., H). The weight is frozen."""

    @staticmethod
    def forward(ctx: Any, pieces: ctypes.CDLL, x: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        y, size = torch.empty_like(x), x.shape[-1]
        rows = x.numel() // size
        factor = torch.empty(rows)
        pieces.norm_forward(*_pointers(y, factor, x, weight_H), _long(rows), size, ctypes.c_float(epsilon), _threads())
        ctx.pieces = pieces
        ctx.save_for_backward(x, factor, weight_H)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factor, weight_H = ctx.saved_tensors
        grad, x_grad = grad.contiguous(), torch.empty_like(x)
        ctx.pieces.norm_backward(*_pointers(x_grad, grad, x, factor, weight_H), _long(len(factor)), x.shape[-1],
                                 _threads())
        return None, x_grad, None, None


class Gate(torch.autograd.Function):
    """The gate of a llama-like MLP, silu(gate) * up: two tensors of one shape -> the same shape."""

    @staticmethod
    def forward(ctx: Any, pieces: ctypes.CDLL, gate: Tensor, up: Tensor) -> Tensor:
        y = torch.empty_like(gate)
        pieces.gate_forward(*_pointers(y, gate, up), _long(gate.numel()), _threads())
        ctx.pieces = pieces
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad, to_gate, to_up = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        ctx.pieces.gate_backward(*_pointers(to_gate, to_up, grad, gate, up), _long(gate.numel()), _threads())
        return None, to_gate, to_up


class Attention(torch.autograd.Function):
    """Causal attention with rotary embedding: (B, T, N, D), (B, T, K, D) twice -> (B, T, N * D).

    cos and sin are (B or 1, T, D). The G query heads of a key head are folded into the position axis (Q = G * T), so
    that no keys are repeated. `moa.base.kernels.attention` says why this is not torch's fused kernel.
    """

    @staticmethod
    def forward(ctx: Any, pieces: ctypes.CDLL, q_BTND: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, cos: Tensor,
                sin: Tensor, scale: float) -> Tensor:
        rows, length, heads, size = q_BTND.shape
        keys = k_BTKD.shape[2]
        q_MQD = _rotary(pieces, q_BTND, cos, sin).view(rows * keys, -1, size)
        k_MTD = _rotary(pieces, k_BTKD, cos, sin).view(rows * keys, length, size)
        v_MTD = v_BTKD.transpose(1, 2).reshape(rows * keys, length, size)
        likely_MQT = torch.bmm(q_MQD, k_MTD.transpose(1, 2))
        pieces.softmax_forward(*_pointers(likely_MQT), _long(rows * heads), length, ctypes.c_float(scale), _threads())
        ctx.pieces, ctx.scale, ctx.heads = pieces, scale, heads
        ctx.save_for_backward(q_MQD, k_MTD, v_MTD, likely_MQT, cos, sin)
        return torch.bmm(likely_MQT, v_MTD).view(rows, heads, length, size).transpose(1, 2).reshape(rows, length, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_MQD, k_MTD, v_MTD, likely_MQT, cos, sin = ctx.saved_tensors
        (rows, length, _), heads, size = grad.shape, ctx.heads, q_MQD.shape[-1]
        grad_MQD = grad.view(rows, length, heads, size).transpose(1, 2).reshape(q_MQD.shape)
        to_v_BTKD = torch.bmm(likely_MQT.transpose(1, 2), grad_MQD).view(rows, -1, length, size).transpose(1, 2)
        scores_MQT = torch.bmm(grad_MQD, v_MTD.transpose(1, 2))
        ctx.pieces.softmax_backward(*_pointers(scores_MQT, likely_MQT), _long(rows * heads), length,
                                    ctypes.c_float(ctx.scale), _threads())
        to_q, to_k = (_rotary_backward(ctx.pieces, each.view(rows, -1, length, size), cos, sin)
                      for each in (torch.bmm(scores_MQT, k_MTD), torch.bmm(scores_MQT.transpose(1, 2), q_MQD)))
        return None, to_q, to_k, to_v_BTKD, None, None, None


def _rotary(pieces: ctypes.CDLL, x_BTND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:   # -> (B, N, T, D)
    rows, length, heads, size = x_BTND.shape
    turned = x_BTND.new_empty(rows, heads, length, size)
    _rotate(pieces, turned, x_BTND.contiguous(), cos, sin, 0)
    return turned


def _rotary_backward(pieces: ctypes.CDLL, grad_BNTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:   # -> (B, T, N, D)
    rows, heads, length, size = grad_BNTD.shape
    back = grad_BNTD.new_empty(rows, length, heads, size)
    _rotate(pieces, back, grad_BNTD, cos, sin, 1)
    return back


def _rotate(pieces: ctypes.CDLL, to: Tensor, x: Tensor, cos: Tensor, sin: Tensor, back: int) -> None:
    rows, length, heads, size = x.shape if not back else to.shape
    step = _long(cos[0].numel() if len(cos) > 1 else 0)
    pieces.rotary(*_pointers(to, x, cos, sin), step, rows, length, heads, size, back, _threads())


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _long(number: int) -> ctypes.c_int64:
    return ctypes.c_int64(number)


def _threads() -> int:
    return torch.get_num_threads()
