"""Statistics of drift: whether prompts resemble a release's validation rows, and which form groups. Pure functions.

A shift is reported where it is both large (population stability index) and certain (a test), so that unchanged traffic
is called shifted in at most FALSE_ALARMS of all checks, however few the prompts.

`groups` finds prompts that belong together among those that the router left to the base. Distance is one minus the
cosine of the standardised features that the router reads of two prompts, as in `moa.mixture.router.nearest`; groups are
made by average linkage: two groups are merged while the mean distance between their prompts is no more than the width
of a known domain.

Shapes: N prompts, D width of the router's features.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

Verdict = Literal["stable", "shifted", "not enough data"]
VERDICTS: tuple[Verdict, ...] = ("shifted", "stable", "not enough data")   # of several, the first decides
FALSE_ALARMS = 0.05
MEASURES = ("score", "confidence", "abstention", "domains")
ALPHA = FALSE_ALARMS / len(MEASURES)
BINS = 10        # deciles of the validation rows
EXPECTED = 5     # fewest expected prompts of a column of the chi-square test; rarer domains are counted together
ABSTAINED = "abstained"
WORDS = {"score": "how much at home prompts are", "confidence": "the router's confidence",
         "abstention": "the share left to the base", "domains": "the shares of the domains"}


@dataclass(frozen=True, kw_only=True)
class RoutedPrompt:
    """The router's decision on one prompt."""

    domain: str          # its best guess
    score: float
    confidence: float
    abstained: bool


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure of drift. `number` is a population stability index, or the share of abstentions; `threshold` is where
    a shift begins."""

    name: str
    verdict: Verdict
    reason: str
    number: float | None = None
    threshold: float | None = None
    p: float | None = None       # of the test, where there is one
    detail: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measures(traffic: Sequence[RoutedPrompt], validation: Sequence[RoutedPrompt], *, window: int, least: int,
             psi_limit: float) -> list[Measure]:
    """All four measures.

    Args:
        traffic: prompts in the order of time; the newest `window` are compared.
        validation: the release's validation rows.
        least: fewest prompts for a verdict.
        psi_limit: population stability index from which a shift is reported.
    """
    newest = traffic[-window:]
    return [distribution("score", newest, validation, least=least, psi_limit=psi_limit),
            distribution("confidence", newest, validation, least=least, psi_limit=psi_limit),
            abstention(newest, validation, least=least),
            domains(traffic[-2 * window:], validation, least=least, psi_limit=psi_limit)]


def psi(first: Sequence[float], second: Sequence[float]) -> float:
    """Population stability index of two histograms over the same bins: sum of (p - q) ln(p / q), 0 for equal shares.

    Symmetric and never negative. Half a row of the smaller side is added to every bin of both, so that an empty bin
    does not make the index infinite. NaN when a side is empty.
    """
    counts = np.array([first, second], dtype=np.float64)
    totals = counts.sum(1)
    if not totals.min() > 0:
        return math.nan
    shares = counts / totals[:, None] + 0.5 / max(totals.min(), 1.0)
    p, q = shares / shares.sum(1, keepdims=True)
    return float(((p - q) * np.log(p / q)).sum())


def distribution(name: Literal["score", "confidence"], traffic: Sequence[RoutedPrompt],
                 validation: Sequence[RoutedPrompt], *,
                 least: int, psi_limit: float) -> Measure:
    """The shift of one of the router's numbers, independent of the share of prompts that each domain has.

    Domains differ in these numbers, and prompts are distributed over domains otherwise than corpora. So validation rows
    are weighted to the domains' shares of the prompts, and the test compares domain by domain: two-sample
    Kolmogorov-Smirnov tests, combined by Fisher's method. Both are conservative.
    """
    reference = by_domain(name, validation)
    served = {domain: values for domain, values in by_domain(name, traffic).items() if domain in reference}
    count = sum(map(len, served.values()))
    if count < least:
        return Measure(name=name, verdict="not enough data", threshold=psi_limit, reason=_too_few(name, count, least))
    values = np.concatenate([reference[domain] for domain in served])
    weights = np.concatenate([np.full(len(reference[domain]), len(each) / len(reference[domain]) / count)
                              for domain, each in served.items()])
    order = np.argsort(values, kind="stable")
    values, weights = values[order], weights[order]
    places = np.searchsorted(np.cumsum(weights), np.arange(1, BINS) / BINS - 1e-9)
    edges = np.unique(values[places])
    bins = len(edges) + 1
    asked = np.concatenate(list(served.values()))
    number = psi(np.bincount(np.searchsorted(edges, asked, side="left"), minlength=bins).tolist(),
                 (np.bincount(np.searchsorted(edges, values, side="left"), weights, bins) * len(values)).tolist())
    each = {domain: _ks(prompts, reference[domain]) for domain, prompts in sorted(served.items())}
    p = _fisher(list(each.values()))
    middle, usual = float(np.median(asked)), float(values[np.searchsorted(np.cumsum(weights), 0.5 - 1e-9)])
    shifted = number >= psi_limit and p < ALPHA
    reason = (f"{WORDS[name]}: median {middle:.3f}, validation {usual:.3f}; PSI {number:.2f}"
              f"{_against(number, psi_limit)}, Kolmogorov-Smirnov p {p:.2g}"
              + ("" if p < ALPHA else f" (certain below {ALPHA:g})"))
    return Measure(name=name, verdict="shifted" if shifted else "stable", number=number, threshold=psi_limit, p=p,
                   reason=reason, detail={"prompts": count, "validation_rows": len(values), "median": middle,
                                          "validation_median": usual, "p_by_domain": each})


def by_domain(name: Literal["score", "confidence"], rows: Sequence[RoutedPrompt]) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row.domain, []).append(getattr(row, name))
    return {domain: np.array(values) for domain, values in found.items()}


def abstention(traffic: Sequence[RoutedPrompt], validation: Sequence[RoutedPrompt], *, least: int) -> Measure:
    """The share of prompts that the router left to the base: shifted where the exact (Clopper-Pearson) intervals of
    traffic and of validation do not meet."""
    if len(traffic) < least or not validation:
        return Measure(name="abstention", verdict="not enough data", reason=_too_few("abstention", len(traffic), least))
    (share, low, high), (usual, floor, ceiling) = (_share(rows) for rows in (traffic, validation))
    shifted = low > ceiling or high < floor
    reason = (f"{WORDS['abstention']}: {share:.1%} (between {low:.1%} and {high:.1%}), validation {usual:.1%} "
              f"(between {floor:.1%} and {ceiling:.1%})")
    return Measure(name="abstention", verdict="shifted" if shifted else "stable", number=share, threshold=ceiling,
                   reason=reason, detail={"interval": [low, high], "validation": usual,
                                          "validation_interval": [floor, ceiling], "prompts": len(traffic)})


def domains(traffic: Sequence[RoutedPrompt], validation: Sequence[RoutedPrompt], *, least: int,
            psi_limit: float) -> Measure:
    """The shares of the domains, in the newer half of the prompts against the older.

    Against validation there is no verdict, only a number: its shares are the corpora's sizes, which prompts need not
    follow.
    """
    if len(traffic) < 2 * least:
        if len(traffic) < least or not validation:
            return Measure(name="domains", verdict="not enough data", threshold=psi_limit,
                           reason=_too_few("domains", len(traffic), 2 * least))
        _, first, second = _table(traffic, validation)
        number = psi(first, second)
        return Measure(name="domains", verdict="not enough data", number=number, threshold=psi_limit,
                       reason=f"{WORDS['domains']}: {len(traffic)} prompts are no two windows of {least}; against the "
                              f"corpora's own shares, which prompts need not have, PSI {number:.2f}",
                       detail={"against": "validation"})
    older, newer = traffic[:len(traffic) // 2], traffic[len(traffic) // 2:]
    names, first, second = _table(older, newer)
    number, p = psi(first, second), _chi_square(first, second)
    shifted = number >= psi_limit and p < ALPHA
    most = max(range(len(names)), key=lambda place: abs(second[place] / len(newer) - first[place] / len(older)))
    reason = (f"{WORDS['domains']}: newer against older prompts PSI {number:.2f}{_against(number, psi_limit)}; most in "
              f"{names[most]}, from {first[most] / len(older):.1%} to {second[most] / len(newer):.1%}")
    return Measure(name="domains", verdict="shifted" if shifted else "stable", number=number, threshold=psi_limit, p=p,
                   reason=reason, detail={"against": "older prompts", "older": dict(zip(names, first, strict=True)),
                                          "newer": dict(zip(names, second, strict=True))})


def _table(first: Sequence[RoutedPrompt], second: Sequence[RoutedPrompt]) -> tuple[list[str], list[int], list[int]]:
    """Numbers of prompts by domain, abstentions apart: names, counts of `first`, counts of `second`."""
    one, other = (Counter(ABSTAINED if row.abstained else row.domain for row in rows) for rows in (first, second))
    names = sorted(one.keys() | other.keys())
    return names, [one[name] for name in names], [other[name] for name in names]


# Tests.

def _ks(first: Any, second: Any) -> float:
    from scipy.stats import ks_2samp

    with warnings.catch_warnings():   # scipy warns when it falls back to the asymptotic distribution
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(ks_2samp(first, second).pvalue)


def _fisher(chances: list[float]) -> float:
    """Fisher's combination of independent p-values (Fisher 1925); valid for conservative tests."""
    from scipy.stats import chi2

    logs = sum(math.log(max(p, 1e-300)) for p in chances)
    return float(chi2.sf(-2 * logs, 2 * len(chances)))


