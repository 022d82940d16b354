"""Statistics that the gate decides by: intervals of paired differences, routing changes, exact tests. Pure.

`interval` is a bootstrap interval of a mean. Each end is the further one of two (Hesterberg 2015, "What Teachers Should
Know About the Bootstrap"): the percentile interval, expanded because it is too short on few rows (section 5.3), and
bootstrap t, which follows skew (5.5). Knows nothing of releases and verdicts.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CHUNK = 1 << 22   # resampled values held at once


def resampled(values: np.ndarray, resamples: int, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of `resamples` draws with replacement, (resamples,) each."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // len(values))
    means, spreads = [], []
    for done in range(0, resamples, step):
        drawn = values[rng.integers(len(values), size=(min(step, resamples - done), len(values)))]
        means.append(drawn.mean(axis=1))
        spreads.append(drawn.std(axis=1))
    return np.concatenate(means), np.concatenate(spreads)


def interval(values: np.ndarray, means: np.ndarray, spreads: np.ndarray, share: float) -> tuple[float, float]:
    """The interval that leaves `share` out at each end.

    Bootstrap t is left out where too many draws have no spread: most differences are 0 then, as between releases that
    share an expert. It knows no bounds: of rows that are equal but for one that gains much, it says that their mean may
    be a loss. No interval reaches beyond the differences that were seen.
    """
    tail = _tail(share, len(values))
    low, high = np.quantile(means, [tail, 1 - tail])
    mean, spread = values.mean(), values.std()
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num((means - mean) / spreads, nan=0.0, posinf=np.inf, neginf=-np.inf)
    lowest, highest = (np.quantile(t, end, method="nearest") for end in (share, 1 - share))
    if np.isfinite(highest):
        low = min(low, mean - highest * spread)
    if np.isfinite(lowest):
        high = max(high, mean - lowest * spread)
    return float(max(low, values.min())), float(min(high, values.max()))


def _tail(share: float, count: int) -> float:
    """Tail of the bootstrap distribution that stands for `share`, expanded for few rows.

    Hesterberg 2015: Phi(-sqrt(n / (n - 1)) * t_{share, n - 1}); the t quantile by its expansion in 1 / degrees of
    freedom (Abramowitz and Stegun 26.7.5), right to three digits from five rows on.
    """
    z, v = NormalDist().inv_cdf(1 - share), count - 1
    t = (z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
         + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3))
    return NormalDist().cdf(-t * math.sqrt(count / v))


@dataclass(frozen=True)
class RoutingChanges:
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


def routing_changes(domain: str, pairs: Iterable[tuple[str, str]]) -> RoutingChanges:
    """Of each prompt the best guess before and after."""
    pairs = list(pairs)
    before, after, lost = (_counted(guesses) for guesses in (
        [old for old, _ in pairs], [new for _, new in pairs], [new for old, new in pairs if old == domain != new]))
    return RoutingChanges(domain, len(pairs), before, after, lost, sum(new == domain != old for old, new in pairs))


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
