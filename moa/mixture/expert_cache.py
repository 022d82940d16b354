"""Which experts of a mixture lie in its stack when it holds fewer than there are: those longest unused make room.

Of an expert without a slot nothing is kept here; the system keeps its mapped file in memory as long as there is room.
An expert is the same numbers in every slot, so paging changes no result. Knows nothing of files, labels, digests,
routing or decoding: `load` is the caller's.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Self

from moa.experts.lora import BASE_ONLY

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
        """A slot for somebody new; without a free one, the expert longest unused leaves its own."""
        if not self._free:
            oldest = next(expert for expert in self._slots if not self._held[expert])
            self._free.append(self._slots.pop(oldest))
        return self._free.pop(0)

    def fill(self, expert: int, slot: int) -> None:
        self._slots[expert] = slot

    def leave(self, slot: int) -> None:
        """Nobody is in it after all."""
        self._free.append(slot)


class Pages:
    """The experts of one mixture, and those that the slots of its stack hold. One thread at a time may use them."""

    def __init__(self, slots: int, load: Load) -> None:
        self.slots = Slots(slots)
        self.asked = self.loaded = 0   # experts, each once a batch; those of them that had to be read
        self._load = load

    @classmethod
    def resident(cls, experts: int) -> Self:
        """Every expert is in a slot already, that of its number."""
        pages = cls(experts, lambda *_: None)
        pages.bring(range(experts))
        return pages

    @contextmanager
    def using(self, experts: Sequence[int]) -> Iterator[list[int]]:
        """Inside, these experts, which are no more than there are slots, are in the stack; yields the slot of each.

        BASE_ONLY has no slot and stays itself. Raises what `load` raises.
        """
        wanted = _distinct(experts)
        try:
            self.bring(self.slots.hold(wanted))
            self.asked += len(wanted)
            yield [BASE_ONLY if expert == BASE_ONLY else self.slots[expert] for expert in experts]
        finally:
            self.slots.release(wanted)

    def bring(self, experts: Collection[int]) -> None:
        """Give a slot to each of these experts, which have none. Whoever cannot be loaded leaves it free again, and
        what the first of them raised is raised once all have been tried."""
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
                self.slots.leave(slots[expert])
                failures.append(failure)
        if failures:
            raise failures[0]

    def parts(self, experts: Sequence[int]) -> list[list[int]]:
        """Places of `experts` in as few groups as can be used at once: one, unless there are more than slots.

        Experts that are in the stack already come first, before any of them must make room.
        """
        distinct = sorted(_distinct(experts), key=lambda expert: expert not in self.slots)
        part_of = {expert: place // self.slots.count for place, expert in enumerate(distinct)}
        parts: list[list[int]] = [[] for _ in range(max(part_of.values(), default=0) + 1)]
        for place, expert in enumerate(experts):
            parts[part_of.get(expert, 0)].append(place)
        return parts


def _distinct(experts: Sequence[int]) -> list[int]:
    """Each expert once, in order; the base alone is none."""
    return [expert for expert in dict.fromkeys(experts) if expert != BASE_ONLY]
