"""Per-row losses of two releases on the same rows, to a verdict per domain and one decision. Pure: no files, no MLflow.

A domain is compared by the mean of its paired differences, challenger minus incumbent, in nats per completion token;
below zero the challenger is better. Intervals are expanded percentile bootstraps (Hesterberg 2015, "What Teachers
Should Know About the Bootstrap", section 5.3): the plain percentile interval is too short on few rows.

Not covered: rows that depend on each other, and the choice of a challenger after many were gated on the same rows.
"""

import math
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

Verdict = Literal["pass", "fail", "not enough data"]
CHUNK = 1 << 22   # resampled values held at once


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a challenger may do; the first four come from `release` in params.yaml."""

    tolerance: float = 0.02          # largest rise of a domain's mean loss, in nats
    min_gain: float = 0.001          # a fall of less than this is no improvement, however certain: rounding is certain
    min_rows: int = 20               # fewest paired rows for a verdict
    confidence: float = 0.95         # of the two-sided interval
    accuracy_drop: float = 0.02      # routing accuracy may be this much below the incumbent's
    abstention_rise: float = 0.05    # share of abstentions may be this much above the incumbent's
    resamples: int = 10_000
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """Mean loss per completion token of one test row; None where that system did not answer it."""

    domain: str
    row: str
    challenger: float | None
    incumbent: float | None
    base: float | None = None


@dataclass(frozen=True)
class DomainVerdict:
    """`point` and `interval` are the mean difference, challenger minus `against`; NaN-free, None where unknown."""

    verdict: Verdict
    reason: str
    against: Literal["incumbent", "base"]
    rows: int                                     # compared
    unmatched: int                                # left out, for want of a partner
    point: float | None = None
    interval: tuple[float, float] | None = None   # at Rules.confidence: decides `verdict`
    improved: bool = False                        # at a confidence corrected for the number of domains


@dataclass(frozen=True)
class Decision:
    promote: bool
    reason: str
    domains: dict[str, DomainVerdict] = field(default_factory=dict)
    improved: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)      # domains of the incumbent that the challenger lacks
    routing: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def decide(scores: Iterable[Score], rules: Rules, *, incumbent: Collection[str], challenger: Collection[str],
           routing: Mapping[str, Mapping[str, float]] | None = None) -> Decision:
    """Whether the challenger may take the incumbent's place.

    `incumbent` and `challenger` are the domains each release has an expert for: a domain the incumbent lacks is
    compared with the base. `routing` holds `accuracy` and `abstention` of both, under "incumbent" and "challenger".
    Promoted is only who is worse in no domain, has rows enough to show it in each, routes within the bounds, and is
    really better in at least one domain.
    """
    rows: dict[str, dict[str, Score]] = {domain: {} for domain in challenger}
    for score in scores:
        if score.domain in rows:
            rows[score.domain][score.row] = score
    verdicts = {domain: judge(domain, rows[domain].values(), rules, domains=len(rows), new=domain not in incumbent)
                for domain in sorted(rows)}
    improved = [domain for domain, verdict in verdicts.items() if verdict.improved]
    removed = sorted(set(incumbent) - set(challenger))
    objections = [f"{domain}: {verdict.reason}" for domain, verdict in verdicts.items() if verdict.verdict != "pass"]
    objections += _routing_objections(routing or {}, rules)
    if objections:
        promote, reason = False, "; ".join(objections)
    elif improved:
        promote, reason = True, f"No domain is worse; better: {', '.join(improved)}"
    else:
        promote, reason = False, "No domain is worse, but none is really better either"
    if removed:
        reason += f"; removed: {', '.join(removed)}"
    return Decision(promote, f"{reason}.", verdicts, improved, removed,
                    {who: dict(values) for who, values in (routing or {}).items()})


def judge(domain: str, scores: Iterable[Score], rules: Rules, *, domains: int = 1, new: bool = False) -> DomainVerdict:
    """The verdict on one domain; `domains` is how many chances the challenger has to look better by luck."""
    against: Literal["incumbent", "base"] = "base" if new else "incumbent"
    everything = sorted(scores, key=lambda score: score.row)   # the order of arrival must not matter
    pairs = [(score.challenger, other) for score in everything
             if score.challenger is not None
             and (other := score.base if new else score.incumbent) is not None and math.isfinite(other)]
    count, unmatched = len(pairs), len(everything) - len(pairs)
    if broken := sum(not math.isfinite(mine) for mine, _ in pairs):
        return DomainVerdict("fail", f"{broken} of {count} rows have no finite loss", against, count, unmatched)
    if count < rules.min_rows:
        return DomainVerdict("not enough data", f"{count} rows to compare, {rules.min_rows} are needed",
                             against, count, unmatched)
    differences = np.array([mine - other for mine, other in pairs])
    means = _resampled_means(differences, rules.resamples, [rules.seed, zlib.crc32(domain.encode())])
    point = float(differences.mean())
    tail = _tail((1 - rules.confidence) / 2, count)
    low, high = (float(bound) for bound in np.quantile(means, [tail, 1 - tail]))
    luck = _tail((1 - rules.confidence) / (2 * domains), count)   # Bonferroni
    improved = point < 0 and float(np.quantile(means, 1 - luck)) < -rules.min_gain
    numbers = f"{point:+.4f} nats against the {against} on {count} rows, interval {low:+.4f} to {high:+.4f}"
    if high <= rules.tolerance:
        return DomainVerdict("pass", numbers, against, count, unmatched, point, (low, high), improved)
    what = "worse" if low > 0 else "may be worse"
    return DomainVerdict("fail", f"{what} than the tolerance of {rules.tolerance:g} allows: {numbers}",
                         against, count, unmatched, point, (low, high))


def _resampled_means(values: np.ndarray, resamples: int, seed: list[int]) -> np.ndarray:
    """Means of `resamples` draws with replacement, (resamples,)."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // len(values))
    parts = [values[rng.integers(len(values), size=(min(step, resamples - done), len(values)))].mean(axis=1)
             for done in range(0, resamples, step)]
    return np.concatenate(parts)


def _tail(share: float, count: int) -> float:
    """Tail of the bootstrap distribution that stands for `share`, expanded for few rows.

    Hesterberg 2015: Phi(-sqrt(n / (n - 1)) * t_{share, n - 1}); the t quantile by its expansion in 1 / degrees of
    freedom (Abramowitz and Stegun 26.7.5), right to three digits from five rows on.
    """
    z, v = NormalDist().inv_cdf(1 - share), count - 1
    t = (z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
         + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3))
    return NormalDist().cdf(-t * math.sqrt(count / v))


def _routing_objections(routing: Mapping[str, Mapping[str, float]], rules: Rules) -> list[str]:
    before, after = routing.get("incumbent", {}), routing.get("challenger", {})
    objections = []
    if ("accuracy" in before and "accuracy" in after
            and not after["accuracy"] >= before["accuracy"] - rules.accuracy_drop):
        objections.append(f"routing accuracy fell from {before['accuracy']:.1%} to {after['accuracy']:.1%}")
    if ("abstention" in before and "abstention" in after
            and not after["abstention"] <= before["abstention"] + rules.abstention_rise):
        objections.append(f"abstentions rose from {before['abstention']:.1%} to {after['abstention']:.1%}")
    return objections
