"""A least-recently-used cache of experts, for a stack that has fewer slots than the mixture has experts.

`ExpertLoader` fills a slot of a stack from an expert's PEFT directory. A safetensors file begins with a header that
has the name, shape, type and offset of every tensor. If `moa.experts.peft_format` has loaded an expert with the same
configuration and header before, byte for byte, `ExpertLoader` copies the numbers straight from the memory-mapped file
and only checks that they are finite. `moa.experts.peft_format` loads all other experts, and those whose numbers would
have to be converted or padded.

`ExpertCache` decides which expert is in which slot. An evicted expert leaves nothing in this process: the operating
system caches its file. An expert has the same numbers in every slot, so the cache changes no result.

Shapes: P an expert's parameters, as in `moa.experts.lora`.
"""

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from moa.experts import peft_format
from moa.experts.lora import BASE_ONLY, ExpertStack, LoraSpec

Head = tuple[bytes, bytes, int]   # PEFT configuration; safetensors header without its length field; size of the file


@dataclass(frozen=True, slots=True)
class _Layout:
    """How to copy the numbers of a safetensors file into a slot."""

    spec: LoraSpec
    shapes: dict[str, LoraSpec]
    start: int                            # byte of the file at which the numbers begin
    ranges: list[tuple[int, int, int]]    # (first number in the file, first number in the slot, count)


