"""The decoding step of `LlamaDecoding` (`moa.mixture.generation.decoding`), compiled: all layers in one call of C.

`csrc/step.c` serves CPUs that multiply bfloat16, or any CPU in float32, where a compiler is installed
(`moa.base.kernels.build`) and the model's widths fill its tiles; sums are in float32 throughout. It reads frozen
weights in an order of its own, tile by tile of outputs, and in a tile input by input. They are copied once (`packed`)
and the copy lives as long as the weights.

Shapes: B rows, H hidden size, T positions, K key heads, C = 2K keys and values, D size of a head, I inputs, O outputs
of several layers side by side, P parts: those layers, R ranks, L lanes of a vector, S = O / L.
"""

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from moa.base.kernels.build import library_for
from moa.experts.lora import StackedLoRA
from moa.mixture.generation.decoding import CHUNK, LlamaDecoding

SHARE = 0.25   # of the machine's memory that the copies may take

_packed: Any = WeakTensorKeyDictionary()   # by the first layer's weight: copies of a base that share weights share this


def packed(layers: Sequence[nn.Linear], tile: int, pair: int) -> tuple[Tensor, Tensor | None]:
    """The layers' weights (O / tile, I / pair, tile, pair), and their biases (O) in float32 if they have some. Behind
    the last output come zeros, up to an even number of tiles."""
    first = layers[0].weight
    if first not in _packed:
        _packed[first] = _pack(layers, tile, pair)
    return _packed[first]


def fits_in_memory(groups: Sequence[Sequence[nn.Linear]]) -> bool:
    """Whether there is memory to pack these too, each group side by side."""
    new = sum(layer.weight.nbytes for layers in groups if layers[0].weight not in _packed for layer in layers)
    taken = sum(weight.nbytes for weight, _ in _packed.values())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return not new or taken + new <= SHARE * memory


