"""Prompts that belong together among those that the router left to the base: a domain may be missing.

Pure, and the same for the same prompts. Knows nothing of where they come from.

Distance is one minus the cosine of what the router reads of two prompts, standardised, which is also how it tells the
familiar from the strange (`nearest` in moa/mixture/router.py). Groups are made by average linkage: two are one as long
as the mean distance between their prompts is no more than prompts of a known domain keep from each other.

Shapes: N prompts, D width of what the router reads.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

MOST = 0.95   # of a known domain's prompts: those farther out would join no group of their own domain, either
SHOWN = 3     # examples of a group


def unit(vectors_ND: Any) -> Any:
    """The same, of length one each: (N, D), float64."""
    vectors = np.asarray(vectors_ND, dtype=np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def reach(unit_ND: Any) -> float:
    """How far all but a few of these prompts are, on the average, from the others; NaN for fewer than two."""
    count = len(unit_ND)
    if count < 2:
        return float("nan")
    mean_N = 1 - (unit_ND @ unit_ND.sum(0) - 1) / (count - 1)
    return float(np.quantile(mean_N, MOST))


def widest(domains: Iterable[Any]) -> float | None:
    """How far from the others a prompt of a domain may be: as far as in the widest known one. None when no domain has
    two prompts."""
    found = [each for each in map(reach, domains) if each == each]
    return max(found, default=None)


def groups(unit_ND: Any, width: float, least: int) -> list[list[int]]:
    """Groups of at least `least` prompts, the largest first; each group the numbers of its prompts, in order."""
    if len(unit_ND) < max(least, 2):
        return []
    from sklearn.cluster import AgglomerativeClustering

    found = AgglomerativeClustering(n_clusters=None, distance_threshold=width, metric="cosine", linkage="average"
                                    ).fit_predict(unit_ND)
    members: dict[int, list[int]] = {}
    for place, label in enumerate(found.tolist()):
        members.setdefault(label, []).append(place)
    return sorted((each for each in members.values() if len(each) >= least), key=lambda each: (-len(each), each[0]))


def typical(unit_ND: Any, group: list[int], count: int = SHOWN) -> list[int]:
    """The prompts nearest to a group's middle."""
    inside = unit_ND[group]
    closeness = inside @ inside.mean(0)
    return [group[place] for place in np.argsort(-closeness, kind="stable")[:count]]
