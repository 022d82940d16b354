"""The experts of a mixture that are in memory, when its stack holds only some: the least recently used is evicted.

`ExpertLoader` fills a slot of a stack from an expert's PEFT directory. A safetensors file begins with a header that
names every tensor with its shape, type and place. An expert whose PEFT configuration and header are byte for byte those
of one that `moa.experts.peft_format` has loaded needs only the check of its numbers, and where it fills a slot in the
slot's own type, loading it copies ranges of the memory-mapped file. `moa.experts.peft_format` loads every other expert.

`ExpertCache` decides which expert is in which slot. Nothing is kept of an expert without a slot: the operating system
caches its file. An expert is the same numbers in every slot, so paging changes no result.

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

Head = tuple[bytes, bytes, int]   # the configuration, the header after its length, the size of the file


@dataclass(frozen=True, slots=True)
class _Layout:
    spec: LoraSpec
    shapes: dict[str, LoraSpec]
    start: int                            # of the numbers in the file, in bytes
    ranges: list[tuple[int, int, int]]    # where among the numbers, where in the slot, and how many


class ExpertLoader:
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


Load = Callable[[int, int], None]   # (expert, slot): fills the slot, beside other calls for other slots
READERS = 4                         # files, digests and copies side by side: most of it waits or leaves Python


class Slots:
    """Which expert lies in which slot, longest unused first. Those that are held keep theirs."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._slots: OrderedDict[int, int] = OrderedDict()   # by expert
        self._free = list(range(count))
        self._held: Counter[int] = Counter()

    def __contains__(self, expert: int) -> bool:
        return expert in self._slots

    def __getitem__(self, expert: int) -> int:
        return self._slots[expert]

    def hold(self, experts: Collection[int]) -> list[int]:
        """From now on these are in use; returns those without a slot."""
        self._held.update(experts)
        for expert in experts:
            if expert in self._slots:
                self._slots.move_to_end(expert)
        return [expert for expert in experts if expert not in self._slots]

    def release(self, experts: Collection[int]) -> None:
        self._held.subtract(experts)

    def take(self) -> int:
        """A free slot. Without one, the least recently used expert that is not held is evicted."""
        if not self._free:
            oldest = next(expert for expert in self._slots if not self._held[expert])
            self._free.append(self._slots.pop(oldest))
        return self._free.pop(0)

    def fill(self, expert: int, slot: int) -> None:
        self._slots[expert] = slot

    def free(self, slot: int) -> None:
        """Give back a slot that could not be filled."""
        self._free.append(slot)


class ExpertCache:
    """The experts of one mixture, and those that the slots of its stack hold. One thread at a time may use them."""

    def __init__(self, slots: int, load: Load) -> None:
        self.slots = Slots(slots)
        self.asked = self.loaded = 0   # experts counted once a batch; those of them that were read
        self._load = load

    @classmethod
    def resident(cls, experts: int) -> Self:
        """A cache with a slot for every expert, all of them loaded: expert e is in slot e."""
        pages = cls(experts, lambda *_: None)
        pages.bring(range(experts))
        return pages

    @contextmanager
    def using(self, experts: Sequence[int]) -> Iterator[list[int]]:
        """Within the block, these experts, at most as many as there are slots, are in the stack.

        Yields the slot of each; BASE_ONLY, which has none, stays as it is. Raises what `load` raises.
        """
        wanted = _distinct(experts)
        try:
            self.bring(self.slots.hold(wanted))
            self.asked += len(wanted)
            yield [BASE_ONLY if expert == BASE_ONLY else self.slots[expert] for expert in experts]
        finally:
            self.slots.release(wanted)

    def bring(self, experts: Collection[int]) -> None:
        """Load each of these experts, which have no slot, into one. The slot of an expert that cannot be loaded stays
        free, and the first such error is raised once all have been tried."""
        if not experts:
            return
        slots = {expert: self.slots.take() for expert in experts}
        with ThreadPoolExecutor(READERS) as pool:
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
        """Indices into `experts` in as few groups as possible, each of which fits into the slots.

        Experts that are in the stack come first, before another one evicts them.
        """
        distinct = sorted(_distinct(experts), key=lambda expert: expert not in self.slots)
        part_of = {expert: place // self.slots.count for place, expert in enumerate(distinct)}
        parts: list[list[int]] = [[] for _ in range(max(part_of.values(), default=0) + 1)]
        for place, expert in enumerate(experts):
            parts[part_of.get(expert, 0)].append(place)
        return parts


def _distinct(experts: Sequence[int]) -> list[int]:
    """Each expert once, in order, without BASE_ONLY."""
    return [expert for expert in dict.fromkeys(experts) if expert != BASE_ONLY]
