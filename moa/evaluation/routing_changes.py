"""Where a domain's prompts go under two releases. Pure. Knows nothing of routers, releases and verdicts."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Moves:
    """The prompts of one domain that both releases routed; `before`, `after` and `lost` count them by best guess."""

    domain: str
    rows: int
    before: dict[str, int]
    after: dict[str, int]
    lost: dict[str, int]   # routed right before: where they go now
    gained: int            # routed wrong before, right now

    @property
    def fall(self) -> float:
        """Accuracy before, minus accuracy after."""
        return (sum(self.lost.values()) - self.gained) / max(self.rows, 1)

    @property
    def chance(self) -> float:
        """Of at least so many lost among those that changed, were either way as likely."""
        return sign_test(sum(self.lost.values()), self.gained)

    @property
    def text(self) -> str:
        """Such as "from 100.0% to 80.0%, 5 prompts go to math now"."""
        before, after = (guesses.get(self.domain, 0) / max(self.rows, 1) for guesses in (self.before, self.after))
        gone = ", ".join(f"{count} {'prompts go' if count > 1 else 'prompt goes'} to {guess} now"
                         for guess, count in self.lost.items())
        return f"from {before:.1%} to {after:.1%}" + (f", {gone}" if gone else "")

    @property
    def missed(self) -> int:
        """Routed wrong after."""
        return self.rows - self.after.get(self.domain, 0)


def moves(domain: str, pairs: Iterable[tuple[str, str]]) -> Moves:
    """Of each prompt the best guess before and after."""
    pairs = list(pairs)
    before, after, lost = (_counted(guesses) for guesses in (
        [old for old, _ in pairs], [new for _, new in pairs], [new for old, new in pairs if old == domain != new]))
    return Moves(domain, len(pairs), before, after, lost, sum(new == domain != old for old, new in pairs))


def sign_test(for_it: int, against_it: int) -> float:
    """Chance of at least `for_it` heads among all these tosses of a fair coin."""
    tosses = for_it + against_it
    return sum(math.comb(tosses, heads) for heads in range(for_it, tosses + 1)) / 2**tosses


def exact_test(missed: int, rows: int, others_missed: int, others: int) -> float:
    """Chance that at least so many of all that were missed are among these `rows`, were the others as easy to miss
    (Fisher's exact test, one-sided)."""
    every = missed + others_missed
    ways = sum(math.comb(rows, here) * math.comb(others, every - here) for here in range(missed, min(rows, every) + 1))
    return ways / math.comb(rows + others, every)


def _counted(guesses: Iterable[str]) -> dict[str, int]:
    """Most frequent first, equal ones by name."""
    return dict(sorted(Counter(guesses).items(), key=lambda each: (-each[1], each[0])))
