"""Scores of two releases on the same rows in, a verdict for each domain and one decision out. Pure functions.

A domain is compared by the mean of its paired differences, challenger minus incumbent, twice: `loss`, in nats per
completion token, and `metric`, the domain's own score (0 to 1) of the rows that both answered. The intervals are
bootstrapped (moa/evaluation/statistics.py).

Loss is the sharper measure, so it must show that a domain is no worse. Scores are mostly 0 or 1 on few rows and can
seldom show that: they refuse where they show that a domain is worse, and otherwise report that they cannot tell.

New data of an old domain brings test rows of its own. If the data is poisoned, so are these test rows, and an expert
that learned the poison looks better on them. So the rows that the incumbent's release was tested on (`Score.known`) are
also judged by themselves, and a domain that fails on them fails. They can only refuse: an improvement is judged on all
rows. The routing of a domain's known prompts is judged by the sign test. New rows that mostly go to another domain,
where the known ones do not, are refused as rows of that domain.

Not covered: rows that depend on each other, and the choice of a challenger after many were gated on the same rows.
"""

import math
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from moa.core.config import ReleaseParams
from moa.evaluation.statistics import RoutingChanges, exact_test, interval, resampled, routing_changes, sign_test

Verdict = Literal["pass", "fail", "not enough data"]
Against = Literal["incumbent", "base"]
Pairs = Sequence[tuple[float | None, float | None]]   # challenger, other


MIN_GAIN = 0.001     # nats; a fall of less than this is no improvement, however certain: rounding is certain
RESAMPLES = 10_000   # of each bootstrap
SEED = 0             # of the bootstraps


def rules_of(params: ReleaseParams) -> dict[str, float]:
    """Every number that a decision depends on, by name: kept with the decision."""
    return {"tolerance": params.tolerance, "min_gain": MIN_GAIN, "metric_tolerance": params.metric_tolerance,
            "min_rows": params.min_rows, "confidence": params.confidence, "accuracy_drop": params.accuracy_drop,
            "abstention_rise": params.abstention_rise, "resamples": RESAMPLES, "seed": SEED}


@dataclass(frozen=True)
class Score:
    """One test row: mean loss per completion token, score of the answer, and the router's best guess; None where a
    system has none."""

    domain: str
    row: str
    challenger: float | None
    incumbent: float | None
    base: float | None = None
    challenger_score: float | None = None
    incumbent_score: float | None = None
    base_score: float | None = None
    same_answer: bool = False   # both releases give the row to the same expert, so no answer was generated
    known: bool = True          # the incumbent's release was tested on it
    challenger_routed: str | None = None
    incumbent_routed: str | None = None


@dataclass(frozen=True)
class Comparison:
    """One measure of one domain. `point` and `interval` are the mean difference, challenger minus the other system;
    None where unknown."""

    verdict: Verdict
    reason: str
    rows: int                                     # compared
    unmatched: int = 0                            # left out: one of the two systems has no value
    point: float | None = None
    interval: tuple[float, float] | None = None   # at release.confidence: decides `verdict`
    improved: bool = False                        # at a confidence corrected for the number of comparisons


@dataclass(frozen=True)
class Known:
    """The comparisons of a domain on the rows that the incumbent was tested on."""

    loss: Comparison
    metric: Comparison | None = None


@dataclass(frozen=True)
class DomainVerdict:
    """What the comparisons of a domain come to. `metric` is None where no answer was scored, `known` where all rows are
    known or the domain is new."""

    verdict: Verdict
    reason: str
    against: Against
    improved: bool
    loss: Comparison
    metric: Comparison | None = None
    known: Known | None = None
    cause: str | None = None   # of a failure, where it is known