def _chi_square(first: Sequence[int], second: Sequence[int]) -> float:
    """P-value of the chi-square test of equal shares; rare columns are merged until each expects `EXPECTED` or more."""
    from scipy.stats import chi2_contingency

    least = min(sum(first), sum(second)) / (sum(first) + sum(second))
    columns = [pair for pair in zip(first, second, strict=True) if sum(pair) * least >= EXPECTED]
    rare = [pair for pair in zip(first, second, strict=True) if sum(pair) * least < EXPECTED]
    if (together := [sum(column) for column in zip(*rare, strict=True)]) and sum(together) * least >= EXPECTED:
        columns.append((together[0], together[1]))
    if len(columns) < 2:
        return 1.0
    return float(chi2_contingency(np.array(columns).T, correction=False).pvalue)


def _share(rows: Sequence[RoutedPrompt]) -> tuple[float, float, float]:
    """The share that abstained, with its exact interval."""
    from scipy.stats import binomtest

    count = sum(row.abstained for row in rows)
    low, high = binomtest(count, len(rows)).proportion_ci(confidence_level=1 - ALPHA, method="exact")
    return count / len(rows), float(low), float(high)


# Words.

def _too_few(name: str, count: int, least: int) -> str:
    return f"{WORDS[name]}: {count} prompts, and a verdict needs {least}"


