"""Statistics of the gate and of reports: bootstrap intervals, routing changes, exact tests. Pure functions.

`interval` is a bootstrap interval of a mean. Each end is the further one of two (Hesterberg 2015, "What Teachers Should
Know About the Bootstrap"): the percentile interval, expanded because it is too short on few rows (section 5.3), and
bootstrap t, which follows skew (section 5.5).
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

CHUNK = 1 << 22   # resampled values held at once


def resampled(values: np.ndarray, resamples: int, seed: list[int],
              weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of bootstrap samples.

    Args:
        values: (N,).
        resamples: number of samples, each of N values drawn with replacement.
        seed: of numpy's generator.
        weights: (N,) of a weighted mean, drawn together with the values; None = equal weights.

    Returns:
        Means and standard deviations, (resamples,) each.
    """
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // len(values))
    means, spreads = [], []
    for done in range(0, resamples, step):
        rows = rng.integers(len(values), size=(min(step, resamples - done), len(values)))
        mean, spread = _moments(values[rows], None if weights is None else weights[rows])
        means.append(mean)
        spreads.append(spread)
    return np.concatenate(means), np.concatenate(spreads)


def _moments(values: np.ndarray, weights: np.ndarray | None) -> tuple[Any, Any]:
    """Mean and standard deviation along the last axis, which has N values.

    Of a weighted mean the standard deviation is that of its linearisation (the delta method for a ratio of sums), so
    that it is sqrt(N) times the standard error, as without weights.
    """
    if weights is None:
        return values.mean(axis=-1), values.std(axis=-1)
    mean = (values * weights).sum(axis=-1) / weights.sum(axis=-1)
    deviations = weights * (values - np.expand_dims(mean, -1))
    return mean, np.sqrt((deviations**2).mean(axis=-1)) / weights.mean(axis=-1)


def interval(values: np.ndarray, means: np.ndarray, spreads: np.ndarray, share: float,
             weights: np.ndarray | None = None) -> tuple[float, float]:
    """The interval of the mean of `values` that leaves `share` out at each end.

    Bootstrap t is left out where too many samples have no spread: then most values are 0, as between releases that
    share an expert. Bootstrap t has no bounds: for rows that are equal except one large gain, it would include a loss.
    So the interval is cut at the smallest and the largest value.

    Args:
        values: (N,) with N of two or more.
        means, spreads: of `resampled`.
        share: of one tail, such as 0.025 for a 95 % interval.
        weights: the same as for `resampled`.
    """
    tail = _tail(share, len(values))
    low, high = np.quantile(means, [tail, 1 - tail])
    mean, spread = _moments(values, weights)
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
    lost: dict[str, int]   # routed right before, wrong now: by the domain they go to now
    gained: int            # routed wrong before, right now

    @property
    def fall(self) -> float:
        """Accuracy before, minus accuracy after."""
        return (sum(self.lost.values()) - self.gained) / max(self.rows, 1)

    @property
    def chance(self) -> float:
        """P-value of the sign test: at least so many lost among the changed ones, if both directions were as likely."""
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
    """Count the routing of a domain's prompts; `pairs` are the best guesses (before, after) of each prompt."""
    pairs = list(pairs)
    before, after, lost = (_counted(guesses) for guesses in (
        [old for old, _ in pairs], [new for _, new in pairs], [new for old, new in pairs if old == domain != new]))
    return RoutingChanges(domain, len(pairs), before, after, lost, sum(new == domain != old for old, new in pairs))


def sign_test(for_it: int, against_it: int) -> float:
    """P-value of the one-sided sign test: at least `for_it` heads among `for_it + against_it` tosses of a fair coin."""
    tosses = for_it + against_it
    return sum(math.comb(tosses, heads) for heads in range(for_it, tosses + 1)) / 2**tosses


def exact_test(missed: int, rows: int, others_missed: int, others: int) -> float:
    """P-value of Fisher's exact test, one-sided: at least `missed` of all misses fall on these `rows`, if the `others`
    were as likely to be missed."""
    total = missed + others_missed
    ways = sum(math.comb(rows, here) * math.comb(others, total - here) for here in range(missed, min(rows, total) + 1))
    return ways / math.comb(rows + others, total)


def _counted(guesses: Iterable[str]) -> dict[str, int]:
    """Counts by guess, the most frequent first and ties by name."""
    return dict(sorted(Counter(guesses).items(), key=lambda each: (-each[1], each[0])))