@dataclass(frozen=True)
class Decision:
    """The gate's decision, with the verdicts that it rests on."""

    promote: bool
    reason: str
    domains: dict[str, DomainVerdict] = field(default_factory=dict)
    improved: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)      # domains of the incumbent that the challenger lacks
    routing: dict[str, Any] = field(default_factory=dict)
    worse: list[str] = field(default_factory=list)        # domains that fail, or whose prompts are routed worse
    harm: bool = False                                    # refused as worse, not for want of rows or of a gain

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def decide(scores: Iterable[Score], rules: ReleaseParams, *, incumbent: Collection[str], challenger: Collection[str],
           routing: Mapping[str, Mapping[str, float]] | None = None, tested_by: str = "the incumbent",
           causes: Mapping[str, str] | None = None) -> Decision:
    """Whether the challenger may take the incumbent's place.

    A challenger is promoted only if it is worse in no domain, has enough rows to show that in each, routes within the
    bounds, and is significantly better in at least one domain.

    Args:
        incumbent, challenger: domains that each release has an expert for. A domain that the incumbent lacks is
            compared with the base.
        routing: `accuracy` and `abstention` of each release, under "incumbent" and "challenger".
        tested_by: what reasons call the incumbent's release.
        causes: by domain, why it would be worse.
    """
    rows: dict[str, dict[str, Score]] = {domain: {} for domain in challenger}
    for score in scores:
        if score.domain in rows:
            rows[score.domain][score.row] = score
    chances = len(rows) + sum(any(_scores(one)[0] is not None for one in each.values()) for each in rows.values())
    verdicts = {domain: judge(domain, rows[domain].values(), rules, chances=chances, new=domain not in incumbent,
                              tested_by=tested_by) for domain in sorted(rows)}
    routes = {domain: _routes(domain, rows[domain].values()) for domain in sorted(rows) if domain in incumbent}
    strangers = {domain: _routes(domain, rows[domain].values(), known=False) for domain in routes}
    verdicts |= {domain: replace(each, cause=(causes or {}).get(domain)) for domain, each in verdicts.items()
                 if each.verdict == "fail"}
    improved = [domain for domain, verdict in verdicts.items() if verdict.improved]
    removed = sorted(set(incumbent) - set(challenger))
    objections = [f"{domain}: {verdict.reason}" + (f", because {verdict.cause}" if verdict.cause else "")
                  for domain, verdict in verdicts.items() if verdict.verdict != "pass"]
    strayed = {domain: _strayed(found, strangers[domain], rules, tested_by) for domain, found in routes.items()}
    objections += [each for found in strayed.values() for each in found]
    objections += (lost := _routing_objections(routing or {}, rules))
    worse = [domain for domain, verdict in verdicts.items() if verdict.verdict == "fail" or strayed.get(domain)]
    if objections:
        promote, reason = False, "; ".join(objections)
    elif improved:
        promote, reason = True, f"No domain is worse; better: {', '.join(improved)}"
    else:
        promote, reason = False, "No domain is worse, but none is really better either"
    if removed:
        reason += f"; removed: {', '.join(removed)}"
    return Decision(promote, f"{reason}.", verdicts, improved, removed,
                    {who: dict(values) for who, values in (routing or {}).items()}
                    | ({"domains": {domain: asdict(found) | {"new": strangers[domain].after}
                                    for domain, found in routes.items()}}
                       if any(found.rows for found in routes.values()) else {}), worse, bool(worse or lost))


def judge(domain: str, scores: Iterable[Score], rules: ReleaseParams, *, chances: int = 1, new: bool = False,
          tested_by: str = "the incumbent") -> DomainVerdict:
    """The verdict on one domain.

    The domain fails when either comparison does, on all rows or on the known ones, and passes when its loss does. A
    metric that cannot tell does not refuse, and neither do too few known rows.

    Args:
        chances: number of comparisons of this decision, for the Bonferroni correction of `improved`.
        new: whether the incumbent lacks the domain, so that the base is the other system.
        tested_by: what reasons call the incumbent's release.
    """
    everything = sorted(scores, key=lambda score: score.row)   # so that the order of `scores` does not matter
    verdict = _all_rows(domain, everything, rules, chances, "base" if new else "incumbent")
    known = [one for one in everything if one.known]
    if new or len(known) == len(everything):
        return verdict
    found = _known_rows(domain, known, rules, tested_by)
    reasons = [each.reason for each in (found.loss, found.metric) if each is not None and each.verdict == "fail"]
    if not reasons:
        return replace(verdict, known=found)
    return replace(verdict, verdict="fail", reason=", and ".join(reasons), improved=False, known=found)


