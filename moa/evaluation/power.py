"""What a domain's test rows can show before anything is trained: the smallest rise of loss and fall of score.

A release that is as good as the champion passes in the share POWER of all cases where `smallest_difference` is at most
the tolerance (moa/evaluation/statistics.py). Groups are the units, as for the gate. The deviations are assumptions,
which the sentence names, because nothing was trained yet. `rows_for` turns groups that are lacking into rows of data.
Pure functions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moa.core.config import ReleaseParams
from moa.evaluation.gate import tail_share
from moa.evaluation.statistics import MOST_GROUPS, groups_needed, smallest_difference

LOSS_DEVIATION = 0.1   # nats: of a group's difference of loss between two trainings of one expert
DIFFERENT = 0.15       # share of answers to which two trainings of one expert give different scores of 0 and 1


@dataclass(frozen=True)
class Resolution:
    """What the test rows of one domain can show."""

    groups: int            # of test rows
    rise: float | None     # smallest rise of loss that the gate can tell, nats; None for too few groups
    fall: float | None     # smallest fall of the mean score; None for too few groups
    more_groups: int       # until a rise of the tolerance can be told; 0 = it can be already
    more_rows: int         # raw rows that bring about so many test groups


def resolution(manifest: Mapping[str, Any], rules: ReleaseParams) -> Resolution | None:
    """What the test rows of a prepared corpus can show at the first look; None where its manifest counts no groups."""
    groups = manifest.get("groups", {}).get("test")
    if groups is None:
        return None
    share = tail_share(rules.confidence, 1)
    needed = max(groups_needed(rules.tolerance, LOSS_DEVIATION, share) if rules.tolerance else MOST_GROUPS,
                 rules.min_rows)
    more = max(needed - groups, 0)
    rows = rows_for(more, manifest)
    if groups < rules.min_rows:
        return Resolution(groups, None, None, more, rows)
    answered = min(groups, rules.metric_rows)
    fall = smallest_difference(answered, math.sqrt(DIFFERENT), share) if answered >= rules.min_rows else None
    return Resolution(groups, smallest_difference(groups, LOSS_DEVIATION, share), fall, more, rows)


def rows_for(groups: int, manifest: Mapping[str, Any], test_share: float = 0.1) -> int:
    """Rows of data that bring about so many test groups, at the rows for each test group that a corpus has.

    Args:
        groups: test groups that are lacking.
        manifest: of the prepared corpus.
        test_share: share of rows in the test split (`prepare.test`), for a corpus that has no test group.
    """
    present = manifest.get("groups", {}).get("test")
    return math.ceil(groups * manifest["rows"]["kept"] / present) if present else math.ceil(groups / test_share)


def lacking_groups(manifest: Mapping[str, Any], rules: ReleaseParams) -> int:
    """Test groups that a prepared corpus lacks for any verdict of the gate; 0 too where its manifest counts none."""
    groups = manifest.get("groups", {}).get("test")
    return 0 if groups is None else max(rules.min_rows - groups, 0)


def unjudged(corpora: Mapping[str, Mapping[str, Any]], rules: ReleaseParams) -> list[str]:
    """The domains whose prepared corpora have too few test groups for any verdict of the gate.

    Args:
        corpora: manifests of prepared corpora by domain.
    """
    return [domain for domain, manifest in corpora.items() if lacking_groups(manifest, rules)]


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
