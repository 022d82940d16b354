"""Statistics of drift: tests whether prompts resemble a release's validation rows, and groups prompts. Pure functions.

A shift is reported only if it is both large (population stability index) and statistically significant. The tests share
a level of FALSE_ALARMS by Bonferroni's correction, so unchanged traffic is called shifted in at most that share of all
checks, however few the prompts.

`groups` clusters the prompts that the router left to the base by average linkage. The distance of two prompts is one
minus the cosine of the standardised features that the router reads, as in `moa.mixture.router.nearest`. Two groups are
merged while the mean distance between their prompts is at most the width of a known domain (`widest`).

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
VERDICTS: tuple[Verdict, ...] = ("shifted", "stable", "not enough data")   # the first of these that occurs is overall
FALSE_ALARMS = 0.05   # share of checks of unchanged traffic that may report a shift
MEASURES = ("score", "confidence", "abstention", "domains")
ALPHA = FALSE_ALARMS / len(MEASURES)   # level of significance of each test
BINS = 10        # of the histograms: deciles of the validation rows
EXPECTED = 5     # fewest expected prompts of a column of the chi-square test; rarer domains are merged
ABSTAINED = "abstained"   # name of the abstained prompts in the domains' shares
WORDS = {"score": "the prompts' similarity to known domains", "confidence": "the router's confidence",
         "abstention": "the share left to the base", "domains": "the shares of the domains"}


@dataclass(frozen=True, kw_only=True)
class RoutedPrompt:
    """The router's decision on one prompt."""

    domain: str          # best guess
    score: float         # how much the prompt resembles the training prompts; below a threshold the router abstains
    confidence: float    # calibrated probability of the domain
    abstained: bool      # whether the router left the prompt to the base


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure of drift, with its verdict."""

    name: str                        # one of MEASURES
    verdict: Verdict
    reason: str                      # a sentence for people
    number: float | None = None      # population stability index; for abstention, the share of abstained prompts
    threshold: float | None = None   # value of `number` from which a shift is reported
    p: float | None = None           # p-value of the test, where there is one
    detail: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The measure as a JSON value."""
        return asdict(self)


def measures(traffic: Sequence[RoutedPrompt], validation: Sequence[RoutedPrompt], *, window: int, least: int,
             psi_limit: float) -> list[Measure]:
    """Measure the drift of prompts against validation rows: all of MEASURES, in their order.

    Args:
        traffic: prompts in the order of time, oldest first; the newest `window` are compared.
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

    The index is symmetric and never negative. Half a row of the smaller histogram is added to every bin of both, so
    that an empty bin does not make the index infinite.

    Args:
        first: counts by bin.
        second: counts by bin, over the same bins.

    Returns:
        The index; NaN when one of the histograms is empty.
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
    """Measure the shift of the router's score or confidence, independently of the domains' shares of the prompts.

    Domains differ in these numbers, and their shares of the prompts differ from their shares of the validation rows. So
    the validation rows are weighted to the domains' shares of the prompts for the index, and the test compares prompts
    and validation rows of each domain: two-sample Kolmogorov-Smirnov tests, combined by Fisher's method. Both tests are
    conservative.

    Args:
        name: the number, a field of RoutedPrompt.
        least: fewest prompts for a verdict.
        psi_limit: population stability index from which a shift is reported.
    """
    reference = by_domain(name, validation)
    served = {domain: values for domain, values in by_domain(name, traffic).items() if domain in reference}
    count = sum(map(len, served.values()))
    if count < least:
        return Measure(name=name, verdict="not enough data", threshold=psi_limit, reason=_too_few(name, count, least))
    values = np.concatenate([reference[domain] for domain in served])
    weights = np.concatenate([np.full(len(reference[domain]), len(prompts) / len(reference[domain]) / count)
                              for domain, prompts in served.items()])
    order = np.argsort(values, kind="stable")
    values, weights = values[order], weights[order]
    deciles = np.searchsorted(np.cumsum(weights), np.arange(1, BINS) / BINS - 1e-9)
    edges = np.unique(values[deciles])
    bins = len(edges) + 1
    traffic_values = np.concatenate(list(served.values()))
    number = psi(np.bincount(np.searchsorted(edges, traffic_values, side="left"), minlength=bins).tolist(),
                 (np.bincount(np.searchsorted(edges, values, side="left"), weights, bins) * len(values)).tolist())
    p_by_domain = {domain: _ks(prompts, reference[domain]) for domain, prompts in sorted(served.items())}
    p = _fisher(list(p_by_domain.values()))
    median = float(np.median(traffic_values))
    validation_median = float(values[np.searchsorted(np.cumsum(weights), 0.5 - 1e-9)])
    shifted = number >= psi_limit and p < ALPHA
    reason = (f"{WORDS[name]}: median {median:.3f}, validation {validation_median:.3f}; PSI {number:.2f}"
              f"{_against(number, psi_limit)}, Kolmogorov-Smirnov p {p:.2g}"
              + ("" if p < ALPHA else f" (significant below {ALPHA:g})"))
    return Measure(name=name, verdict="shifted" if shifted else "stable", number=number, threshold=psi_limit, p=p,
                   reason=reason, detail={"prompts": count, "validation_rows": len(values), "median": median,
                                          "validation_median": validation_median, "p_by_domain": p_by_domain})


def by_domain(name: Literal["score", "confidence"], rows: Sequence[RoutedPrompt]) -> dict[str, Any]:
    """The field `name` of the rows as one array for each domain: (N of the domain,)."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row.domain, []).append(getattr(row, name))
    return {domain: np.array(numbers) for domain, numbers in values.items()}


