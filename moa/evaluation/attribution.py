"""Why a domain got worse under another release: its expert, the router, or the prompt. Pure. Knows nothing of verdicts.

Each row's rise of loss is put down to what differs for that row: another answers it now (the router), or the same one
answers, with other weights (that expert). What the most comes from is the cause.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]     # of moa/evaluation/comparison.py: `incumbent_loss`, `challenger_by` and so on
Parts = Mapping[str, Any]   # of a release: `experts` (digest and corpus by domain) and `prompt`


def causes(rows: Sequence[Row], before: Parts, after: Parts) -> dict[str, str]:
    """A clause, to follow "because", for every domain of which something differs, whether it is worse or not."""
    by_domain: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if "challenger_by" in row:
            by_domain[row["domain"]].append(row)
    found = {domain: _cause(domain, its, before, after) for domain, its in sorted(by_domain.items())}
    return {domain: said for domain, said in found.items() if said}


def _cause(domain: str, rows: Sequence[Row], before: Parts, after: Parts) -> str:
    """Empty where nothing differs but perhaps the base, which no release changes."""
    new = domain not in before["experts"]
    groups: dict[str | None, list[Row]] = defaultdict(list)   # by the label whose expert changed; None for the router
    for row in rows:
        label = row["challenger_by"]
        if label != (domain if new else row["incumbent_by"]):
            groups[None].append(row)
        elif _digest(before, label) != _digest(after, label):
            groups[label].append(row)
    if groups:
        worst = max(groups, key=lambda label: (_harm(groups[label]), len(groups[label]), label is None))
        return (_routed(rows, groups[worst]) if worst is None else
                _changed(worst, domain, f"{len(groups[worst])} of {len(rows)}", before, after))
    return "the prompt changed" if before["prompt"] != after["prompt"] else ""


def _harm(rows: Sequence[Row]) -> tuple[float, float]:
    """How much loss rose in all, then how much the scores fell; a loss that is no number is the worst."""
    rises = [row["challenger_loss"] - other for row in rows if (other := _other(row, "loss")) is not None]
    falls = [other - row["challenger_score"] for row in rows
             if "challenger_score" in row and (other := _other(row, "score")) is not None]
    return (math.inf if any(math.isnan(rise) for rise in rises) else sum(rises)), sum(falls)


def _other(row: Row, what: str) -> float | None:
    """Of a domain that the incumbent lacks, the base's."""
    found = row.get(f"incumbent_{what}", row.get(f"base_{what}"))
    return None if found is None else float(found)


def _routed(rows: Sequence[Row], moved: Sequence[Row]) -> str:
    now = Counter(row["challenger_by"] for row in moved)
    return f"the router gives {len(moved)} of its {len(rows)} rows to {' and '.join(sorted(now))} now"


def _changed(label: str, domain: str, share: str, before: Parts, after: Parts) -> str:
    whose = "its expert" if label == domain else f"the expert of {label}, which answers {share} of its rows,"
    old, new = before["experts"].get(label), after["experts"][label]
    if old is None:
        return f"{whose} is new"
    said = f"{whose} changed from {old['digest'][:12]} to {new['digest'][:12]}"
    if old.get("corpus") == new.get("corpus"):
        return said
    # An expert under a wrong name gives itself away by what it learned from.
    strangers = sorted({name for parts in (before, after) for name, each in parts["experts"].items()
                        if name != label and each.get("corpus") == new.get("corpus") is not None})
    return f"{said} and learned from {'the corpus of ' + strangers[0] if strangers else 'another corpus'}"


def _digest(parts: Parts, label: str) -> str | None:
    expert = parts["experts"].get(label)
    return expert["digest"] if expert else None
