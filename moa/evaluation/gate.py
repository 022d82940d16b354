"""Scores of two releases on the same rows in, a verdict for each domain and one decision out. Pure functions.

**What is compared.** A domain's difference is challenger minus incumbent, twice: `loss`, in nats per completion token
over all tokens of its test rows, as reports show it, and `metric`, the domain's own score (0 to 1), the mean over the
rows that both answered. Rows of one group (the group of the split, see moa/data/splits.py) depend on each other, so
intervals resample groups, tests give each group one vote, and `min_rows` counts groups (moa/evaluation/statistics.py).
Where the same expert answers every test row of a domain in both releases, its difference is zero, whatever its count.

**What refuses, and what waits.** Loss is the sharper measure, so it must show that a domain is no worse: the upper end
of its interval lies within `tolerance`. Where it lies beyond, the domain fails if the whole interval lies above zero,
and otherwise there is not enough data: the release is promoted in neither case, but only the first is harm. Scores are
mostly 0 or 1 on few rows and can seldom show that a domain is no worse: they refuse where they show that it is worse,
and otherwise report that they cannot tell. The first release has only the base to be compared with: it is refused where
a domain is shown to be worse than the base, and names the domains that cannot be judged.

**New domains.** A domain that the incumbent lacks is compared with what its users get today: the incumbent's routed
answer, or the base's where that is unknown, and must be better than that. Where it is not, and most of its own prompts
go to another domain, it fails, since its rows are that domain's. It fails too unless its questions are shown to help:
where its answers are as likely after the question of another row (`Score.swapped`), its expert learned nothing of what
is asked. Of many useless domains one in forty would pass a test at the interval's own level, so this one is stricter:
`HELP_SHARE`. Questions of useful domains help in nearly every group.

**Known rows.** New data of an old domain brings test rows of its own. If the data is poisoned, so are these test rows,
and an expert that learned the poison looks better on them. So the rows that the incumbent's release was tested on
(`Score.known`) are also judged by themselves, and a domain that fails on them fails. They can only refuse: an
improvement is judged on all rows. The routing of a domain's known prompts is judged by the sign test. New rows that
mostly go to another domain, where the known ones do not, are refused as rows of that domain.

**Many releases.** A loss within the tolerance is a loss all the same, and many of them add up. So a domain is also
compared with its anchor, the best champion so far on these rows (`Score.anchor`), and may be worse than that by `DRIFT`
times the tolerance at most. And every decision that could have promoted is a look at the same test rows, which one of
many challengers passes by chance: at the k-th look an interval leaves out 1 / k^2 of what it leaves out at the first,
so that over any number of looks a release worse than the tolerance passes with at most pi^2 / 6 = 1.64 times the share
of one look (a spending rule without a horizon, by the union bound).
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from moa.core.config import ReleaseParams
from moa.evaluation.statistics import (
    RoutingChanges,
    exact_test,
    group_means,
    interval,
    more_groups,
    resampled,
    routing_changes,
    sign_test,
)

Verdict = Literal["pass", "fail", "not enough data", "no better"]   # the last one of new domains alone
Against = Literal["incumbent", "base", "anchor"]
Outcome = Literal["promote", "no better", "worse", "not enough data"]


MIN_GAIN = 0.001     # nats; a fall of less than this is no improvement, however certain: rounding is certain
GAIN_SHARE = 0.8     # of what an interval leaves out, left out where it shows a gain: a tie is promoted in 2 % at most
HELP_SHARE = 0.04    # of the same, where questions are shown to help: useless ones pass once in a thousand at most
DRIFT = 2            # tolerances by which a domain may be worse than its anchor
RESAMPLES = 10_000   # of each bootstrap
SEED = 0             # of the bootstraps


def rules_of(params: ReleaseParams) -> dict[str, float]:
    """Every number that a decision depends on, by name: kept with the decision."""
    return {"tolerance": params.tolerance, "min_gain": MIN_GAIN, "gain_share": GAIN_SHARE,
            "metric_tolerance": params.metric_tolerance, "min_rows": params.min_rows, "confidence": params.confidence,
            "accuracy_drop": params.accuracy_drop, "abstention_rise": params.abstention_rise, "drift": DRIFT,
            "resamples": RESAMPLES, "seed": SEED}


def tail_share(confidence: float, look: int) -> float:
    """What one end of an interval leaves out at the `look`-th look (from 1) at the same test rows."""
    return (1 - confidence) / 2 / look**2


@dataclass(frozen=True)
class Score:
    """One test row: mean loss per completion token, score of the answer, and the router's decision; None where a system
    has none."""

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
    challenger_routed: str | None = None   # the router's best guess
    incumbent_routed: str | None = None
    challenger_abstained: bool | None = None
    incumbent_abstained: bool | None = None
    group: str | None = None    # rows of one group depend on each other; None = the row is a group by itself
    tokens: int = 1             # completion tokens, the weight of its loss
    same_expert: bool = False   # one expert, by its digest, answers it in both releases
    anchor: float | None = None   # loss under the domain's best champion so far
    own: float | None = None      # of a new domain: loss under its own expert, whatever the router says
    swapped: float | None = None  # the same with the question of another row

    @property
    def unit(self) -> str:
        """Name of the independent unit that the row belongs to, unique within its domain."""
        return self.row if self.group is None else self.group


@dataclass(frozen=True)
class Comparison:
    """One measure of one domain. `point` and `interval` are the mean difference, challenger minus the other system;
    None where unknown."""

    verdict: Verdict
    reason: str
    rows: int                                     # compared
    unmatched: int = 0                            # left out: one of the two systems has no value
    groups: int = 0                               # independent groups among the rows compared
    point: float | None = None
    interval: tuple[float, float] | None = None   # at release.confidence: decides `verdict`
    improved: bool = False                        # at a confidence corrected for the number of comparisons
    more_groups: int = 0                          # until it can tell, about; 0 = it tells, or the number is unknown


@dataclass(frozen=True)
class Known:
    """The comparisons of a domain on the rows that the incumbent was tested on."""

    loss: Comparison
    metric: Comparison | None = None


@dataclass(frozen=True)
class DomainVerdict:
    """What the comparisons of a domain come to. `metric` is None where no answer was scored, `known` where all rows are
    known, the domain is new, or the same expert answers all rows."""

    verdict: Verdict
    reason: str
    against: Against
    improved: bool
    loss: Comparison
    metric: Comparison | None = None
    known: Known | None = None
    anchor: Comparison | None = None   # with the best champion so far; None where that is the incumbent
    cause: str | None = None   # of a failure, where it is known
    look: int = 1              # looks at these test rows so far, this one included
    more_groups: int = 0       # of test rows until there is a verdict, about; 0 = there is one
    questions_help: bool | None = None   # of a new domain; None = unknown
    brief: str = ""            # the reason in a few words


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
    unjudged: list[str] = field(default_factory=list)     # of a first release: domains with too few rows for a verdict
    outcome: Outcome = "no better"                        # what the reason comes to
    brief: list[str] = field(default_factory=list)        # the objections in a few words each

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def verdict_of(decision: Mapping[str, Any]) -> str:
    """What a recorded decision says of its release: pass, refused, not enough data, or no better.

    Decisions of old workspaces do not tell why a release was not promoted; these read as refused.
    """
    if decision["promote"]:
        return "pass"
    outcome = decision.get("outcome", "worse")
    return "refused" if outcome == "worse" else str(outcome)


def decide(scores: Iterable[Score], rules: ReleaseParams, *, incumbent: Collection[str], challenger: Collection[str],
           first: bool = False, looks: Mapping[str, int] | None = None, tested_by: str = "the incumbent",
           causes: Mapping[str, str] | None = None) -> Decision:
    """Whether the challenger may take the incumbent's place.

    A challenger is promoted only if it is worse in no domain, has enough rows to show that in each, routes within the
    bounds, is significantly better in at least one domain, and in each domain that the incumbent lacks. The first
    release is promoted unless a domain is shown to be worse than the base.

    Args:
        incumbent, challenger: domains that each release has an expert for.
        first: whether there was no release before; `incumbent` is empty then.
        looks: by domain, which look at its test rows this is, from 1 (see `tail_share`); 1 where it is missing.
        tested_by: what reasons call the incumbent's release.
        causes: by domain, why it would be worse.
    """
    rows: dict[str, dict[str, Score]] = {domain: {} for domain in challenger}
    for score in scores:
        if score.domain in rows:
            rows[score.domain][score.row] = score
    chances = len(rows) + sum(any(_scores(one)[0] is not None for one in each.values()) for each in rows.values())
    verdicts = {domain: judge(domain, rows[domain].values(), rules, chances=chances, look=(looks or {}).get(domain, 1),
                              new=domain not in incumbent, first=first, tested_by=tested_by)
                for domain in sorted(rows)}
    verdicts |= {domain: replace(each, cause=(causes or {}).get(domain)) for domain, each in verdicts.items()
                 if each.verdict == "fail"}
    improved = [domain for domain, verdict in verdicts.items() if verdict.improved]
    unjudged = [domain for domain, verdict in verdicts.items() if first and verdict.verdict == "not enough data"]
    removed = sorted(set(incumbent) - set(challenger))
    objections = [f"{domain}: {verdict.reason}" + (f", because {verdict.cause}" if verdict.cause else "")
                  for domain, verdict in verdicts.items() if verdict.verdict != "pass" and domain not in unjudged]
    brief = {domain: [verdict.brief or verdict.reason] for domain, verdict in verdicts.items()
             if verdict.verdict != "pass" and domain not in unjudged}
    old = {domain: list(rows[domain].values()) for domain in sorted(rows) if domain in incumbent}
    routing, strayed, lost = _routing(old, rules, looks or {}, tested_by)
    objections += [each.reason for found in strayed.values() for each in found] + lost
    for domain, found in strayed.items():
        if each := [one.brief for one in found]:
            brief[domain] = [*brief.get(domain, ()), *each]
    for domain in brief.keys() & old.keys():
        if not any("go to the base" in each for each in brief[domain]) and (gone := _gone_to_base(old[domain])):
            brief[domain].append(gone)
    worse = [domain for domain, verdict in verdicts.items() if verdict.verdict == "fail" or strayed.get(domain)]
    if objections:
        promote, reason = False, "; ".join(objections)
    elif first:
        useless = [domain for domain, verdict in verdicts.items() if verdict.questions_help is False]
        promote, reason = True, "; ".join(["First release", *(
            f"{title}: {', '.join(names)}" for title, names in (
                ("better than the base", improved), ("questions do not help", useless),
                ("cannot be judged", [f"{domain} ({verdicts[domain].reason})" for domain in unjudged])) if names)])
    elif improved:
        promote, reason = True, f"No domain is worse; better: {', '.join(improved)}"
    else:
        promote, reason = False, "No domain is worse, but none is really better either"
    if removed:
        reason += f"; removed: {', '.join(removed)}"
    harm = bool(worse or lost)
    lacking = any(each.verdict == "not enough data" for each in verdicts.values())
    outcome: Outcome = ("promote" if promote else "worse" if harm else
                        "not enough data" if lacking and objections else "no better")
    return Decision(promote, f"{reason}.", verdicts, improved, removed, routing, worse, harm, unjudged, outcome,
                    [*(f"{domain} {', '.join(parts)}" for domain, parts in sorted(brief.items())), *lost])


@dataclass(frozen=True)
class _Terms:
    """What the comparisons of one domain have in common."""

    domain: str
    rules: ReleaseParams
    chances: int = 1
    look: int = 1
    first: bool = False
    tested_by: str | None = None   # name of the incumbent's release, where only the rows it was tested on are compared

    @property
    def share(self) -> float:
        return tail_share(self.rules.confidence, self.look)

    @property
    def gain_share(self) -> float:
        return GAIN_SHARE * self.share / self.chances

    @property
    def help_share(self) -> float:
        return HELP_SHARE * self.share

    def on(self, rows: int, what: str) -> str:
        """The rows that a figure is of, in words."""
        if self.tested_by is None:
            return f"on {rows} {what}"
        what = "test rows" if what == "rows" else f"{what} to test rows"
        return f"on the {rows} {what} that {self.tested_by} was tested on"


def judge(domain: str, scores: Iterable[Score], rules: ReleaseParams, *, chances: int = 1, look: int = 1,
          new: bool = False, first: bool = False, tested_by: str = "the incumbent") -> DomainVerdict:
    """The verdict on one domain.

    The domain fails when a comparison does, on all rows, on the known ones, or with the anchor. Without a failure there
    is not enough data where one of these comparisons of the loss cannot tell. A metric that cannot tell does not
    refuse, and neither do too few known rows or too few rows with an anchor. A new domain fails, too, where its prompts
    go to another domain or its questions do not help.

    Args:
        chances: number of comparisons of this decision, for the Bonferroni correction of `improved`.
        look: which look at these test rows this is, from 1.
        new: whether the incumbent lacks the domain.
        first: whether there is no incumbent: only what is shown to be worse than the base fails.
        tested_by: what reasons call the incumbent's release.
    """
    everything = sorted(scores, key=lambda score: score.row)   # so that the order of `scores` does not matter
    terms = _Terms(domain, rules, chances, look, first)
    against: Against = "base" if new and all(one.incumbent is None for one in everything) else "incumbent"
    verdict = _all_rows(everything, terms, against)
    if new:
        return _new_domain(everything, verdict, terms)
    if _same_expert(everything):   # a domain that does not change answers for no earlier loss
        return verdict
    found: list[tuple[Comparison, str]] = []   # further comparisons, each in a few words too
    known = [one for one in everything if one.known]
    if len(known) < len(everything):
        judged = _known_rows(known, replace(terms, chances=1, tested_by=tested_by))
        verdict = replace(verdict, known=judged)
        found.append((judged.loss, _loss_brief(judged.loss)))
        if judged.metric is not None and judged.metric.verdict == "fail":
            found.append((judged.metric, _metric_brief(judged.metric)))
    if (anchor := _anchor(everything, replace(terms, chances=1))) is not None:
        if anchor.verdict != "fail" or verdict.verdict != "fail":
            found.append((anchor, f"{_loss_brief(anchor)} against its best champion"))
        verdict = replace(verdict, anchor=anchor)
    if failed := [each for each in found if each[0].verdict == "fail"]:
        return replace(verdict, verdict="fail", reason=", and ".join(each.reason for each, _ in failed), improved=False,
                       more_groups=0, brief=failed[0][1])
    # Too few known rows have no interval, and are no objection.
    unclear = [each for each in found if each[0].verdict == "not enough data" and each[0].interval]
    if verdict.verdict == "fail" or not unclear:
        return verdict
    here = [] if verdict.verdict == "pass" else [verdict.reason]
    return replace(verdict, verdict="not enough data", improved=False, brief=verdict.brief or unclear[0][1],
                   reason=", and ".join([*here, *(each.reason for each, _ in unclear)]),
                   more_groups=max(verdict.more_groups, *(each.more_groups for each, _ in unclear)))


def _new_domain(scores: Sequence[Score], verdict: DomainVerdict, terms: _Terms) -> DomainVerdict:
    """The verdict on a domain that the incumbent lacks, after `verdict` on its loss and metric."""
    helped = _questions_help(scores, terms)
    verdict = replace(verdict, questions_help=None if helped is None else helped.shown)
    if terms.first:
        return verdict
    strayed = None if verdict.verdict == "pass" and verdict.improved else _answered_by_others(scores, terms)
    reasons = list(filter(None, [strayed, helped.reason if helped else None]))
    if reasons:
        if verdict.verdict == "fail":
            reasons.append(verdict.reason)
        return replace(verdict, verdict="fail", reason=", and ".join(reasons), brief=reasons[0], improved=False,
                       more_groups=0)
    if verdict.verdict == "pass" and not verdict.improved:
        return replace(verdict, verdict="no better", brief="is no better than what answers today",
                       reason=f"no better than what answers today: {verdict.reason}")
    return verdict


def _answered_by_others(scores: Sequence[Score], terms: _Terms) -> str | None:
    """The objection that most of a new domain's prompts go to other domains; None where that is not shown.

    Prompts that the router leaves to the base do not count, and prompts of one group have one vote.
    """
    routed = [one for one in scores if one.challenger_routed is not None and not one.challenger_abstained]
    strays = Counter(one.challenger_routed for one in routed if one.challenger_routed != terms.domain)
    sample = _Sample.of([(one, 1.0 if one.challenger_routed != terms.domain else -1.0, 0.0) for one in routed],
                        by_tokens=False)
    if not strays or sign_test(int((sample.values > 0).sum()), int((sample.values < 0).sum())) > terms.share:
        return None
    most, count = min(strays.items(), key=lambda each: (-each[1], each[0] or ""))
    return f"its prompts are answered by {most} ({count} of {len(routed)}): they are rows of {most}"


@dataclass(frozen=True)
class _Help:
    """Whether the questions of a new domain are shown to help, and the objection where they are not."""

    shown: bool
    reason: str | None


def _questions_help(scores: Sequence[Score], terms: _Terms) -> _Help | None:
    """Whether a new domain's answers are shown to be likelier after their own question than after another row's.

    None where there are too few groups for the sign test to show it, even if all of them agreed.
    """
    sample = _Sample.of([(one, one.own, one.swapped) for one in scores], by_tokens=True)
    lower, higher = int((sample.values < 0).sum()), int((sample.values > 0).sum())
    if sign_test(len(sample.values), 0) > terms.help_share:
        return None
    if sign_test(lower, higher) <= terms.help_share:
        return _Help(True, None)
    return _Help(False, f"its questions do not help: an answer is likelier after its own question than after another "
                        f"row's in {lower} of {len(sample.values)} groups only")


def _loss_brief(found: Comparison) -> str:
    """The difference of loss in a few words, such as "+0.118 nats"; the reason where there is none."""
    if found.point is None or found.interval is None:
        return found.reason
    upper = f" (up to {found.interval[1]:+.3f})" if found.verdict == "not enough data" else ""
    return f"{found.point:+.3f} nats{upper}"


def _metric_brief(found: Comparison) -> str:
    """The difference of the score in a few words, such as "score -0.200"; the reason where there is none."""
    return found.reason if found.point is None else f"score {found.point:+.3f}"


def _scores(one: Score, new: bool = False) -> tuple[float | None, float | None]:
    """Scores of the challenger and of the other system; 0 and 0 for the same answer: only the difference counts."""
    if one.same_answer:
        return 0.0, 0.0
    return one.challenger_score, one.base_score if new else one.incumbent_score


def _all_rows(scores: Sequence[Score], terms: _Terms, against: Against) -> DomainVerdict:
    loss = _loss(scores, terms, against)
    # Where one expert answers all rows in both releases, nothing was looked at.
    look = terms.look - (against == "incumbent" and _same_expert(scores))
    metric = _metric(scores, terms, against)
    if metric is not None and metric.verdict == "fail":
        reason = metric.reason if loss.verdict == "pass" else f"{loss.reason}, and {metric.reason}"
        return DomainVerdict("fail", reason, against, False, loss, metric, look=look,
                             brief=_loss_brief(loss) if loss.verdict == "fail" else _metric_brief(metric))
    improved = loss.verdict == "pass" and (loss.improved or (metric is not None and metric.improved))
    return DomainVerdict(loss.verdict, loss.reason, against, improved, loss, metric, look=look,
                         more_groups=loss.more_groups, brief=_loss_brief(loss) if loss.verdict != "pass" else "")


def _same_expert(scores: Sequence[Score]) -> bool:
    return bool(scores) and all(one.same_expert for one in scores)


def _known_rows(known: Sequence[Score], terms: _Terms) -> Known:
    """Both comparisons on known rows. Fewer than `min_rows` fail where the sign test shows that most are worse by more
    than the tolerance."""
    if not known:
        return Known(Comparison("not enough data", f"none of the test rows that {terms.tested_by} was tested on is "
                                                   "left", 0))
    loss = _loss(known, terms, "incumbent")
    if loss.verdict == "not enough data" and loss.groups:
        sample = _Sample.of([(one, one.challenger, one.incumbent) for one in known], by_tokens=True)
        worse = int((sample.values > terms.rules.tolerance).sum())
        if sign_test(worse, len(sample.values) - worse) <= terms.share:
            loss = replace(loss, verdict="fail", reason=f"worse than the tolerance of {terms.rules.tolerance:g} allows "
                                                        f"in {worse} answers {terms.on(loss.rows, 'rows')}")
    return Known(loss, _metric(known, terms, "incumbent"))


def _anchor(scores: Sequence[Score], terms: _Terms) -> Comparison | None:
    """The comparison with the domain's best champion so far; None where no row has its loss, or too few groups do."""
    with_anchor = [one for one in scores if one.anchor is not None]
    if not with_anchor:
        return None
    found = _loss(with_anchor, terms, "anchor")
    return found if found.verdict == "fail" or found.interval is not None else None