class ExpertLoader:
    """Fills slots of one stack from PEFT directories, by copying where the layout of the files is known."""

    def __init__(self, stack: ExpertStack) -> None:
        self.stack = stack
        self._layouts: dict[Head, _Layout | None] = {}   # None = cannot be copied

    def load(self, slot: int, directory: Path) -> None:
        """Fill a slot as `moa.experts.peft_format.load` does. Raises the same errors."""
        head = _head(directory)
        layout = self._layouts.get(head) if head else None
        if layout is not None:
            self._copy(slot, directory, layout)
            return
        peft_format.load(self.stack, slot, directory)
        if head and head not in self._layouts:
            self._layouts[head] = self._layout(slot, head)

    def _copy(self, slot: int, directory: Path, layout: _Layout) -> None:
        """Copy the file's numbers into the slot. Raises ArtifactError when one is not finite."""
        stack, row_P = self.stack, self.stack.weights[slot]
        numbers = np.memmap(directory / peft_format.WEIGHTS, np.float32, "r", offset=layout.start)
        slot_P = row_P.numpy() if row_P.device.type == "cpu" else np.empty(len(row_P), np.float32)
        for source, target, count in layout.ranges:
            slot_P[target:target + count] = numbers[source:source + count]
        if row_P.device.type != "cpu":
            row_P.copy_(torch.from_numpy(slot_P))   # one transfer to the device, not one for each matrix
        if stack.shapes[slot] is not layout.shapes:
            for name, spec in layout.shapes.items():
                stack.layers[name].scale_E[slot] = spec.scale
        stack.specs[slot], stack.shapes[slot] = layout.spec, layout.shapes
        stack.changed()
        if not torch.stack(row_P.aminmax()).isfinite().all():   # one pass; the extremes of numbers with a NaN are NaN
            peft_format.load(stack, slot, directory)            # raises an error that names the layer

    def _layout(self, slot: int, head: Head) -> _Layout | None:
        """Layout by which files with this head are copied; `peft_format` has just loaded such a file into `slot`.

        None where a matrix is missing from the file, is not in float32, or has another shape than in the slot.
        """
        stack, tensors, ranges = self.stack, json.loads(head[1]), []
        row_P = stack.weights[slot]
        for name, layer in stack.layers.items():
            for part, matrix in (("A", layer.a_ERI[slot]), ("B", layer.b_EOR[slot])):
                entry = tensors.get(f"{peft_format.PREFIX}{name}.lora_{part}.weight")
                if (entry is None or entry["dtype"] != "F32" or matrix.dtype != torch.float32
                        or entry["shape"] != list(matrix.shape) or not matrix.is_contiguous()):
                    return None
                target = (matrix.data_ptr() - row_P.data_ptr()) // matrix.itemsize
                ranges.append((entry["data_offsets"][0] // matrix.itemsize, target, matrix.numel()))
        start = 8 + len(head[1])   # safetensors: 8 bytes with the header's length, the header, the numbers
        return _Layout(stack.specs[slot], stack.shapes[slot], start, _merge_adjacent(ranges))


def _head(directory: Path) -> Head | None:
    """Configuration and header of the directory's files; None when unreadable, of which `peft_format.load` raises."""
    try:
        with (directory / peft_format.WEIGHTS).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            header = file.read(min(int.from_bytes(file.read(8), "little"), size))
        return (directory / peft_format.CONFIG).read_bytes(), header, size
    except OSError:
        return None


def _merge_adjacent(ranges: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The ranges (source, target, count), with those merged that are adjacent in both source and target."""
    merged: list[tuple[int, int, int]] = []
    for source, target, count in sorted(ranges):
        if merged and (merged[-1][0] + merged[-1][2], merged[-1][1] + merged[-1][2]) == (source, target):
            merged[-1] = (*merged[-1][:2], merged[-1][2] + count)
        else:
            merged.append((source, target, count))
    return merged


Load = Callable[[int, int], None]   # (expert, slot): fills the slot; called from several threads, for different slots
LOADING_THREADS = 4                 # reading, hashing and copying release the GIL for most of their time


class Slots:
    """Which expert is in which slot. Evicts the least recently used expert, but none that is held.

    Args:
        count: number of slots.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._slots: OrderedDict[int, int] = OrderedDict()   # by expert, the least recently used first
        self._free = list(range(count))
        self._held: Counter[int] = Counter()                 # calls of `hold` without their `release`, by expert

    def __contains__(self, expert: int) -> bool:
        return expert in self._slots

    def __getitem__(self, expert: int) -> int:
        return self._slots[expert]

    def hold(self, experts: Collection[int]) -> list[int]:
        """Keep these experts from eviction until `release`, as the most recently used. Returns those without a slot."""
        self._held.update(experts)
        for expert in experts:
            if expert in self._slots:
                self._slots.move_to_end(expert)
        return [expert for expert in experts if expert not in self._slots]

    def release(self, experts: Collection[int]) -> None:
        """End one `hold` of these experts."""
        self._held.subtract(experts)

    def take(self) -> int:
        """Take a free slot. Without one, evict the least recently used expert that is not held."""
        if not self._free:
            evicted = next(expert for expert in self._slots if not self._held[expert])
            self._free.append(self._slots.pop(evicted))
        return self._free.pop(0)

    def fill(self, expert: int, slot: int) -> None:
        """Record that `expert` is in `slot`, which came from `take`."""
        self._slots[expert] = slot

    def free(self, slot: int) -> None:
        """Return a slot from `take` that could not be filled."""
        self._free.append(slot)


class ExpertCache:
    """Loads experts into the slots of one stack when they are used. Not thread-safe.

    `asked` counts the experts of every `using`, `loaded` those that were loaded from their files.

    Args:
        slots: number of slots of the stack.
        load: called as load(expert, slot) to fill a slot, from several threads at once for different slots.
    """

    def __init__(self, slots: int, load: Load) -> None:
        self.slots = Slots(slots)
        self.asked = self.loaded = 0
        self._load = load

    @classmethod
    def resident(cls, experts: int) -> Self:
        """A cache for a stack that holds all of this number of experts already, expert e in slot e."""
        cache = cls(experts, lambda *_: None)
        cache.bring(range(experts))
        return cache

    @contextmanager
    def using(self, experts: Sequence[int]) -> Iterator[list[int]]:
        """Within the block, these experts are in the stack; there may be at most as many as slots (`parts`).

        Yields the slot of each, and BASE_ONLY for BASE_ONLY. Raises the errors of `load`.
        """
        distinct = _distinct(experts)
        try:
            self.bring(self.slots.hold(distinct))
            self.asked += len(distinct)
            yield [BASE_ONLY if expert == BASE_ONLY else self.slots[expert] for expert in experts]
        finally:
            self.slots.release(distinct)

    def bring(self, experts: Collection[int]) -> None:
        """Load experts that have no slot, several at a time.

        If an expert cannot be loaded, its slot stays free and the others are loaded; then the first error is raised.
        """
        if not experts:
            return
        slots = {expert: self.slots.take() for expert in experts}
        with ThreadPoolExecutor(LOADING_THREADS) as pool:
            loads = {expert: pool.submit(self._load, expert, slot) for expert, slot in slots.items()}
        failures = []
        for expert, load in loads.items():
            if (failure := load.exception()) is None:
                self.slots.fill(expert, slots[expert])
                self.loaded += 1
            else:
                self.slots.free(slots[expert])
                failures.append(failure)
        if failures:
            raise failures[0]

    def parts(self, experts: Sequence[int]) -> list[list[int]]:
        """Group the indices of `experts` into the fewest groups whose experts fit into the slots.

        The first groups have the experts that are in the stack now, so that they are used before their eviction.
        """
        distinct = sorted(_distinct(experts), key=lambda expert: expert not in self.slots)
        part_of = {expert: order // self.slots.count for order, expert in enumerate(distinct)}
        parts: list[list[int]] = [[] for _ in range(max(part_of.values(), default=0) + 1)]
        for index, expert in enumerate(experts):
            parts[part_of.get(expert, 0)].append(index)   # BASE_ONLY needs no slot: its rows go with the first group
        return parts


def _distinct(experts: Sequence[int]) -> list[int]:
    """Each expert once, in order of first occurrence, without BASE_ONLY."""
    return [expert for expert in dict.fromkeys(experts) if expert != BASE_ONLY]
