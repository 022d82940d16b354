"""What the test rows of an evaluation tell of its router: abstention, reliability, and who answers now.

Pure functions on rows of an evaluation: mappings with the fields of `moa.evaluation.evaluate.Scored`, as rows.parquet
holds them. They read the rows of the system `routed` alone, which have the router's decision on each prompt once.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from moa.mixture.abstention import CONFIDENCE, upper_limit

Row = Mapping[str, Any]

BINS = 15   # of confidence, as for the expected calibration error


def routed(rows: Iterable[Row]) -> list[Row]:
    """The rows of the system `routed`."""
    return [row for row in rows if row["system"] == "routed"]


def abstentions(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """How many test rows of each domain the router left to the base, and what that shows of fresh prompts.

    Args:
        rows: of an evaluation. Rows of one `group` depend on each other; a row without one is a group by itself.

    Returns:
        By domain: `rows`, `abstained` among them, and their `share`; `groups`, and `groups_abstained`, those with a row
        that was left to the base. `limit` is the upper Clopper-Pearson limit of their share, one-sided, at 95 %: the
        figure that a `moa.mixture.abstention.Promise` bounds in advance.
    """
    by_domain: dict[str, list[Row]] = defaultdict(list)
    for row in routed(rows):
        by_domain[row["domain"]].append(row)
    found = {}
    for domain, mine in by_domain.items():
        groups = {row.get("group") or row["row"] for row in mine}
        left = {row.get("group") or row["row"] for row in mine if row["abstained"]}
        abstained = sum(bool(row["abstained"]) for row in mine)
        found[domain] = {"rows": len(mine), "abstained": abstained, "share": abstained / len(mine),
                         "groups": len(groups), "groups_abstained": len(left),
                         "limit": upper_limit(len(left), len(groups))}
    return found


def reliability(rows: Iterable[Row], bins: int = BINS) -> list[dict[str, Any]]:
    """The reliability diagram of the router's confidence (Guo et al. 2017, arXiv 1706.04599, section 2).

    The bins are those of `moa.mixture.calibration.expected_calibration_error`, which is the mean gap between
    `confidence` and `right` over the rows.

    Args:
        rows: of an evaluation.
        bins: number of bins of equal width from 0 to 1.

    Returns:
        Of each bin that has rows, in ascending order: its ends `low` and `high`, `rows`, their mean `confidence`, the
        share `right` whose domain is the router's best guess, and `interval`, Wilson's of that share at 95 %, as if
        rows were independent.
    """
    from scipy.stats import binomtest  # takes long to import, and most commands need none of this

    by_bin: dict[int, list[Row]] = defaultdict(list)
    for row in routed(rows):
        by_bin[min(int(row["confidence"] * bins), bins - 1)].append(row)
    found = []
    for place, mine in sorted(by_bin.items()):
        right = sum(row["routed_to"] == row["domain"] for row in mine)
        interval = binomtest(right, len(mine)).proportion_ci(CONFIDENCE, method="wilson")
        found.append({"low": place / bins, "high": (place + 1) / bins, "rows": len(mine),
                      "confidence": sum(row["confidence"] for row in mine) / len(mine), "right": right / len(mine),
                      "interval": [float(interval.low), float(interval.high)]})
    return found


def changed_hands(before: Iterable[Row], after: Iterable[Row]) -> list[dict[str, Any]]:
    """The test rows of two evaluations that another expert, or the base, answers after than before.

    Args:
        before, after: rows of the two evaluations. Rows that only one of them has are left out.

    Returns:
        `domain`, `row` (its id), `before` and `after` (the label that answers), `loss_before`, `loss_after` and their
        difference `rise`, in nats per completion token. The greatest rise comes first, and one that is not a number
        before that.
    """
    old = {(row["domain"], row["row"]): row for row in routed(before)}
    found = []
    for now in routed(after):
        was = old.get((now["domain"], now["row"]))
        if was is not None and was["answered_by"] != now["answered_by"]:
            found.append({"domain": now["domain"], "row": now["row"], "before": was["answered_by"],
                          "after": now["answered_by"], "loss_before": was["loss"], "loss_after": now["loss"],
                          "rise": now["loss"] - was["loss"]})
    return sorted(found, key=lambda one: (-math.inf if math.isnan(one["rise"]) else -one["rise"], one["domain"],
                                          one["row"]))