def is_better(pairs: Sequence[tuple[Score, float, float]], least: int) -> bool:
    """Whether the first of two losses of the same rows is lower on the whole; False for fewer than `least` groups.

    The anchor is chosen by this. It is the lowest of several losses and so a little too low, which makes the comparison
    with it stricter, not laxer.
    """
    sample = _Sample.of(pairs, by_tokens=True)
    return len(sample.values) >= least and sample.point < 0


@dataclass(frozen=True)
class _Sample:
    """Paired differences of one measure, challenger minus other, a value and a weight for each group."""

    rows: int
    values: np.ndarray    # (G,)
    weights: np.ndarray   # (G,)

    @classmethod
    def of(cls, pairs: Sequence[tuple[Score, float | None, float | None]], by_tokens: bool) -> "_Sample":
        """Pairs of which neither part is missing. `by_tokens`: rows weigh as many completion tokens as they have."""
        complete = [(one, mine - other) for one, mine, other in pairs if mine is not None and other is not None]
        if not complete:
            return cls(0, np.zeros(0), np.zeros(0))
        values, weights = group_means(np.array([difference for _, difference in complete]),
                                      [f"{one.domain} {one.unit}" for one, _ in complete],
                                      np.array([one.tokens if by_tokens else 1 for one, _ in complete], float))
        return cls(len(complete), values, weights)

    @property
    def point(self) -> float:
        return float((self.values * self.weights).sum() / self.weights.sum())

    def too_few(self, what: str, least: int) -> str | None:
        """Why there are too few groups for an interval, in words; None where there are enough."""
        if len(self.values) >= least:
            return None
        if len(self.values) == self.rows:
            return f"{self.rows} {what} to compare, {least} are needed"
        return f"{self.rows} {what} in {len(self.values)} groups to compare, {least} groups are needed"

    def intervals(self, terms: _Terms) -> tuple[tuple[float, float], tuple[float, float]]:
        """The interval of the mean, and the wider one that shows a gain, corrected for `chances` comparisons
        (Bonferroni)."""
        means, spreads = resampled(self.values, RESAMPLES, SEED, self.weights)
        one, all_ = (interval(self.values, means, spreads, tail, self.weights)
                     for tail in (terms.share, terms.gain_share))
        return one, all_


