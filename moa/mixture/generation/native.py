"""`LlamaDecoding` (`moa.mixture.generation.decoding`) with a compiled step: one call of C computes all layers.

The C code is `csrc/step.c`. It needs a compiler (`moa.base.kernels.build`), a model in float32 or, on CPUs with
bfloat16 products, in bfloat16, and layer widths that are multiples of its tile (`supports_native`). It sums in float32.
It reads frozen weights tile by tile of outputs, and within a tile input by input: `packed` copies them into that order
once, and the copy lives as long as the weights.

Shapes: B rows, H hidden size, T positions, K key heads, C = 2K keys and values, D size of a head, V words, I inputs,
O outputs of several layers side by side, P number of those layers, R ranks, L lanes of a vector, S = O / L.
`pair` numbers of one lane are multiplied at once: 2 in bfloat16, 1 in float32.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from moa.base.kernels.build import library_for
from moa.core import machine
from moa.experts.lora import StackedLoRA
from moa.mixture.generation.decoding import CHUNK, LlamaDecoding

MEMORY_SHARE = 0.25   # of the memory that this process may use: the most that packed weights may take

# Packed weights and biases, by the first layer's weight: models that share their weights share the copy.
_packed: Any = WeakTensorKeyDictionary()


def packed(layers: Sequence[nn.Linear], lanes: int, pair: int) -> tuple[Tensor, Tensor | None]:
    """The weights of layers with the same input, side by side in the order of `csrc/step.c`, and their biases.

    Outputs are padded with zeros to a multiple of 2 * `lanes`, the tile of the C code. The copy is made at the first
    call for these layers.

    Returns:
        The weights (O / lanes, I / pair, lanes, pair), and the biases (O) in float32, or None where no layer has any.
    """
    first_weight = layers[0].weight
    if first_weight not in _packed:
        _packed[first_weight] = _pack(layers, lanes, pair)
    return _packed[first_weight]


def fits_in_memory(groups: Sequence[Sequence[nn.Linear]]) -> bool:
    """Whether packed copies of these groups of layers, with all copies made so far, stay within `MEMORY_SHARE`."""
    new_bytes = sum(layer.weight.nbytes for layers in groups if layers[0].weight not in _packed for layer in layers)
    packed_bytes = sum(weight.nbytes for weight, _ in _packed.values())
    return not new_bytes or packed_bytes + new_bytes <= MEMORY_SHARE * machine.memory().total


def _pack(layers: Sequence[nn.Linear], lanes: int, pair: int) -> tuple[Tensor, Tensor | None]:
    with torch.no_grad():
        weight_OI = torch.cat([layer.weight for layer in layers])
        biases = [layer.bias if layer.bias is not None else layer.weight.new_zeros(len(layer.weight))
                  for layer in layers]
        padding = -len(weight_OI) % (2 * lanes)
        bias_O = (functional.pad(torch.cat(biases).float(), (0, padding))
                  if any(layer.bias is not None for layer in layers) else None)
        weight_OI = functional.pad(weight_OI, (0, 0, 0, padding))
        outputs, inputs = weight_OI.shape
        return weight_OI.view(outputs // lanes, lanes, inputs // pair, pair).transpose(1, 2).contiguous(), bias_O


GROUPS = ("qkv", "out", "gate_up", "down")   # of one decoder layer; the layers of a group read the same input
POINTER, INT = ctypes.c_void_p, ctypes.c_int32


# The structures of csrc/step.c, field by field; the shapes behind the pointers are stated there.

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
    """Whether `CompiledDecoding` can decode with a model that `moa.mixture.generation.decoding.supports_step` admits.

    The answer depends on the machine: its compiler, its CPU and its memory.
    """
    library = library_for("step", model.dtype) if model.device.type == "cpu" else None
    if library is None or model.config.hidden_act != "silu":
        return False
    tile = 2 * library.lanes()
    groups = [[_base_layer(layer) for layer in layers]
              for decoder_layer in model.model.layers for layers in _groups(decoder_layer).values()]
    head_size = model.model.layers[0].self_attn.head_dim
    return (all(layer.out_features % tile == layer.in_features % tile == 0 for layers in groups for layer in layers)
            and head_size % tile == 0 and fits_in_memory([*groups, [model.get_output_embeddings()]]))


def _groups(decoder_layer: Any) -> dict[str, list[nn.Linear | StackedLoRA]]:
    """The linear layers of a decoder layer, by their name in `GROUPS`."""
    attention, mlp = decoder_layer.self_attn, decoder_layer.mlp
    return dict(zip(GROUPS, ([attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj],
                             [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]), strict=True))


def _base_layer(layer: nn.Linear | StackedLoRA) -> nn.Linear:
    return layer.base if isinstance(layer, StackedLoRA) else layer


class CompiledDecoding(LlamaDecoding):
    """`LlamaDecoding` whose step is one call of `csrc/step.c`.

    The cache differs from that of `LlamaDecoding`: keys and values are two tensors (`_set_cache`), and a row's
    positions begin with its first token, so there is no padding to mask.
    """

    def _prepare_layers(self) -> None:
        model, library = self.model, library_for("step", self.model.dtype)
        assert library is not None
        self.compiled_step, self.lanes = library.step, library.lanes()
        self.pair = 2 if model.dtype == torch.bfloat16 else 1
        self.referenced: list[Any] = []   # tensors that the structures point to: they must outlive the structures
        self.expert_slices: list[tuple[_Group, Tensor, Tensor]] = []   # A (B, P * R, I) and B (S, B, R, L)
        decoder = model.model
        self.layers = (_Layer * len(decoder.layers))()
        for layer, decoder_layer in zip(self.layers, decoder.layers, strict=True):
            layer.before = self._pointer(decoder_layer.input_layernorm.weight.float())
            layer.between = self._pointer(decoder_layer.post_attention_layernorm.weight.float())
            for name, layers in _groups(decoder_layer).items():
                self._fill_group(getattr(layer, name), layers)
        attention = decoder.layers[0].self_attn
        size = attention.head_dim
        heads, keys = (_base_layer(layer).out_features // size for layer in (attention.q_proj, attention.k_proj))
        self.model_struct = _Model(layers=self.layers, norm=self._pointer(decoder.norm.weight.float()),
                                   count=len(decoder.layers), hidden=model.config.hidden_size, heads=heads, keys=keys,
                                   size=size, epsilon=model.config.rms_norm_eps, scale=attention.scaling)
        self._fill_group(self.model_struct.head, [model.get_output_embeddings()])

    def _pointer(self, tensor: Tensor) -> int:
        """Address of the tensor's numbers, which stay in memory as long as this object."""
        self.referenced.append(tensor)
        return tensor.data_ptr()

    def _fill_group(self, group: _Group, layers: Sequence[nn.Linear | StackedLoRA]) -> None:
        """Point the structure to the layers' packed weights and to the slices of each row's selected expert."""
        base_layers = [_base_layer(layer) for layer in layers]
        weight, bias_O = packed(base_layers, self.lanes, self.pair)
        group.weight, group.bias = self._pointer(weight), None if bias_O is None else self._pointer(bias_O)
        group.inputs, group.outputs = base_layers[0].in_features, len(weight) * self.lanes
        group.parts = len(base_layers)
        # The selected A (B, R, I) and B (B, R, O) of each layer; None where no expert adapts it.
        gathered = [layer.take_gathered(torch.float32) if isinstance(layer, StackedLoRA)
                    and layer.selection.rows is not None else None for layer in layers]
        adapted = next((matrices for matrices in gathered if matrices is not None), None)
        if adapted is None:
            return
        group.ranks = adapted[0].shape[1]
        part_S = [part for part, layer in enumerate(base_layers) for _ in range(layer.out_features // self.lanes)]
        group.part = self._pointer(torch.tensor(part_S, dtype=torch.int32))
        dtype = self.model.dtype
        a_BRI = torch.cat([torch.zeros_like(adapted[0]) if matrices is None else matrices[0] for matrices in gathered],
                          dim=1).to(dtype)
        b_BRO = torch.cat([adapted[1].new_zeros(len(adapted[1]), group.ranks, layer.out_features) if matrices is None
                           else matrices[1] for matrices, layer in zip(gathered, base_layers, strict=True)],
                          dim=2).to(dtype)
        b_SBRL = b_BRO.unflatten(2, (-1, self.lanes)).permute(2, 0, 1, 3).contiguous()
        self.expert_slices.append((group, a_BRI, b_SBRL))
        group.a, group.b = a_BRI.data_ptr(), b_SBRL.data_ptr()

    def _keep_rows(self, rows_B: Tensor) -> None:
        self.expert_slices = [(group, a_BRI[rows_B], b_SBRL[:, rows_B]) for group, a_BRI, b_SBRL in self.expert_slices]
        for group, a_BRI, b_SBRL in self.expert_slices:
            group.a, group.b = a_BRI.data_ptr(), b_SBRL.data_ptr()
        self._set_cache(self.keys[:, rows_B], self.values[:, rows_B])

    def _store_cache(self, filled: Tensor) -> None:
        """Move each row's keys and values, (layers, B, C, T, D) with padding on the left, to position 0 onwards."""
        layers, rows, both, length, size = filled.shape
        room = (length // CHUNK + 1) * CHUNK
        shifted = filled.new_zeros(layers, rows, both, room, size)
        for row, row_length in enumerate(self.position_B.tolist()):
            shifted[:, row, :, :row_length] = filled[:, row, :, length - row_length:]
        keys, values = shifted.chunk(2, dim=2)
        # Lanes are neighbouring positions: one vector product adds to the scores of L positions.
        self._set_cache(keys.unflatten(4, (-1, self.pair)).unflatten(3, (-1, self.lanes)).transpose(4, 5), values)

    def _grow_cache(self) -> None:
        """Add `CHUNK` positions to a cache that has no room for the next token."""
        if int(self.position_B.max()) == self.batch.room:
            self._set_cache(functional.pad(self.keys, (*[0] * 7, CHUNK // self.lanes)),
                            functional.pad(self.values, (*[0] * 3, CHUNK)))

    def _set_cache(self, keys: Tensor, values: Tensor) -> None:
        """Use these keys (layers, B, K, T / L, D / pair, L, pair) and values (layers, B, K, T, D), and scratch memory
        of matching size."""
        self.keys, self.values = keys.contiguous(), values.contiguous()
        _, rows, _, room, _ = values.shape
        groups = [getattr(self.layers[0], name) for name in GROUPS]
        self.scratch = {"input": values.new_empty(rows, max(group.inputs for group in groups)),
                        "output": torch.empty(rows, max(group.outputs for group in groups)),
                        "hidden": torch.empty(rows, max(1, *(group.parts * group.ranks for group in groups))),
                        "scores": torch.empty(rows, self.model_struct.heads, room),
                        "logits": torch.empty(rows, self.model_struct.head.outputs)}
        self.batch = _Batch(rows=rows, room=room, keys=self.keys.data_ptr(), values=self.values.data_ptr(),
                            **{name: tensor.data_ptr() for name, tensor in self.scratch.items()})

    def _next_logits(self, tokens_B: Tensor) -> Tensor:
        self._grow_cache()
        decoder = self.model.model
        x_BH = decoder.embed_tokens(tokens_B).to(torch.float32, copy=True)   # a copy, because the C code overwrites it
        cos_B1D, sin_B1D = (table.contiguous() for table in decoder.rotary_emb(x_BH, self.position_B.unsqueeze(1)))
        lengths_B = (self.position_B + 1).int()
        batch = self.batch
        batch.x, batch.cos, batch.sin, batch.lengths = (
            tensor.data_ptr() for tensor in (x_BH, cos_B1D, sin_B1D, lengths_B))
        batch.threads = torch.get_num_threads()
        self.compiled_step(ctypes.byref(self.model_struct), ctypes.byref(batch))
        return self.scratch["logits"][:, :self.model.config.vocab_size]
