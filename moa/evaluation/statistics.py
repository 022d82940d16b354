"""Statistics of the gate and of reports: bootstrap intervals, routing changes, exact tests. Pure functions on arrays.

Rows of one group (paraphrases of a question, questions of one template) are not independent, so groups are the units:
intervals resample whole groups (the cluster bootstrap; Cameron, Gelbach and Miller 2008, "Bootstrap-Based Improvements
for Inference with Clustered Errors"), and in a test each group has one vote.

`interval` is a bootstrap interval of a mean. Each end is the further one of two (Hesterberg 2015, "What Teachers Should
Know About the Bootstrap"): the percentile interval, expanded because it is too short on few units (section 5.3), and
bootstrap t, which follows skew (section 5.5). Groups are assumed to be independent draws of one population.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

CHUNK = 1 << 21   # resampled values held at once
RESOLVED = 25     # fewest bootstrap samples beyond a quantile that is read off them; further ones are extrapolated
# Divisor of the degrees of freedom in that extrapolation. The t statistic of skewed values has heavier tails than
# Student's: with 1, 12 % of series of 20 skewed groups passed once in thirty looks although worse by the tolerance,
# with 5 about 7 %, judged by eight of the looks (benchmarks/gate.py, seed 0). It costs power at late looks: LOG.md.
HEAVIER = 5
POWER = 0.9              # share of all cases in which a test for non-inferiority shall tell
MOST_GROUPS = 1_000_000  # of `groups_needed`


def group_means(values: np.ndarray, groups: Sequence[str], weights: np.ndarray | None = None) -> tuple[
        np.ndarray, np.ndarray]:
    """Rows to groups, in the order of the groups' names.

    Args:
        values: (N,).
        groups: each row's group, N names.
        weights: (N,), positive; None = equal weights.

    Returns:
        The weighted mean and the total weight of each of the G groups, (G,) each. The weighted mean over groups is
        that over rows.
    """
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    _, place = np.unique(np.asarray(groups, str), return_inverse=True)
    total = np.bincount(place, weights)
    return np.bincount(place, weights * values) / total, total


def resampled(values: np.ndarray, resamples: int, seed: int,
              weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of bootstrap samples.

    A sample is a row of counts, how often each value was drawn, so that its sums are matrix products. Standard
    deviations are those of `_moments`; they are exactly 0 where all values drawn are equal.

    Args:
        values: (N,), one for each unit: rows, or groups of `group_means`.
        resamples: number of samples, each of N values drawn with replacement.
        seed: of numpy's generator. Calls with the same seed and N draw the same samples.
        weights: (N,) of a weighted mean, drawn together with the values; None = equal weights.

    Returns:
        Means and standard deviations, (resamples,) each.
    """
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    centre = _moments(values, weights)[0]   # differences of large numbers would lose their digits
    centred = values - centre
    powers = np.stack([weights, weights * centred, weights**2, weights**2 * centred, (weights * centred)**2], 1)
    step, parts = max(1, CHUNK // len(values)), []
    for number, done in enumerate(range(0, resamples, step)):
        parts.append(_draws(len(values), min(step, resamples - done), seed, number) @ powers)
    total, first, squares, cross, second = np.concatenate(parts).T
    mean = first / total
    variance = (second - 2 * mean * cross + mean**2 * squares) / len(values)
    variance[variance < 1e-12 * ((weights * centred)**2).mean()] = 0.0   # rounding of equal values
    return centre + mean, np.sqrt(variance) * len(values) / total


@lru_cache(maxsize=4)
def _draws(units: int, samples: int, seed: int, number: int) -> np.ndarray:
    """How often each of the units is drawn in each of so many bootstrap samples: (samples, units) float64."""
    drawn = np.random.default_rng([seed, number]).integers(units, size=(samples, units))
    drawn += units * np.arange(samples)[:, None]
    return np.bincount(drawn.ravel(), minlength=samples * units).reshape(samples, units).astype(float)


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

    A quantile beyond which fewer than RESOLVED samples lie is not read off them: the one with RESOLVED samples beyond
    it is extended by the ratio of Student's t quantiles of both shares.

    Args:
        values: (N,) with N of two or more.
        means, spreads: of `resampled`.
        share: of one tail, such as 0.025 for a 95 % interval.
        weights: the same as for `resampled`.
    """
    from scipy import stats  # takes long to import, and most commands need none of this

    freedom = len(values) - 1
    read = max(share, min(RESOLVED / len(means), 0.25))
    heavy = max(freedom / HEAVIER, 2.0)
    stretch = float(stats.t.isf(share, heavy) / stats.t.isf(read, heavy)) if read > share else 1.0
    # Hesterberg 2015: the tail of the bootstrap distribution that stands for `read` is Phi(-sqrt(n / (n - 1)) t).
    tail = float(stats.norm.cdf(-stats.t.isf(read, freedom) * math.sqrt(len(values) / freedom)))
    mean, spread = _moments(values, weights)
    low, high = mean + (np.quantile(means, [tail, 1 - tail]) - mean) * stretch
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num((means - mean) / spreads, nan=0.0, posinf=np.inf, neginf=-np.inf)
    lowest, highest = (np.quantile(t, end, method="nearest") * stretch for end in (read, 1 - read))
    if np.isfinite(highest):
        low = min(low, mean - highest * spread)
    if np.isfinite(lowest):
        high = max(high, mean - lowest * spread)
    return float(max(low, values.min())), float(min(high, values.max()))


def deviation(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Standard deviation of the values; of a weighted mean, sqrt(N) times its standard error, as `interval` has it."""
    return float(_moments(values, weights)[1])


def smallest_difference(groups: int, deviation: float, share: float) -> float:
    """The smallest difference that an interval of `groups` paired differences can tell from zero.

    Such an interval reaches about t_share s / sqrt(G) to each side, and in the share POWER of all cases a difference of
    (t_share + t_POWER) s / sqrt(G) lies beyond it: the usual sample size of a test for non-inferiority (Student's t;
    Julious 2004, "Sample Sizes for Clinical Trials with Normal Data", section 5).

    Args:
        groups: two or more.
        deviation: standard deviation of the paired differences.
        share: what the interval leaves out at one end.
    """
    from scipy import stats  # takes long to import, and most commands need none of this

    return float((stats.t.isf(share, groups - 1) + stats.t.isf(1 - POWER, groups - 1)) * deviation / math.sqrt(groups))


def groups_needed(difference: float, deviation: float, share: float) -> int:
    """The fewest groups for which `smallest_difference` is at most `difference`; at most MOST_GROUPS."""
    few, enough = 2, MOST_GROUPS
    while few < enough:
        middle = (few + enough) // 2
        if smallest_difference(middle, deviation, share) <= difference:
            enough = middle
        else:
            few = middle + 1
    return enough


def more_groups(values: np.ndarray, weights: np.ndarray, difference: float, share: float) -> int:
    """How many more groups it takes to show that the mean is below `difference`, if in truth it is zero.

    The deviation is the one that these values have. The result is a quarter of their number at least: where they are
    enough by this estimate and did not show it, chance was against them, and a few more would change little.

    Args:
        values, weights: (G,) paired differences of groups, and their weights.
        difference: what the upper end of the interval must not exceed.
        share: what the interval will leave out at one end.
    """
    needed = groups_needed(difference, deviation(values, weights), share)
    return max(needed - len(values), math.ceil(len(values) / 4))


@dataclass(frozen=True)
class RoutingChanges:
    """The prompts of one domain that both releases routed; `before`, `after` and `lost` count them by best guess."""

    domain: str
    rows: int
    before: dict[str, int]
    after: dict[str, int]
    lost: dict[str, int]   # routed right before, wrong now: by the domain they go to now
    gained: int            # routed wrong before, right now
    groups: int            # independent groups among these prompts
    groups_lost: int       # with more prompts lost than gained
    groups_gained: int
    groups_missed: int     # most of whose prompts are routed wrong now

    @property
    def fall(self) -> float:
        """Accuracy before, minus accuracy after."""
        return (sum(self.lost.values()) - self.gained) / max(self.rows, 1)

    @property
    def chance(self) -> float:
        """P-value of the sign test: so many groups lost among the changed ones, if both directions were as likely."""
        return sign_test(self.groups_lost, self.groups_gained)

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


def routing_changes(domain: str, prompts: Iterable[tuple[str, str, str]]) -> RoutingChanges:
    """Count the routing of a domain's prompts.

    Args:
        prompts: of each prompt its group, and the router's best guess before and after.
    """
    prompts = list(prompts)
    before, after, lost = (_counted(guesses) for guesses in (
        [old for _, old, _ in prompts], [new for _, _, new in prompts],
        [new for _, old, new in prompts if old == domain != new]))
    balance: Counter[str] = Counter()   # prompts gained minus prompts lost
    misses: Counter[str] = Counter()    # prompts routed wrong minus prompts routed right
    for group, old, new in prompts:
        balance[group] += (new == domain) - (old == domain)
        misses[group] += 1 if new != domain else -1
    return RoutingChanges(domain, len(prompts), before, after, lost,
                          sum(new == domain != old for _, old, new in prompts), len(balance),
                          sum(each < 0 for each in balance.values()), sum(each > 0 for each in balance.values()),
                          sum(each > 0 for each in misses.values()))


def sign_test(for_it: int, against_it: int) -> float:
    """P-value of the one-sided sign test: at least `for_it` heads among `for_it + against_it` tosses of a fair coin."""
    from scipy import stats  # takes long to import, and most commands need none of this

    return float(stats.binom.sf(for_it - 1, for_it + against_it, 0.5))


def exact_test(missed: int, rows: int, others_missed: int, others: int) -> float:
    """P-value of Fisher's exact test, one-sided: at least `missed` of all misses fall on these `rows`, if the `others`
    were as likely to be missed."""
    from scipy import stats  # takes long to import, and most commands need none of this

    return float(stats.hypergeom.sf(missed - 1, rows + others, missed + others_missed, rows))


def _counted(guesses: Iterable[str]) -> dict[str, int]:
    """Counts by guess, the most frequent first and ties by name."""
    return dict(sorted(Counter(guesses).items(), key=lambda each: (-each[1], each[0])))