def _loss(scores: Sequence[Score], terms: _Terms, against: Against) -> Comparison:
    rules = terms.rules
    pairs = [(one, one.challenger, other) for one in scores
             if one.challenger is not None and (other := getattr(one, against)) is not None and math.isfinite(other)]
    count, unmatched = len(pairs), len(scores) - len(pairs)
    groups = len({one.unit for one, _, _ in pairs})
    if broken := sum(not math.isfinite(mine) for _, mine, _ in pairs):
        return Comparison("fail", f"{broken} of {count} rows have no finite loss", count, unmatched, groups)
    if against == "incumbent" and not unmatched and _same_expert(scores):
        return Comparison("pass", f"the same expert answers all {count} rows in both releases", count, unmatched,
                          groups, 0.0, (0.0, 0.0))
    sample = _Sample.of(pairs, by_tokens=True)
    if too_few := sample.too_few("rows", rules.min_rows):
        return Comparison("not enough data", too_few, count, unmatched, groups, more_groups=rules.min_rows - groups)
    (low, high), (_, sure) = sample.intervals(terms)
    point = sample.point
    improved = point < 0 and sure < -MIN_GAIN
    other, limit = "the " + against, rules.tolerance
    if against == "anchor":
        other, limit = "its best champion so far", DRIFT * rules.tolerance
    numbers = f"loss {point:+.4f} nats against {other} {terms.on(count, 'rows')}, interval {low:+.4f} to {high:+.4f}"
    facts = (count, unmatched, groups, point, (low, high))
    if high <= limit or (terms.first and low <= 0):
        return Comparison("pass", numbers, *facts, improved)
    if terms.first:
        return Comparison("fail", f"worse than the base: {numbers}", *facts)
    if low > 0:
        return Comparison("fail", f"worse than the tolerance of {limit:g} allows: {numbers}", *facts)
    # The next comparison will be one more look at these rows.
    more = more_groups(sample.values, sample.weights, limit, tail_share(rules.confidence, terms.look + 1))
    return Comparison("not enough data", f"cannot tell whether within the tolerance of {limit:g}: {numbers}; about "
                                         f"{more:,} more test groups would", *facts, more_groups=more)


