"""Two releases on the same rows, to a verdict per domain and one decision. Pure: no files, no MLflow.

A domain is compared by the mean of its paired differences, challenger minus incumbent, twice: `loss`, in nats per
completion token, and `metric`, the domain's own score (0 to 1) of the rows that both answered. Each end of an interval
is the further one of two bootstraps (Hesterberg 2015, "What Teachers Should Know About the Bootstrap"): the percentile
interval, expanded because it is too short on few rows (section 5.3), and bootstrap t, which knows of skew (5.5).

Loss is the sharper measure, so it must show that a domain is no worse. Scores, most of them 0 or 1 on few rows, seldom
could: they refuse where they show that a domain is worse, and where they cannot tell they say so.

Not covered: rows that depend on each other, and the choice of a challenger after many were gated on the same rows.
"""

import math
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

Verdict = Literal["pass", "fail", "not enough data"]
Against = Literal["incumbent", "base"]
CHUNK = 1 << 22   # resampled values held at once


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a challenger may do: `release` in params.yaml."""

    tolerance: float = 0.02          # largest rise of a domain's mean loss, in nats
    min_gain: float = 0.001          # a fall of less than this is no improvement, however certain: rounding is certain
    metric_tolerance: float = 0.05   # largest fall of a domain's mean score
    min_rows: int = 20               # fewest paired rows for a verdict
    confidence: float = 0.95         # of the two-sided interval
    accuracy_drop: float = 0.02      # routing accuracy may be this much below the incumbent's
    abstention_rise: float = 0.05    # share of abstentions may be this much above the incumbent's
    resamples: int = 10_000
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """One test row: mean loss per completion token, and score of the answer; None where a system has none."""

    domain: str
    row: str
    challenger: float | None
    incumbent: float | None
    base: float | None = None
    challenger_score: float | None = None
    incumbent_score: float | None = None
    base_score: float | None = None


@dataclass(frozen=True)
class Comparison:
    """`point` and `interval` are the mean difference, challenger minus the other; None where unknown."""

    verdict: Verdict
    reason: str
    rows: int                                     # compared
    unmatched: int = 0                            # left out, for want of a partner
    point: float | None = None
    interval: tuple[float, float] | None = None   # at Rules.confidence: decides `verdict`
    improved: bool = False                        # at a confidence corrected for the number of comparisons


@dataclass(frozen=True)
class DomainVerdict:
    """What the two comparisons of a domain come to; `metric` is None where nobody scored an answer."""

    verdict: Verdict
    reason: str
    against: Against
    improved: bool
    loss: Comparison
    metric: Comparison | None = None


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
    chances = len(rows) + sum(any(one.challenger_score is not None for one in each.values()) for each in rows.values())
    verdicts = {domain: judge(domain, rows[domain].values(), rules, chances=chances, new=domain not in incumbent)
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


def judge(domain: str, scores: Iterable[Score], rules: Rules, *, chances: int = 1, new: bool = False) -> DomainVerdict:
    """The verdict on one domain; `chances` is how many comparisons the challenger may look better in by luck.

    The domain fails when either comparison does, and passes when its loss does; a metric that cannot tell is no bar.
    """
    against: Against = "base" if new else "incumbent"
    everything = sorted(scores, key=lambda score: score.row)   # the order of arrival must not matter
    loss = _loss(domain, [(one.challenger, one.base if new else one.incumbent) for one in everything], rules, chances,
                 against)
    scored = [(one.challenger_score, one.base_score if new else one.incumbent_score) for one in everything]
    metric = (None if all(mine is None for mine, _ in scored)
              else _metric(domain, [pair for pair in scored if pair != (None, None)], rules, chances, against))
    if metric is not None and metric.verdict == "fail":
        reason = metric.reason if loss.verdict == "pass" else f"{loss.reason}, and {metric.reason}"
        return DomainVerdict("fail", reason, against, False, loss, metric)
    improved = loss.verdict == "pass" and (loss.improved or (metric is not None and metric.improved))
    return DomainVerdict(loss.verdict, loss.reason, against, improved, loss, metric)


Pairs = Sequence[tuple[float | None, float | None]]   # challenger, other


def _loss(domain: str, scores: Pairs, rules: Rules, chances: int, against: Against) -> Comparison:
    pairs = [(mine, other) for mine, other in scores
             if mine is not None and other is not None and math.isfinite(other)]
    count, unmatched = len(pairs), len(scores) - len(pairs)
    if broken := sum(not math.isfinite(mine) for mine, _ in pairs):
        return Comparison("fail", f"{broken} of {count} rows have no finite loss", count, unmatched)
    if count < rules.min_rows:
        return Comparison("not enough data", f"{count} rows to compare, {rules.min_rows} are needed", count, unmatched)
    point, (low, high), (_, sure) = _intervals(domain, "loss", pairs, rules, chances)
    improved = point < 0 and sure < -rules.min_gain
    numbers = f"loss {point:+.4f} nats against the {against} on {count} rows, interval {low:+.4f} to {high:+.4f}"
    if high <= rules.tolerance:
        return Comparison("pass", numbers, count, unmatched, point, (low, high), improved)
    what = "worse" if low > 0 else "may be worse"
    return Comparison("fail", f"{what} than the tolerance of {rules.tolerance:g} allows: {numbers}",
                      count, unmatched, point, (low, high))


def _metric(domain: str, scores: Pairs, rules: Rules, chances: int, against: Against) -> Comparison:
    pairs = [(mine, other) for mine, other in scores if mine is not None and other is not None]
    count, unmatched = len(pairs), len(scores) - len(pairs)
    if count < rules.min_rows:
        return Comparison("not enough data", f"{count} answers to compare, {rules.min_rows} are needed",
                          count, unmatched)
    point, (low, high), (sure, _) = _intervals(domain, "metric", pairs, rules, chances)
    wins, losses = sum(mine > other for mine, other in pairs), sum(mine < other for mine, other in pairs)
    # Where few answers differ the bootstrap is too sure of itself; the sign test is exact there.
    share = (1 - rules.confidence) / 2
    improved = sure > 0 and _sign_test(wins, losses) <= share / chances
    numbers = f"score {point:+.3f} against the {against} on {count} answers, interval {low:+.3f} to {high:+.3f}"
    if low >= -rules.metric_tolerance:
        return Comparison("pass", numbers, count, unmatched, point, (low, high), improved)
    if high < 0 and _sign_test(losses, wins) <= share:
        return Comparison("fail", f"worse than the tolerance of {rules.metric_tolerance:g} allows: {numbers}",
                          count, unmatched, point, (low, high))
    return Comparison("not enough data", f"cannot tell whether within {rules.metric_tolerance:g}: {numbers}",
                      count, unmatched, point, (low, high), improved)


def _intervals(domain: str, measure: str, pairs: Pairs, rules: Rules,
               chances: int) -> tuple[float, tuple[float, float], tuple[float, float]]:
    """Mean paired difference, its interval, and the wider one that makes up for `chances` comparisons (Bonferroni)."""
    values = np.array([float(mine or 0) - float(other or 0) for mine, other in pairs])
    means, spreads = _resampled(values, rules.resamples, [rules.seed, zlib.crc32(f"{domain} {measure}".encode())])
    share = (1 - rules.confidence) / 2
    one, all_ = (_interval(values, means, spreads, tail) for tail in (share, share / chances))
    return float(values.mean()), one, all_


def _resampled(values: np.ndarray, resamples: int, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of `resamples` draws with replacement, (resamples,) each."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // len(values))
    means, spreads = [], []
    for done in range(0, resamples, step):
        drawn = values[rng.integers(len(values), size=(min(step, resamples - done), len(values)))]
        means.append(drawn.mean(axis=1))
        spreads.append(drawn.std(axis=1))
    return np.concatenate(means), np.concatenate(spreads)


def _interval(values: np.ndarray, means: np.ndarray, spreads: np.ndarray, share: float) -> tuple[float, float]:
    """The interval that leaves `share` out at each end.

    Bootstrap t is left out where too many draws have no spread: most differences are 0 then, as between releases that
    share an expert.
    """
    tail = _tail(share, len(values))
    low, high = np.quantile(means, [tail, 1 - tail])
    mean, spread = values.mean(), values.std()
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num((means - mean) / spreads, nan=0.0, posinf=np.inf, neginf=-np.inf)
    lowest, highest = (np.quantile(t, end, method="nearest") for end in (share, 1 - share))
    if np.isfinite(highest):
        low = min(low, mean - highest * spread)
    if np.isfinite(lowest):
        high = max(high, mean - lowest * spread)
    return float(low), float(high)


def _tail(share: float, count: int) -> float:
    """Tail of the bootstrap distribution that stands for `share`, expanded for few rows.

    Hesterberg 2015: Phi(-sqrt(n / (n - 1)) * t_{share, n - 1}); the t quantile by its expansion in 1 / degrees of
    freedom (Abramowitz and Stegun 26.7.5), right to three digits from five rows on.
    """
    z, v = NormalDist().inv_cdf(1 - share), count - 1
    t = (z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
         + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3))
    return NormalDist().cdf(-t * math.sqrt(count / v))


def _sign_test(for_it: int, against_it: int) -> float:
    """Chance of at least `for_it` heads among all these tosses of a fair coin."""
    tosses = for_it + against_it
    return sum(math.comb(tosses, heads) for heads in range(for_it, tosses + 1)) / 2**tosses


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