def _against(number: float, limit: float) -> str:
    return f" (a shift from {limit:g} on)" if number < limit else f" (at least {limit:g})"


def overall(found: Sequence[Measure]) -> Verdict:
    """Shifted if any measure is; else stable if any could be judged."""
    verdicts = {measure.verdict for measure in found}
    return next((verdict for verdict in VERDICTS if verdict in verdicts), "not enough data")


MOST = 0.95   # of a known domain's prompts: those farther out would join no group of their own domain, either
SHOWN = 3     # examples of a group


def unit(vectors_ND: Any) -> Any:
    """The vectors scaled to length one: (N, D), float64."""
    vectors = np.asarray(vectors_ND, dtype=np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def reach(unit_ND: Any) -> float:
    """The `MOST` quantile of each prompt's mean distance from the others; NaN for fewer than two prompts."""
    count = len(unit_ND)
    if count < 2:
        return float("nan")
    mean_N = 1 - (unit_ND @ unit_ND.sum(0) - 1) / (count - 1)
    return float(np.quantile(mean_N, MOST))


def widest(domains: Iterable[Any]) -> float | None:
    """The largest `reach` of the known domains; None when no domain has two prompts."""
    reaches = [each for each in map(reach, domains) if not math.isnan(each)]
    return max(reaches, default=None)


def groups(unit_ND: Any, width: float, least: int) -> list[list[int]]:
    """Groups of at least `least` prompts, the largest first; a group is the sorted indices of its prompts."""
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
    """Indices of the prompts nearest to a group's mean."""
    inside = unit_ND[group]
    closeness = inside @ inside.mean(0)
    return [group[place] for place in np.argsort(-closeness, kind="stable")[:count]]