def _metric(scores: Sequence[Score], terms: _Terms, against: Against) -> Comparison | None:
    """The comparison of the rows that were answered; None where the challenger answered none."""
    pairs = [(one, *_scores(one, against == "base")) for one in scores]
    if all(mine is None for _, mine, _ in pairs):
        return None
    pairs = [(one, mine, other) for one, mine, other in pairs if (mine, other) != (None, None)]
    rules, sample = terms.rules, _Sample.of(pairs, by_tokens=False)
    unmatched, groups = len(pairs) - sample.rows, len(sample.values)
    if too_few := sample.too_few("answers", rules.min_rows):
        return Comparison("not enough data", too_few, sample.rows, unmatched, groups)
    (low, high), (sure, _) = sample.intervals(terms)
    wins, losses = int((sample.values > 0).sum()), int((sample.values < 0).sum())
    # Where few answers differ the bootstrap interval is too narrow; the sign test is exact there.
    improved = sure > 0 and sign_test(wins, losses) <= terms.gain_share
    numbers = (f"score {sample.point:+.3f} against the {against} {terms.on(sample.rows, 'answers')}, interval "
               f"{low:+.3f} to {high:+.3f}")
    facts = (sample.rows, unmatched, groups, sample.point, (low, high))
    if low >= -rules.metric_tolerance:
        return Comparison("pass", numbers, *facts, improved)
    if high < 0 and sign_test(losses, wins) <= terms.share:
        return Comparison("fail", f"worse than the tolerance of {rules.metric_tolerance:g} allows: {numbers}", *facts)
    return Comparison("not enough data", f"cannot tell whether within {rules.metric_tolerance:g}: {numbers}", *facts,
                      improved)