def _scores(one: Score, new: bool = False) -> tuple[float | None, float | None]:
    """Scores of the challenger and of the other system; 0 and 0 for the same answer: only the difference counts."""
    if one.same_answer:
        return 0.0, 0.0
    return one.challenger_score, one.base_score if new else one.incumbent_score


def _all_rows(domain: str, scores: Sequence[Score], rules: ReleaseParams, chances: int,
              against: Against) -> DomainVerdict:
    new = against == "base"
    loss = _loss(domain, [(one.challenger, one.base if new else one.incumbent) for one in scores], rules, chances,
                 against)
    metric = _answers(domain, [_scores(one, new) for one in scores], rules, chances, against)
    if metric is not None and metric.verdict == "fail":
        reason = metric.reason if loss.verdict == "pass" else f"{loss.reason}, and {metric.reason}"
        return DomainVerdict("fail", reason, against, False, loss, metric)
    improved = loss.verdict == "pass" and (loss.improved or (metric is not None and metric.improved))
    return DomainVerdict(loss.verdict, loss.reason, against, improved, loss, metric)


def _known_rows(domain: str, known: Sequence[Score], rules: ReleaseParams, tested_by: str) -> Known:
    """Both comparisons on known rows. Fewer than `min_rows` fail where the sign test shows that most are worse by more
    than the tolerance."""
    if not known:
        return Known(Comparison("not enough data", f"none of the test rows that {tested_by} was tested on is left", 0))
    pairs = [(one.challenger, one.incumbent) for one in known]
    loss = _loss(domain, pairs, rules, 1, "incumbent", tested_by)
    if loss.verdict == "not enough data":
        rises = [mine - other for mine, other in pairs if mine is not None and other is not None]
        worse = sum(rise > rules.tolerance for rise in rises)
        if rises and sign_test(worse, len(rises) - worse) <= (1 - rules.confidence) / 2:
            loss = replace(loss, verdict="fail", reason=f"worse than the tolerance of {rules.tolerance:g} allows in "
                                                        f"{worse} answers {_on(loss.rows, 'rows', tested_by)}")
    return Known(loss, _answers(domain, [_scores(one) for one in known], rules, 1, "incumbent", tested_by))


def _answers(domain: str, scores: Pairs, rules: ReleaseParams, chances: int, against: Against,
             tested_by: str | None = None) -> Comparison | None:
    """The metric's comparison of the rows that were answered; None where the challenger answered none."""
    if all(mine is None for mine, _ in scores):
        return None
    return _metric(domain, [pair for pair in scores if pair != (None, None)], rules, chances, against, tested_by)


def _loss(domain: str, scores: Pairs, rules: ReleaseParams, chances: int, against: Against,
          tested_by: str | None = None) -> Comparison:
    pairs = [(mine, other) for mine, other in scores
             if mine is not None and other is not None and math.isfinite(other)]
    count, unmatched = len(pairs), len(scores) - len(pairs)
    if broken := sum(not math.isfinite(mine) for mine, _ in pairs):
        return Comparison("fail", f"{broken} of {count} rows have no finite loss", count, unmatched)
    if count < rules.min_rows:
        return Comparison("not enough data", f"{count} rows to compare, {rules.min_rows} are needed", count, unmatched)
    point, (low, high), (_, sure) = _intervals(domain, "loss", pairs, rules, chances)
    improved = point < 0 and sure < -MIN_GAIN
    numbers = (f"loss {point:+.4f} nats against the {against} {_on(count, 'rows', tested_by)}, interval {low:+.4f} to "
               f"{high:+.4f}")
    if high <= rules.tolerance:
        return Comparison("pass", numbers, count, unmatched, point, (low, high), improved)
    what = "worse" if low > 0 else "may be worse"
    return Comparison("fail", f"{what} than the tolerance of {rules.tolerance:g} allows: {numbers}",
                      count, unmatched, point, (low, high))


