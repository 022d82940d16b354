"""The decoding step of `moa.llama`, compiled: all layers in one call of `csrc/step.c`, which says how and why.

On CPUs that multiply bfloat16, or in float32 on any, where a compiler is at hand (`moa.native`) and the model's widths
fill its tiles; sums are in float32 throughout.

Shapes: B rows, H hidden size, T positions, K key heads, C = 2K keys and values, D size of a head, I inputs, O outputs
of several layers side by side, P parts: those layers, R ranks.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moa import packing
from moa.llama import LlamaDecoding
from moa.lora import StackedLoRA
from moa.native import library_for

POINTER, INT = ctypes.c_void_p, ctypes.c_int32


class _Group(ctypes.Structure):
    _fields_ = [*((name, POINTER) for name in ("weight", "bias", "a", "b", "part")),
                *((name, INT) for name in ("inputs", "outputs", "parts", "ranks"))]


class _Layer(ctypes.Structure):
    _fields_ = [("before", POINTER), ("between", POINTER),
                *((name, _Group) for name in ("qkv", "out", "gate_up", "down"))]


class _Model(ctypes.Structure):
    _fields_ = [("layers", ctypes.POINTER(_Layer)), ("norm", POINTER), ("head", _Group),
                *((name, INT) for name in ("count", "hidden", "heads", "keys", "size")),
                ("epsilon", ctypes.c_float), ("scale", ctypes.c_float)]


class _Batch(ctypes.Structure):
    _fields_ = [*((name, POINTER) for name in ("x", "cos", "sin", "columns", "first", "logits", "input", "output",
                                               "hidden", "scores")),
                *((name, INT) for name in ("rows", "length", "room", "threads"))]


def fits(model: Any) -> bool:
    """Whether a model that `moa.llama` fits can be decoded by the compiled step."""
    step = library_for("step", model.dtype) if model.device.type == "cpu" else None
    if step is None or model.config.hidden_act != "silu":
        return False
    tile, _ = _tile(step, model.dtype)
    linear = [_plain(layer) for each in model.model.layers for layers in _groups(each).values() for layer in layers]
    size = model.model.layers[0].self_attn.head_dim
    return (all(layer.out_features % tile == layer.in_features % tile == 0 for layer in linear)
            and size % tile == 0 and packing.room([*linear, model.get_output_embeddings()]))


def _groups(layer: Any) -> dict[str, list[nn.Linear | StackedLoRA]]:
    attention, mlp = layer.self_attn, layer.mlp
    return {"qkv": [attention.q_proj, attention.k_proj, attention.v_proj], "out": [attention.o_proj],
            "gate_up": [mlp.gate_proj, mlp.up_proj], "down": [mlp.down_proj]}


def _plain(layer: nn.Linear | StackedLoRA) -> nn.Linear:
    return layer.base if isinstance(layer, StackedLoRA) else layer


def _tile(step: ctypes.CDLL, dtype: torch.dtype) -> tuple[int, int]:
    """Outputs that are computed together, and inputs that are multiplied at once."""
    return 2 * step.lanes(), 2 if dtype == torch.bfloat16 else 1


class CompiledDecoding(LlamaDecoding):
    """`LlamaDecoding` in one call a step."""

    def _prepare(self) -> None:
        model, step = self.model, library_for("step", self.model.dtype)
        assert step is not None
        self.step_c, self.tile = step.step, _tile(step, model.dtype)
        self.held: list[Any] = []   # what is pointed to
        self.experts: list[tuple[_Group, Tensor, Tensor]] = []
        stem = model.model
        self.layers = (_Layer * len(stem.layers))()
        for place, layer in zip(self.layers, stem.layers, strict=True):
            place.before, place.between = (self._point(norm.weight.float())
                                           for norm in (layer.input_layernorm, layer.post_attention_layernorm))
            for name, layers in _groups(layer).items():
                self._fill(getattr(place, name), layers)
        attention = stem.layers[0].self_attn
        size = attention.head_dim
        heads, keys = (_plain(each).out_features // size for each in (attention.q_proj, attention.k_proj))
        self.whole = _Model(layers=self.layers, norm=self._point(stem.norm.weight.float()), count=len(stem.layers),
                            hidden=model.config.hidden_size, heads=heads, keys=keys, size=size,
                            epsilon=model.config.rms_norm_eps, scale=attention.scaling)
        self._fill(self.whole.head, [model.get_output_embeddings()])

    def _point(self, tensor: Tensor) -> int:
        self.held.append(tensor)
        return tensor.data_ptr()

    def _fill(self, group: _Group, layers: Sequence[nn.Linear | StackedLoRA]) -> None:
        plain = [_plain(layer) for layer in layers]
        weight, bias_O = packing.packed(plain, *self.tile)
        group.weight, group.bias = self._point(weight), None if bias_O is None else self._point(bias_O)
        group.inputs, group.outputs, group.parts = plain[0].in_features, len(weight) * self.tile[0], len(plain)
        halves = [layer.handed_over(torch.float32) if isinstance(layer, StackedLoRA)
                  and layer.selection.rows is not None else None for layer in layers]
        some = next((half for half in halves if half is not None), None)
        if some is None:
            return
        group.ranks = some[0].shape[1]
        owners = [part for part, layer in enumerate(plain) for _ in range(layer.out_features // self.tile[0])]
        group.part = self._point(torch.tensor(owners, dtype=torch.int32))
        dtype = self.model.dtype
        a_BRI = torch.cat([torch.zeros_like(some[0]) if half is None else half[0] for half in halves], dim=1).to(dtype)
        b_BRO = torch.cat([some[1].new_zeros(len(some[1]), group.ranks, layer.out_features) if half is None
                           else half[1] for half, layer in zip(halves, plain, strict=True)], dim=2).to(dtype)
        self.experts.append((group, a_BRI, b_BRO))
        group.a, group.b = a_BRI.data_ptr(), b_BRO.data_ptr()

    def _keep(self, rows_B: Tensor) -> None:
        kept = [(group, a_BRI[rows_B], b_BRO[rows_B]) for group, a_BRI, b_BRO in self.experts]
        self.experts = kept
        for group, a_BRI, b_BRO in kept:
            group.a, group.b = a_BRI.data_ptr(), b_BRO.data_ptr()
        self._settle(self.columns[:, rows_B, :, :self.length])

    def _settle(self, filled: Tensor) -> None:
        super()._settle(filled)
        _, rows, _, room, size = self.columns.shape
        model, dtype = self.whole, self.model.dtype
        groups = [getattr(self.layers[0], name) for name in ("qkv", "out", "gate_up", "down")]
        heads = model.heads * size
        first_B = (self.mask_BT == 0).sum(1, dtype=torch.int32)
        inputs = max(heads, *(group.inputs for group in groups))
        scratch = [self.columns, first_B, torch.empty(rows, inputs, dtype=dtype),
                   torch.empty(rows, max(group.outputs for group in groups)),
                   torch.empty(rows, max(max(group.parts * group.ranks for group in groups), 1)),
                   torch.empty(rows, model.heads, room)]
        self.scratch = scratch
        self.batch = _Batch(rows=rows, room=room, **dict(zip(
            ("columns", "first", "input", "output", "hidden", "scores"),
            (tensor.data_ptr() for tensor in scratch), strict=True)))

    def _step(self, tokens_B: Tensor) -> Tensor:
        self._make_room()
        stem = self.model.model
        x_BH = stem.embed_tokens(tokens_B).float()   # a copy: the step adds to it
        x_BH = x_BH.clone() if self.model.dtype == torch.float32 else x_BH
        cos_B1D, sin_B1D = (each.contiguous() for each in stem.rotary_emb(x_BH, self.place_B.unsqueeze(1)))
        logits_BV = torch.empty(len(x_BH), self.whole.head.outputs)
        batch = self.batch
        batch.x, batch.cos, batch.sin, batch.logits = (each.data_ptr() for each in (x_BH, cos_B1D, sin_B1D, logits_BV))
        batch.length, batch.threads = self.length, torch.get_num_threads()
        self.step_c(ctypes.byref(self.whole), ctypes.byref(batch))
        return logits_BV[:, :self.model.config.vocab_size]