# Routing, of the incumbent's domains alone: the prompts of a new domain say nothing of how those of old ones fare.

def _routing(rows: Mapping[str, Sequence[Score]], rules: ReleaseParams, looks: Mapping[str, int],
             tested_by: str) -> tuple[dict[str, Any], dict[str, list["_Objection"]], list[str]]:
    """What the router does with the prompts that both releases routed.

    Returns:
        The figures for the decision; objections by domain; objections to the release as a whole.
    """
    old = {domain: _routes(domain, each) for domain, each in rows.items()}
    new = {domain: _routes(domain, each, known=False) for domain, each in rows.items()}
    strayed = {domain: [*_strayed(old[domain], new[domain], rules, tail_share(rules.confidence, looks.get(domain, 1)),
                                  tested_by), *_abstained(domain, rows[domain], rules,
                                                          tail_share(rules.confidence, looks.get(domain, 1)))]
               for domain in rows}
    both = [one for each in rows.values() for one in each
            if one.incumbent_routed is not None and one.challenger_routed is not None]
    if not both:
        return {}, strayed, []
    figures: dict[str, Any] = {
        name: {"accuracy": float(np.mean([one.domain == getattr(one, f"{name}_routed") for one in both])),
               "abstention": float(np.mean([bool(getattr(one, f"{name}_abstained")) for one in both]))}
        for name in ("incumbent", "challenger")}
    before, after = figures["incumbent"], figures["challenger"]
    figures["domains"] = {domain: asdict(found) | {"new": new[domain].after} for domain, found in old.items()}
    lost, level = [], 1 - rules.confidence
    changes = [(one, float(one.domain != one.challenger_routed), float(one.domain != one.incumbent_routed))
               for one in both]
    if before["accuracy"] - after["accuracy"] > rules.accuracy_drop and _rises(changes) <= level:
        lost.append(f"routing accuracy fell from {before['accuracy']:.1%} to {after['accuracy']:.1%}")
    changes = [(one, float(bool(one.challenger_abstained)), float(bool(one.incumbent_abstained))) for one in both]
    if after["abstention"] - before["abstention"] > rules.abstention_rise and _rises(changes) <= level:
        lost.append(f"abstentions rose from {before['abstention']:.1%} to {after['abstention']:.1%}")
    return figures, strayed, lost