def abstention(traffic: Sequence[RoutedPrompt], validation: Sequence[RoutedPrompt], *, least: int) -> Measure:
    """Measure the shift of the share of prompts that the router left to the base.

    The share is shifted where the exact (Clopper-Pearson) intervals of traffic and validation do not overlap. `least`
    is the fewest prompts for a verdict.
    """
    if len(traffic) < least or not validation:
        return Measure(name="abstention", verdict="not enough data", reason=_too_few("abstention", len(traffic), least))
    (share, low, high), (validation_share, floor, ceiling) = (_share(rows) for rows in (traffic, validation))
    shifted = low > ceiling or high < floor
    reason = (f"{WORDS['abstention']}: {share:.1%} (between {low:.1%} and {high:.1%}), validation "
              f"{validation_share:.1%} (between {floor:.1%} and {ceiling:.1%})")
    return Measure(name="abstention", verdict="shifted" if shifted else "stable", number=share, threshold=ceiling,
                   reason=reason, detail={"interval": [low, high], "validation": validation_share,
                                          "validation_interval": [floor, ceiling], "prompts": len(traffic)})


def domains(traffic: Sequence[RoutedPrompt], validation: Sequence[RoutedPrompt], *, least: int,
            psi_limit: float) -> Measure:
    """Measure the shift of the domains' shares of the prompts, between the older and the newer half of `traffic`.

    With fewer than twice `least` prompts, the index against `validation` is given without a verdict: the domains'
    shares of validation rows are the sizes of their corpora, which prompts need not follow.

    Args:
        traffic: prompts in the order of time, oldest first.
        least: fewest prompts of each half for a verdict.
        psi_limit: population stability index from which a shift is reported.
    """
    if len(traffic) < 2 * least:
        if len(traffic) < least or not validation:
            return Measure(name="domains", verdict="not enough data", threshold=psi_limit,
                           reason=_too_few("domains", len(traffic), 2 * least))
        _, first, second = _counts(traffic, validation)
        number = psi(first, second)
        return Measure(name="domains", verdict="not enough data", number=number, threshold=psi_limit,
                       reason=f"{WORDS['domains']}: {len(traffic)} prompts are no two windows of {least}; against the "
                              f"corpora's own shares, which prompts need not have, PSI {number:.2f}",
                       detail={"against": "validation"})
    older, newer = traffic[:len(traffic) // 2], traffic[len(traffic) // 2:]
    names, first, second = _counts(older, newer)
    number, p = psi(first, second), _chi_square(first, second)
    shifted = number >= psi_limit and p < ALPHA
    most = max(range(len(names)), key=lambda column: abs(second[column] / len(newer) - first[column] / len(older)))
    reason = (f"{WORDS['domains']}: newer against older prompts PSI {number:.2f}{_against(number, psi_limit)}; most in "
              f"{names[most]}, from {first[most] / len(older):.1%} to {second[most] / len(newer):.1%}")
    return Measure(name="domains", verdict="shifted" if shifted else "stable", number=number, threshold=psi_limit, p=p,
                   reason=reason, detail={"against": "older prompts", "older": dict(zip(names, first, strict=True)),
                                          "newer": dict(zip(names, second, strict=True))})


def _counts(first: Sequence[RoutedPrompt], second: Sequence[RoutedPrompt]) -> tuple[list[str], list[int], list[int]]:
    """Counts of prompts by domain; abstained prompts count as one more domain.

    Returns names, counts of `first` and counts of `second`.
    """
    first_counts, second_counts = (Counter(ABSTAINED if row.abstained else row.domain for row in rows)
                                   for rows in (first, second))
    names = sorted(first_counts.keys() | second_counts.keys())
    return names, [first_counts[name] for name in names], [second_counts[name] for name in names]


# Tests.

def _ks(first: Any, second: Any) -> float:
    """P-value of the two-sample Kolmogorov-Smirnov test."""
    from scipy.stats import ks_2samp

    with warnings.catch_warnings():   # scipy warns when it falls back to the asymptotic distribution
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(ks_2samp(first, second).pvalue)


def _fisher(p_values: list[float]) -> float:
    """Combine independent p-values by Fisher's method (Fisher, Statistical Methods for Research Workers, 1925).

    The combination is valid for conservative tests, too.
    """
    from scipy.stats import chi2

    logs = sum(math.log(max(p, 1e-300)) for p in p_values)
    return float(chi2.sf(-2 * logs, 2 * len(p_values)))


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
    """The share of abstained prompts, and the ends of its exact interval of level 1 - ALPHA."""
    from scipy.stats import binomtest

    count = sum(row.abstained for row in rows)
    low, high = binomtest(count, len(rows)).proportion_ci(confidence_level=1 - ALPHA, method="exact")
    return count / len(rows), float(low), float(high)


# Sentences and verdicts.

def _too_few(name: str, count: int, least: int) -> str:
    return f"{WORDS[name]}: {count} prompts, and a verdict needs {least}"


def _against(number: float, limit: float) -> str:
    return f" (a shift from {limit:g} on)" if number < limit else f" (at least {limit:g})"


def overall(judged: Sequence[Measure]) -> Verdict:
    """The verdict over several measures: shifted if any is shifted, else stable if any is stable."""
    verdicts = {measure.verdict for measure in judged}
    return next((verdict for verdict in VERDICTS if verdict in verdicts), "not enough data")


# Groups of prompts.

MOST = 0.95   # share of a domain's prompts that its width covers, so that outliers do not widen it
SHOWN = 3     # examples of a group in the report


def unit(vectors_ND: Any) -> Any:
    """Scale N vectors to length one: (N, D), float64."""
    vectors = np.asarray(vectors_ND, dtype=np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def reach(unit_ND: Any) -> float:
    """The width of a domain: the MOST quantile of its prompts' mean distances from the others.

    `unit_ND` holds vectors of length one. The result is NaN for fewer than two prompts.
    """
    count = len(unit_ND)
    if count < 2:
        return float("nan")
    mean_N = 1 - (unit_ND @ unit_ND.sum(0) - 1) / (count - 1)
    return float(np.quantile(mean_N, MOST))


def widest(domains: Iterable[Any]) -> float | None:
    """The largest `reach` of several domains, each as (N, D) vectors of length one; None if none has two prompts."""
    reaches = [width for width in map(reach, domains) if not math.isnan(width)]
    return max(reaches, default=None)


def groups(unit_ND: Any, width: float, least: int) -> list[list[int]]:
    """Cluster prompts by average linkage of cosine distances.

    Args:
        unit_ND: vectors of length one.
        width: two groups are merged while the mean distance between their prompts is at most this.
        least: fewest prompts of a group.

    Returns:
        The groups, the largest first; a group is the sorted indices of its prompts.
    """
    if len(unit_ND) < max(least, 2):
        return []
    from sklearn.cluster import AgglomerativeClustering

    labels = AgglomerativeClustering(n_clusters=None, distance_threshold=width, metric="cosine", linkage="average"
                                     ).fit_predict(unit_ND)
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(index)
    return sorted((group for group in members.values() if len(group) >= least),
                  key=lambda group: (-len(group), group[0]))


def typical(unit_ND: Any, group: list[int], count: int = SHOWN) -> list[int]:
    """Indices of the `count` prompts of a group that are nearest to its mean, the nearest first."""
    group_GD = unit_ND[group]
    similarity_G = group_GD @ group_GD.mean(0)
    return [group[position] for position in np.argsort(-similarity_G, kind="stable")[:count]]