def _metric(domain: str, scores: Pairs, rules: ReleaseParams, chances: int, against: Against,
            tested_by: str | None = None) -> Comparison:
    pairs = [(mine, other) for mine, other in scores if mine is not None and other is not None]
    count, unmatched = len(pairs), len(scores) - len(pairs)
    if count < rules.min_rows:
        return Comparison("not enough data", f"{count} answers to compare, {rules.min_rows} are needed",
                          count, unmatched)
    point, (low, high), (sure, _) = _intervals(domain, "metric", pairs, rules, chances)
    wins, losses = sum(mine > other for mine, other in pairs), sum(mine < other for mine, other in pairs)
    # Where few answers differ the bootstrap interval is too narrow; the sign test is exact there.
    share = (1 - rules.confidence) / 2
    improved = sure > 0 and sign_test(wins, losses) <= share / chances
    numbers = (f"score {point:+.3f} against the {against} {_on(count, 'answers', tested_by)}, interval {low:+.3f} to "
               f"{high:+.3f}")
    if low >= -rules.metric_tolerance:
        return Comparison("pass", numbers, count, unmatched, point, (low, high), improved)
    if high < 0 and sign_test(losses, wins) <= share:
        return Comparison("fail", f"worse than the tolerance of {rules.metric_tolerance:g} allows: {numbers}",
                          count, unmatched, point, (low, high))
    return Comparison("not enough data", f"cannot tell whether within {rules.metric_tolerance:g}: {numbers}",
                      count, unmatched, point, (low, high), improved)


def _intervals(domain: str, measure: str, pairs: Pairs, rules: ReleaseParams,
               chances: int) -> tuple[float, tuple[float, float], tuple[float, float]]:
    """Mean paired difference, its interval, and the wider interval corrected for `chances` comparisons (Bonferroni)."""
    values = np.array([float(mine or 0) - float(other or 0) for mine, other in pairs])
    means, spreads = resampled(values, RESAMPLES, [SEED, zlib.crc32(f"{domain} {measure}".encode())])
    share = (1 - rules.confidence) / 2
    one, all_ = (interval(values, means, spreads, tail) for tail in (share, share / chances))
    return float(values.mean()), one, all_


def _on(count: int, what: str, tested_by: str | None) -> str:
    """The rows that a figure is of, in words."""
    if tested_by is None:
        return f"on {count} {what}"
    return f"on the {count} {'test rows' if what == 'rows' else f'{what} to test rows'} that {tested_by} was tested on"


def _routes(domain: str, scores: Iterable[Score], known: bool = True) -> RoutingChanges:
    return routing_changes(domain, [(one.incumbent_routed,
                                     one.challenger_routed) for one in scores if one.known == known
                                    and one.incumbent_routed is not None and one.challenger_routed is not None])


def _strayed(known: RoutingChanges, new: RoutingChanges, rules: ReleaseParams, tested_by: str) -> Iterator[str]:
    """Objections to the routing of a domain's prompts. A few dozen prompts cannot show that a tolerance of a few per
    cent holds, so the challenger is refused only for a fall that is significantly beyond it."""
    share = (1 - rules.confidence) / 2
    if known.fall > rules.accuracy_drop and known.chance <= share:
        yield f"{known.domain}: its routing accuracy fell {known.text}, {_on(known.rows, 'rows', tested_by)}"
    beyond = known.rows and new.rows and new.missed / new.rows - known.missed / known.rows > rules.accuracy_drop
    if beyond and exact_test(new.missed, new.rows, known.missed, known.rows) <= share:
        gone = ", ".join(f"{count} go to {guess}" for guess, count in new.after.items() if guess != new.domain)
        yield (f"{new.domain}: of its {new.rows} new test rows {gone}, as those that {tested_by} was tested on do not: "
               "they may be another domain's")


def _routing_objections(routing: Mapping[str, Mapping[str, float]], rules: ReleaseParams) -> list[str]:
    before, after = routing.get("incumbent", {}), routing.get("challenger", {})
    objections = []
    if ("accuracy" in before and "accuracy" in after
            and not after["accuracy"] >= before["accuracy"] - rules.accuracy_drop):
        objections.append(f"routing accuracy fell from {before['accuracy']:.1%} to {after['accuracy']:.1%}")
    if ("abstention" in before and "abstention" in after
            and not after["abstention"] <= before["abstention"] + rules.abstention_rise):
        objections.append(f"abstentions rose from {before['abstention']:.1%} to {after['abstention']:.1%}")
    return objections
