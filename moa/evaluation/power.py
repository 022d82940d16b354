"""What a domain's test rows can show before anything is trained: the smallest rise of loss and fall of score.

An interval of the mean of G paired differences with standard deviation s reaches about t s / sqrt(G) to each side. A
release that is as good as the champion passes in the share POWER of all cases where (t_tail + t_POWER) s / sqrt(G) is
at most the tolerance: the usual sample size of a test for non-inferiority (Student's t; Julious 2004, "Sample Sizes for
Clinical Trials with Normal Data", section 5). Groups are the units, as for the gate. The deviations are assumptions,
which the sentence names, because nothing was trained yet. Pure functions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy import stats

from moa.core.config import ReleaseParams
from moa.evaluation.gate import tail_share

POWER = 0.9
LOSS_DEVIATION = 0.1   # nats: of a group's difference of loss between two trainings of one expert
DIFFERENT = 0.15       # share of answers to which two trainings of one expert give different scores of 0 and 1
MOST_GROUPS = 1_000_000


@dataclass(frozen=True)
class Resolution:
    """What the test rows of one domain can show."""

    groups: int            # of test rows
    rise: float | None     # smallest rise of loss that the gate can tell, nats; None for too few groups
    fall: float | None     # smallest fall of the mean score; None for too few groups
    more_groups: int       # until a rise of the tolerance can be told; 0 = it can be already
    more_rows: int         # raw rows that bring about so many test groups


def smallest_difference(groups: int, deviation: float, share: float) -> float:
    """The smallest difference that an interval of `groups` paired differences can tell from zero.

    Args:
        groups: two or more.
        deviation: standard deviation of the paired differences.
        share: what the interval leaves out at one end.
    """
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


def resolution(manifest: Mapping[str, Any], rules: ReleaseParams) -> Resolution | None:
    """What the test rows of a prepared corpus can show at the first look; None where its manifest counts no groups."""
    groups = manifest.get("groups", {}).get("test")
    if not groups:
        return None
    share = tail_share(rules.confidence, 1)
    needed = max(groups_needed(rules.tolerance, LOSS_DEVIATION, share) if rules.tolerance else MOST_GROUPS,
                 rules.min_rows)
    more = max(needed - groups, 0)
    rows = math.ceil(more * manifest["rows"]["kept"] / groups)
    if groups < rules.min_rows:
        return Resolution(groups, None, None, more, rows)
    answered = min(groups, rules.metric_rows)
    fall = smallest_difference(answered, math.sqrt(DIFFERENT), share) if answered >= rules.min_rows else None
    return Resolution(groups, smallest_difference(groups, LOSS_DEVIATION, share), fall, more, rows)


def sentence(domain: str, found: Resolution, rules: ReleaseParams) -> str:
    """A `Resolution` in words."""
    if found.rise is None:
        lacking = rules.min_rows - found.groups
        rows = math.ceil(lacking * found.more_rows / max(found.more_groups, 1))
        return (f"{domain}: {found.groups} test groups are too few for a verdict of the gate, which needs "
                f"{rules.min_rows}: about {rows:,} more rows.")
    fall = f" and a fall of score from {min(found.fall, 1.0):.2f} on" if found.fall is not None else ""
    more = (f"; a rise of {rules.tolerance:g} takes {found.more_groups:,} more, about {found.more_rows:,} rows"
            if found.more_groups else "")
    return (f"{domain}: {found.groups} test groups can show a rise of loss from {found.rise:.3f} nats on{fall}{more} "
            f"(if losses differ by {LOSS_DEVIATION:g} nats between trainings).")
