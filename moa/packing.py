"""Linear layers prepared for the few rows of a decoding step: those that read the same input are one product.

Knows nothing of models, caches or experts. On a CPU that computes in bfloat16, oneDNN takes weights in a layout of its
own, and would bring a plain weight into it again in every call; here that is done once for as long as the weight lives,
at the price of a copy. Where this does not apply, the layers' own weights are used as they are.

Shapes: B rows, I inputs, O outputs of all layers side by side.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

Product = Callable[[Tensor], Tensor]   # (B, I) -> (B, O), a tensor that nobody else holds
ROWS = 16      # of a product that the layout is chosen for; it serves any number
SHARE = 0.25   # of the machine's memory that the copies may take; weights beyond it stay plain

_packed: Any = WeakTensorKeyDictionary()   # by the first layer's weight: copies of a base that share weights share this


def prepared(layers: Sequence[nn.Linear]) -> Product:
    """The layers side by side, in their order."""
    first = layers[0].weight
    if first not in _packed and packs(first) and _room(layers):
        _packed[first] = _pack(layers)
    if first not in _packed:
        return lambda x_BI: _plain(layers, x_BI)
    weight, bias_O = _packed[first]
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x_BI: multiply(x_BI, weight, bias_O, "none", [], "")


def packs(weight: Tensor) -> bool:
    """Whether a layout of its own is known to pay for this weight, and to be there: the operators are torch's private
    ones, which `torch.compile` uses for frozen weights."""
    mkldnn = torch.ops.mkldnn
    return (weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
            and hasattr(mkldnn, "_reorder_linear_weight") and hasattr(mkldnn, "_linear_pointwise")
            and hasattr(mkldnn, "_is_mkldnn_bf16_supported") and mkldnn._is_mkldnn_bf16_supported())


def _room(layers: Sequence[nn.Linear]) -> bool:
    new = sum(layer.weight.numel() for layer in layers)
    taken = sum(weight.numel() for weight, _ in _packed.values())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return layers[0].weight.element_size() * (taken + new) <= SHARE * memory


def _pack(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    with torch.no_grad():
        weight_OI = torch.cat([layer.weight for layer in layers])
        biases = [layer.bias if layer.bias is not None else layer.weight.new_zeros(len(layer.weight))
                  for layer in layers]
        bias_O = torch.cat(biases) if any(layer.bias is not None for layer in layers) else None
        return torch.ops.mkldnn._reorder_linear_weight(weight_OI, ROWS), bias_O


def _plain(layers: Sequence[nn.Linear], x_BI: Tensor) -> Tensor:
    parts = [functional.linear(x_BI, layer.weight, layer.bias) for layer in layers]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
