"""Frozen weights in the order in which `csrc/step.c` reads them: tile by tile of outputs, and in it input by input.

Layers that read the same input lie side by side. This is done once for as long as the weights live, at the price of a
copy. Knows nothing of models, caches or experts.

Shapes: I inputs, O outputs of all layers side by side.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

SHARE = 0.25   # of the machine's memory that the copies may take

_packed: Any = WeakTensorKeyDictionary()   # by the first layer's weight: copies of a base that share weights share this


def packed(layers: Sequence[nn.Linear], tile: int, pair: int) -> tuple[Tensor, Tensor | None]:
    """The layers' weights (O / tile, I / pair, tile, pair), and their biases (O) in float32 if they have some. Behind
    the last output come zeros, up to an even number of tiles."""
    first = layers[0].weight
    if first not in _packed:
        _packed[first] = _pack(layers, tile, pair)
    return _packed[first]


def room(groups: Sequence[Sequence[nn.Linear]]) -> bool:
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