def _pack(layers: Sequence[nn.Linear], tile: int, pair: int) -> tuple[Tensor, Tensor | None]:
    with torch.no_grad():
        weight_OI = torch.cat([layer.weight for layer in layers])
        biases = [layer.bias if layer.bias is not None else layer.weight.new_zeros(len(layer.weight))
                  for layer in layers]
        more = -len(weight_OI) % (2 * tile)
        bias_O = (functional.pad(torch.cat(biases).float(), (0, more))
                  if any(layer.bias is not None for layer in layers) else None)
        weight_OI = functional.pad(weight_OI, (0, 0, 0, more))
        outputs, inputs = weight_OI.shape
        return weight_OI.view(outputs // tile, tile, inputs // pair, pair).transpose(1, 2).contiguous(), bias_O


GROUPS = ("qkv", "out", "gate_up", "down")   # of a layer, each of layers that read the same input
POINTER, INT = ctypes.c_void_p, ctypes.c_int32


class _Group(ctypes.Structure):
    _fields_ = [*((name, POINTER) for name in ("weight", "bias", "a", "b", "part")),
                *((name, INT) for name in ("inputs", "outputs", "parts", "ranks"))]


class _Layer(ctypes.Structure):
    _fields_ = [("before", POINTER), ("between", POINTER),
                *((name, _Group) for name in GROUPS)]


class _Model(ctypes.Structure):
    _fields_ = [("layers", ctypes.POINTER(_Layer)), ("norm", POINTER), ("head", _Group),
                *((name, INT) for name in ("count", "hidden", "heads", "keys", "size")),
                ("epsilon", ctypes.c_float), ("scale", ctypes.c_float)]


class _Batch(ctypes.Structure):
    _fields_ = [*((name, POINTER) for name in ("x", "cos", "sin", "keys", "values", "lengths", "logits", "input",
                                               "output", "hidden", "scores")),
                *((name, INT) for name in ("rows", "room", "threads"))]


def supports_native(model: Any) -> bool:
    """Whether the compiled step can decode a model that `moa.mixture.generation.decoding.supports_step` admits."""
    step = library_for("step", model.dtype) if model.device.type == "cpu" else None
    if step is None or model.config.hidden_act != "silu":
        return False
    tile = 2 * step.lanes()
    groups = [[_plain(layer) for layer in layers] for each in model.model.layers for layers in _groups(each).values()]
    size = model.model.layers[0].self_attn.head_dim
    return (all(layer.out_features % tile == layer.in_features % tile == 0 for layers in groups for layer in layers)
            and size % tile == 0 and fits_in_memory([*groups, [model.get_output_embeddings()]]))


def _groups(layer: Any) -> dict[str, list[nn.Linear | StackedLoRA]]:
    attention, mlp = layer.self_attn, layer.mlp
    return dict(zip(GROUPS, ([attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj],
                             [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]), strict=True))


def _plain(layer: nn.Linear | StackedLoRA) -> nn.Linear:
    return layer.base if isinstance(layer, StackedLoRA) else layer


class CompiledDecoding(LlamaDecoding):
    """`LlamaDecoding` in one call a step."""

    def _prepare(self) -> None:
        model, step = self.model, library_for("step", self.model.dtype)
        assert step is not None
        self.call, self.lanes, self.pair = step.step, step.lanes(), 2 if model.dtype == torch.bfloat16 else 1
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
        weight, bias_O = packed(plain, self.lanes, self.pair)
        group.weight, group.bias = self._point(weight), None if bias_O is None else self._point(bias_O)
        group.inputs, group.outputs, group.parts = plain[0].in_features, len(weight) * self.lanes, len(plain)
        halves = [layer.take_gathered(torch.float32) if isinstance(layer, StackedLoRA)
                  and layer.selection.rows is not None else None for layer in layers]
        some = next((half for half in halves if half is not None), None)
        if some is None:
            return
        group.ranks = some[0].shape[1]
        owners = [part for part, layer in enumerate(plain) for _ in range(layer.out_features // self.lanes)]
        group.part = self._point(torch.tensor(owners, dtype=torch.int32))
        dtype = self.model.dtype
        a_BRI = torch.cat([torch.zeros_like(some[0]) if half is None else half[0] for half in halves], dim=1).to(dtype)
        b_BRO = torch.cat([some[1].new_zeros(len(some[1]), group.ranks, layer.out_features) if half is None
                           else half[1] for half, layer in zip(halves, plain, strict=True)], dim=2).to(dtype)
        b_SBRL = b_BRO.unflatten(2, (-1, self.lanes)).permute(2, 0, 1, 3).contiguous()
        self.experts.append((group, a_BRI, b_SBRL))
        group.a, group.b = a_BRI.data_ptr(), b_SBRL.data_ptr()

    def _keep(self, rows_B: Tensor) -> None:
        self.experts = [(group, a_BRI[rows_B], b_SBRL[:, rows_B]) for group, a_BRI, b_SBRL in self.experts]
        for group, a_BRI, b_SBRL in self.experts:
            group.a, group.b = a_BRI.data_ptr(), b_SBRL.data_ptr()
        self._hold(self.keys[:, rows_B], self.values[:, rows_B])

    def _settle(self, filled: Tensor) -> None:
        """Keep keys and values of (layers, B, C, T, D), each row from its first token on."""
        layers, rows, both, length, size = filled.shape
        room = (length // CHUNK + 1) * CHUNK
        moved = filled.new_zeros(layers, rows, both, room, size)
        for row, own in enumerate(self.place_B.tolist()):
            moved[:, row, :, :own] = filled[:, row, :, length - own:]
        keys, values = moved.chunk(2, dim=2)   # keys so that those of neighbouring positions are multiplied at once
        self._hold(keys.unflatten(4, (-1, self.pair)).unflatten(3, (-1, self.lanes)).transpose(4, 5), values)

    def _make_room(self) -> None:
        if int(self.place_B.max()) == self.batch.room:
            self._hold(functional.pad(self.keys, (*[0] * 7, CHUNK // self.lanes)),
                       functional.pad(self.values, (*[0] * 3, CHUNK)))

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        """(layers, B, K, T / L, D / pair, L, pair) and (layers, B, K, T, D)."""
        self.keys, self.values = keys.contiguous(), values.contiguous()
        _, rows, _, room, _ = values.shape
        groups = [getattr(self.layers[0], name) for name in GROUPS]
        self.scratch = {"input": values.new_empty(rows, max(group.inputs for group in groups)),
                        "output": torch.empty(rows, max(group.outputs for group in groups)),
                        "hidden": torch.empty(rows, max(1, *(group.parts * group.ranks for group in groups))),
                        "scores": torch.empty(rows, self.whole.heads, room),
                        "logits": torch.empty(rows, self.whole.head.outputs)}
        self.batch = _Batch(rows=rows, room=room, keys=self.keys.data_ptr(), values=self.values.data_ptr(),
                            **{name: each.data_ptr() for name, each in self.scratch.items()})

    def _step(self, tokens_B: Tensor) -> Tensor:
        self._make_room()
        stem = self.model.model
        x_BH = stem.embed_tokens(tokens_B).to(torch.float32, copy=True)   # the step adds to it
        cos_B1D, sin_B1D = (each.contiguous() for each in stem.rotary_emb(x_BH, self.place_B.unsqueeze(1)))
        lengths_B = (self.place_B + 1).int()
        batch = self.batch
        batch.x, batch.cos, batch.sin, batch.lengths = (
            each.data_ptr() for each in (x_BH, cos_B1D, sin_B1D, lengths_B))
        batch.threads = torch.get_num_threads()
        self.call(ctypes.byref(self.whole), ctypes.byref(batch))
        return self.scratch["logits"][:, :self.model.config.vocab_size]