def _rises(pairs: Sequence[tuple[Score, float, float]]) -> float:
    """P-value of the sign test over groups that the first value of a pair is larger than the second."""
    sample = _Sample.of(pairs, by_tokens=False)
    return sign_test(int((sample.values > 0).sum()), int((sample.values < 0).sum()))


def _routes(domain: str, scores: Iterable[Score], known: bool = True) -> RoutingChanges:
    return routing_changes(domain, [(one.unit, one.incumbent_routed, one.challenger_routed) for one in scores
                                    if one.known == known and one.incumbent_routed is not None
                                    and one.challenger_routed is not None])


@dataclass(frozen=True)
class _Objection:
    """An objection to the routing of one domain's prompts, and the same in a few words."""

    reason: str
    brief: str


def _strayed(known: RoutingChanges, new: RoutingChanges, rules: ReleaseParams, share: float,
             tested_by: str) -> Iterator[_Objection]:
    """Objections to the routing of a domain's prompts. A few dozen prompts cannot show that a tolerance of a few per
    cent holds, so the challenger is refused only for a fall that is significantly beyond it."""
    if known.fall > rules.accuracy_drop and known.chance <= share:
        where = _Terms(known.domain, rules, tested_by=tested_by).on(known.rows, "rows")
        gone = " and ".join(f"{count} of {known.rows} rows now go to {guess}" for guess, count in known.lost.items())
        yield _Objection(f"{known.domain}: its routing accuracy fell {known.text}, {where}", gone)
    beyond = known.rows and new.rows and new.missed / new.rows - known.missed / known.rows > rules.accuracy_drop
    if beyond and exact_test(new.groups_missed, new.groups, known.groups_missed, known.groups) <= share:
        gone = ", ".join(f"{count} go to {guess}" for guess, count in new.after.items() if guess != new.domain)
        yield _Objection(f"{new.domain}: of its {new.rows} new test rows {gone}, as those that {tested_by} was tested "
                         "on do not: they may be another domain's", f"of {new.rows} new rows {gone}")


def _abstained(domain: str, scores: Sequence[Score], rules: ReleaseParams, share: float) -> Iterator[_Objection]:
    """The objection that the base answers more of a domain's prompts, where that is significantly beyond the bound."""
    pairs = [(one, float(one.challenger_abstained), float(one.incumbent_abstained)) for one in scores
             if one.challenger_abstained is not None and one.incumbent_abstained is not None]
    sample = _Sample.of(pairs, by_tokens=False)
    if not sample.rows or sample.point <= rules.abstention_rise:
        return
    if _rises(pairs) <= share:
        now = sum(bool(one.challenger_abstained) for one, _, _ in pairs)
        yield _Objection(f"{domain}: {now} of {sample.rows} rows go to the base now, {sample.point:+.1%}",
                         f"{now} of {sample.rows} rows now go to the base")


def _gone_to_base(scores: Sequence[Score]) -> str | None:
    """How many of a domain's rows are left to the base by the challenger alone, in words; None for none."""
    routed = [one for one in scores if one.challenger_abstained is not None and one.incumbent_abstained is not None]
    gone = sum(bool(one.challenger_abstained) and not one.incumbent_abstained for one in routed)
    return f"{gone} of {len(routed)} rows now go to the base" if gone else None
