"""Experts into a stack, again and again: `moa.experts.peft_format` checks a layout once, not for every expert.

A safetensors file begins with a header that names every tensor with its shape, type and place. An expert whose PEFT
configuration and header are byte for byte those of one that `moa.experts.peft_format` has loaded passes all its checks
but that of the numbers, and where such an expert fills its slot in the slot's own type, loading it is copying ranges of
the mapped file. Every other expert is loaded by `moa.experts.peft_format`. Knows nothing of digests, labels, or of who
makes room.

Shapes: P an expert's parameters, as in `moa.experts.lora`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moa.experts import peft_format
from moa.experts.lora import ExpertStack, LoraSpec

Head = tuple[bytes, bytes, int]   # the configuration, the header after its length, the size of the file


@dataclass(frozen=True, slots=True)
class _Layout:
    spec: LoraSpec
    shapes: dict[str, LoraSpec]
    start: int                            # of the numbers in the file, in bytes
    ranges: list[tuple[int, int, int]]    # where among the numbers, where in the slot, and how many


class Loader:
    """Fills slots of one stack from PEFT directories."""

    def __init__(self, stack: ExpertStack) -> None:
        self.stack = stack
        self._layouts: dict[Head, _Layout | None] = {}   # None = no copy of ranges

    def load(self, slot: int, directory: Path) -> None:
        """The same as `adapters.load`; see there for what it raises."""
        head = _head(directory)
        layout = self._layouts.get(head) if head else None
        if layout is not None:
            self._copy(slot, directory, layout)
            return
        peft_format.load(self.stack, slot, directory)
        if head and head not in self._layouts:
            self._layouts[head] = self._layout(slot, head)

    def _copy(self, slot: int, directory: Path, layout: _Layout) -> None:
        stack, row_P = self.stack, self.stack.weights[slot]
        numbers = np.memmap(directory / peft_format.WEIGHTS, np.float32, "r", offset=layout.start)
        here = row_P.numpy() if row_P.device.type == "cpu" else np.empty(len(row_P), np.float32)
        for source, target, count in layout.ranges:
            here[target:target + count] = numbers[source:source + count]
        if row_P.device.type != "cpu":
            row_P.copy_(torch.from_numpy(here))   # one transfer, not one a matrix
        if stack.shapes[slot] is not layout.shapes:
            for name, spec in layout.shapes.items():
                stack.layers[name].scale_E[slot] = spec.scale
        stack.specs[slot], stack.shapes[slot] = layout.spec, layout.shapes
        stack.changed()
        if not torch.stack(row_P.aminmax()).isfinite().all():   # in one pass: a NaN is both extremes
            peft_format.load(stack, slot, directory)               # says where

    def _layout(self, slot: int, head: Head) -> _Layout | None:
        """How the expert that is in `slot` now can be copied there; None where numbers would have to be converted,
        or spread, or are not all there."""
        stack, tensors, ranges = self.stack, json.loads(head[1]), []
        row_P = stack.weights[slot]
        for name, layer in stack.layers.items():
            for part, matrix in (("A", layer.a_ERI[slot]), ("B", layer.b_EOR[slot])):
                found = tensors.get(f"{peft_format.PREFIX}{name}.lora_{part}.weight")
                if (found is None or found["dtype"] != "F32" or matrix.dtype != torch.float32
                        or found["shape"] != list(matrix.shape) or not matrix.is_contiguous()):
                    return None
                place = (matrix.data_ptr() - row_P.data_ptr()) // matrix.itemsize
                ranges.append((found["data_offsets"][0] // matrix.itemsize, place, matrix.numel()))
        start = 8 + len(head[1])
        return _Layout(stack.specs[slot], stack.shapes[slot], start, _joined(ranges))


def _head(directory: Path) -> Head | None:
    """What the directory says of itself; None when it cannot be read, which `moa.experts.peft_format` words."""
    try:
        with (directory / peft_format.WEIGHTS).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            header = file.read(min(int.from_bytes(file.read(8), "little"), size))
        return (directory / peft_format.CONFIG).read_bytes(), header, size
    except OSError:
        return None


def _joined(ranges: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The same numbers in as few ranges as can be."""
    joined: list[tuple[int, int, int]] = []
    for source, target, count in sorted(ranges):
        if joined and (joined[-1][0] + joined[-1][2], joined[-1][1] + joined[-1][2]) == (source, target):
            joined[-1] = (*joined[-1][:2], joined[-1][2] + count)
        else:
            joined.append((source, target, count))
    return joined
