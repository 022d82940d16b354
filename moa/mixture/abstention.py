"""How unlike a domain's own prompts a prompt must be before the base answers it, and what that promises.

Each domain has a threshold: a prompt is *unlike* the domain where its similarity to the domain's training prompts lies
below it. The threshold is an order statistic of the similarities of n independent groups of prompts, each measured
without its own group: the (k + 1)-th lowest. Of fresh prompts of the domain at most a share p then lies below it, with
probability 1 - P(at most k successes of n at rate p), whatever the distribution is (a one-sided tolerance limit: Wilks
1941, "Determination of sample sizes for setting tolerance limits"; Vovk 2012, arXiv 1209.2673, proposition 2b). So p is
the upper Clopper-Pearson limit of k of n. The assumption is that fresh groups come from where these came from.

Few groups cannot promise a small share: about one in 30 fresh prompts lies below the lowest of 30 groups. The threshold
then lies below the lowest group: where the lowest of as many groups as the promise takes would be expected, if the low
end is exponential, or halfway from the lowest group to the prompt of no domain that comes nearest, if that is lower.
What is promised is what the lowest group promises, all the same.

Pure functions on numbers and arrays. A group counts once, with the lowest similarity of its prompts.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
TAIL = 5          # lowest groups that tell how far the low end reaches; chosen on corpora that report nothing (LOG.md)
ROUNDING = 1e-6   # cosines of one prompt differ by less than this between batches


@dataclass(frozen=True)
class Promise:
    """What a domain's threshold promises of its fresh prompts."""

    threshold: float   # least similarity of a prompt that is like the domain
    groups: int        # independent groups of prompts that it rests on
    left: int          # of them, those that may lie below it
    share: float       # of fresh prompts, at most this share lies below it, with probability CONFIDENCE
    wanted: float      # assemble.max_abstention
    more: int          # further groups that could promise `wanted`; 0 = it is promised

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)


def upper_limit(left: int, groups: int) -> float:
    """Upper Clopper-Pearson limit, at CONFIDENCE, of a share of which `left` of `groups` were seen."""
    from scipy.stats import beta

    return float(beta.ppf(CONFIDENCE, left + 1, groups - left)) if left < groups else 1.0


def groups_needed(share: float) -> int:
    """The fewest groups, none of them below a threshold, that can promise a share: 299 for 0.01.

    Raises ValueError for a share of 0, which no number of groups can promise.
    """
    if share <= 0:
        raise ValueError("no number of groups promises a share of 0")
    return max(math.ceil(math.log1p(-CONFIDENCE) / math.log1p(-share)), 1)


def most_left(groups: int, share: float) -> int:
    """The most of `groups` that may lie below a threshold that promises `share`; 0 also where none may."""
    few, many = 0, groups - 1   # upper_limit rises with `left`
    while few < many:
        middle = (few + many + 1) // 2
        if upper_limit(middle, groups) <= share:
            few = middle
        else:
            many = middle - 1
    return few


def group_minima(scores: np.ndarray, groups: Sequence[object]) -> np.ndarray:
    """The lowest score of each group, in ascending order: (G,). `scores` (N,), `groups` the group of each."""
    lowest: dict[object, float] = {}
    for score, group in zip(scores.tolist(), groups, strict=True):
        lowest[group] = min(score, lowest.get(group, math.inf))
    return np.sort(np.array(list(lowest.values())))


def promise(scores: np.ndarray, groups: Sequence[object], share: float, strange: np.ndarray | None = None) -> Promise:
    """The highest threshold that promises `share`; where the groups are too few, one below their lowest score.

    Args:
        scores: similarity of each prompt to its own domain, measured without its group: (N,), one or more.
        groups: the group of each prompt.
        share: `assemble.max_abstention`, from 0 to below 1.
        strange: similarity of prompts of no domain to this one; None = there are none.
    """
    lowest = group_minima(scores, groups)
    left = most_left(len(lowest), share)
    kept = upper_limit(left, len(lowest))
    more = max(groups_needed(share) - len(lowest), 0) if share > 0 else 0
    threshold = float(lowest[left])
    if more:
        nearest = float(strange.max()) if strange is not None and len(strange) else math.inf
        threshold = min(low_end(lowest, 1 + more / len(lowest), TAIL), (threshold + nearest) / 2)
    return Promise(threshold - ROUNDING, len(lowest), left, kept, share, more)


def low_end(ascending: np.ndarray, times: float, tail: int) -> float:
    """Where the lowest of so many times as many scores would be, if the low end is exponential.

    The lowest of m draws lies below that of n by the mean excess of the low end times log(m / n), in the mean. The mean
    excess is that of the lowest scores (Hill 1975 for its logarithm).

    Args:
        ascending: one or more scores.
        times: 1 or more.
        tail: number of lowest scores that tell the mean excess.
    """
    lowest = ascending[:tail]
    excess = (lowest[-1] - lowest).sum() / max(len(lowest) - 1, 1)
    return float(lowest[0] - excess * math.log(times))


def sentence(domain: str, groups: int, share: float | None) -> str:
    """What so many groups of prompts of a domain promise, in words; `share` is `assemble.max_abstention`."""
    if share is None:
        return f"{domain}: no prompt is left to the base (assemble.max_abstention is null)."
    kept = upper_limit(most_left(groups, share), groups) if groups else 1.0
    said = f"{domain}: of fresh prompts at most {kept:.2%} are left to the base (95 % confidence, {groups:,} groups)"
    if kept <= share:
        return f"{said}."
    more = f"; {share:.2%} takes {groups_needed(share) - groups:,} more groups" if share > 0 else ""
    return f"{said}{more}."
