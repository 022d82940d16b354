"""The gate's promises, on simulated losses."""

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.core.config import ReleaseParams
from moa.evaluation import gate as module
from moa.evaluation.gate import Decision, Score, decide, judge, verdict_of
from moa.reports.releases import gate_text

DOMAINS = ("math", "python", "sql")
DEFAULTS = ReleaseParams()


@pytest.fixture(autouse=True, scope="module")
def fewer_resamples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RESAMPLES", 2_000)
        yield


def simulated(shifts: dict[str, float], rows: int = 60, noise: float = 0.02, seed: int = 0) -> list[Score]:
    """Losses that differ much between rows and little between releases, as real ones do."""
    rng = np.random.default_rng(seed)
    scores = []
    for domain, shift in shifts.items():
        incumbent = rng.gamma(4, 0.25, rows)
        challenger = incumbent + shift + rng.normal(0, noise, rows)
        scores += [Score(domain, f"{row:03d}", float(after), float(before), float(before) + 0.3)
                   for row, (before, after) in enumerate(zip(incumbent, challenger, strict=True))]
    return scores


def gate(scores: list[Score], rules: ReleaseParams = DEFAULTS, incumbent: tuple[str, ...] = DOMAINS,
         challenger: tuple[str, ...] = DOMAINS, **more: object) -> Decision:
    return decide(scores, rules, incumbent=incumbent, challenger=challenger, **more)   # type: ignore[arg-type]


losses = st.lists(st.floats(0, 20, allow_nan=False), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(DOMAINS, losses)))
def test_an_equal_challenger_is_never_promoted(by_domain: dict[str, list[float]]) -> None:
    decision = gate([Score(domain, str(row), loss, loss) for domain, values in by_domain.items()
                     for row, loss in enumerate(values)])
    assert not decision.promote
    assert decision.improved == []
    assert all(verdict.verdict != "fail" for verdict in decision.domains.values())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(DOMAINS), st.floats(0.1, 5), st.integers(20, 200))
def test_a_clear_regression_in_one_domain_is_refused_and_named(seed: int, bad: str, rise: float, rows: int) -> None:
    shifts = {domain: rise if domain == bad else -0.2 for domain in DOMAINS}
    decision = gate(simulated(shifts, rows, seed=seed))
    assert not decision.promote
    assert [domain for domain, verdict in decision.domains.items() if verdict.verdict == "fail"] == [bad]
    assert bad in decision.reason


def test_one_better_domain_promotes() -> None:
    decision = gate(simulated({"math": 0, "python": -0.05, "sql": 0}))
    assert decision.promote
    assert decision.improved == ["python"]
    verdict = decision.domains["python"].loss
    assert verdict.interval is not None and verdict.point is not None
    assert verdict.interval[0] < verdict.point < verdict.interval[1] < 0


@pytest.mark.parametrize("rows", [0, 1, 19])
def test_too_few_rows_are_not_a_verdict_and_not_promoted(rows: int) -> None:
    scores = simulated({"math": -0.5, "python": -0.5}) + simulated({"sql": -0.5}, rows)
    decision = gate(scores)
    assert decision.domains["sql"].verdict == "not enough data"
    assert not decision.promote
    assert f"sql: {rows} rows to compare, 20 are needed" in decision.reason


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(order: random.Random) -> None:
    scores = simulated({"math": -0.01, "python": 0.005, "sql": 0.019})
    shuffled = list(scores)
    order.shuffle(shuffled)
    assert gate(shuffled) == gate(scores)


def test_rows_without_a_partner_are_counted_and_left_out() -> None:
    scores = simulated({"math": 0}, 30)
    lone = [Score("math", "new", 9.0, None), Score("math", "gone", None, 9.0), Score("math", "nan", 1.0, float("nan"))]
    verdict = judge("math", scores + lone, DEFAULTS).loss
    assert (verdict.rows, verdict.unmatched) == (30, 3)
    assert verdict.point == judge("math", scores, DEFAULTS).loss.point


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_challenger_without_a_finite_loss_fails(loss: float) -> None:
    verdict = judge("math", [*simulated({"math": -1})[1:], Score("math", "000", loss, 1.0)], DEFAULTS)
    assert verdict.verdict == "fail"
    assert "1 of 60" in verdict.reason


def unanswered(scores: list[Score], domain: str = "sql") -> list[Score]:
    """The same where it is unknown what the incumbent answered in one domain."""
    return [replace(score, incumbent=None, incumbent_score=None) if score.domain == domain else score
            for score in scores]


def test_a_new_domain_is_compared_with_what_answers_today() -> None:
    scores = simulated({"math": 0, "python": 0, "sql": 0})
    better = gate(unanswered(scores), incumbent=("math", "python"))
    assert better.promote and better.improved == ["sql"]
    assert better.domains["sql"].against == "base"
    worse = [Score(s.domain, s.row, s.challenger, None, s.challenger - 0.5) for s in scores if s.challenger]
    assert gate(worse, incumbent=("math", "python")).domains["sql"].verdict == "fail"
    equal = gate(scores, incumbent=("math", "python"))   # the base is worse, but an expert of the incumbent is not
    assert equal.domains["sql"].against == "incumbent" and equal.domains["sql"].verdict == "no better"
    assert not equal.promote and not equal.harm and equal.outcome == "no better"
    assert equal.reason.startswith("sql: no better than what answers today: loss ")


def test_a_new_domain_that_is_no_better_is_not_promoted_with_others_that_are() -> None:
    decision = gate(simulated({"math": -0.1, "python": 0, "sql": 0}), incumbent=("math", "python"))
    assert decision.improved == ["math"] and not decision.promote and decision.outcome == "no better"


def newcomer(guesses: dict[str, int], abstained: int = 0) -> list[Score]:
    """A clearly better new domain `sql` whose prompts go to these domains; the first are left to the base."""
    to = [guess for guess, count in guesses.items() for _ in range(count)]
    rows = unanswered(simulated({"sql": 0.0}, len(to)))
    return simulated({"math": 0, "python": 0}) + [
        replace(score, challenger_routed=guess, challenger_abstained=number < abstained,
                own=score.challenger, swapped=(score.challenger or 0) + 0.2)
        for number, (score, guess) in enumerate(zip(rows, to, strict=True))]


@pytest.mark.parametrize(("guesses", "abstained", "said"), [
    ({"math": 38, "sql": 2}, 0, "sql: its prompts are answered by math (38 of 40): they are rows of math"),
    ({"math": 38, "sql": 2}, 10, "sql: its prompts are answered by math (28 of 30): they are rows of math"),
    ({"math": 15, "python": 25}, 0, "sql: its prompts are answered by python (25 of 40): they are rows of python"),
    ({"math": 24, "sql": 16}, 0, ""),   # not shown either way: no objection
    ({"sql": 40}, 0, "")])
def test_a_new_domain_that_others_answer_is_refused_as_rows_of_those(guesses: dict[str, int], abstained: int,
                                                                     said: str) -> None:
    scores = newcomer(guesses, abstained)
    no_better = gate([replace(score, incumbent=score.challenger) if score.domain == "sql" else score
                      for score in scores], incumbent=("math", "python"))
    assert not no_better.promote and no_better.worse == (["sql"] if said else [])
    assert no_better.reason.startswith(said or "sql: no better") and no_better.harm == bool(said)
    assert gate(scores, incumbent=("math", "python")).promote   # it is better for those prompts that reach it


def test_prompts_of_one_group_that_go_to_another_domain_have_one_vote() -> None:
    scores = [replace(score, incumbent=score.challenger) if score.domain == "sql" else score
              for score in newcomer({"math": 38, "sql": 12})]
    grouped = [replace(score, group="one" if score.challenger_routed == "math" else None)
               if score.domain == "sql" else score for score in scores]
    assert gate(scores, incumbent=("math", "python")).harm
    assert not gate(grouped, ReleaseParams(min_rows=10), incumbent=("math", "python")).harm


@pytest.mark.parametrize(("lower", "refused"), [(40, False), (31, False), (30, True), (20, True), (0, True)])
def test_a_new_domain_whose_questions_do_not_help_is_refused(lower: int, refused: bool) -> None:
    """31 of 40 heads are so rare, once in a thousand, that they show it; 30 are not."""
    scores = [replace(score, swapped=(score.own or 0) + (0.2 if int(score.row) < lower else -0.2))
              if score.own is not None else score for score in newcomer({"sql": 40})]
    decision = gate(scores, incumbent=("math", "python"))
    assert decision.promote != refused and decision.domains["sql"].questions_help != refused
    assert (f"sql: its questions do not help: an answer is likelier after its own question than after another row's in "
            f"{lower} of 40 groups only" in decision.reason) == refused
    few = [score for score in scores if score.own is None or int(score.row) < 9]   # nine cannot show anything
    assert gate(few, ReleaseParams(min_rows=2), incumbent=("math", "python")).domains["sql"].questions_help is None
    assert "questions do not help: sql" not in first([replace(score, own=None) for score in scores]).reason
    named = first([replace(one, base=5.0) for one in scores])
    assert named.promote and ("questions do not help: sql" in named.reason) == refused


def test_what_cannot_be_told_waits_and_is_no_harm() -> None:
    """A tolerance of 0.02 is told by noise of 0.1 in about 260 groups: 60 show neither that it holds nor a loss."""
    decision = gate(simulated({"math": -0.3, "python": 0, "sql": 0.0}, noise=0.1, seed=3), ReleaseParams())
    sql = decision.domains["sql"]
    assert not decision.promote and not decision.harm and decision.outcome == "not enough data"
    assert sql.verdict == "not enough data" and sql.more_groups == sql.loss.more_groups > 100
    assert "sql: cannot tell whether within the tolerance of 0.02: loss " in decision.reason
    assert f"; about {sql.more_groups} more test groups would" in decision.reason
    assert decision.brief[-1].startswith("sql ") and "nats (up to +0.0" in decision.brief[-1]


def test_so_many_more_groups_do_tell() -> None:
    told = 0
    for seed in range(40):
        noisy = simulated({"sql": 0.0}, noise=0.1, seed=seed)
        more = judge("sql", noisy, DEFAULTS).more_groups
        again = simulated({"sql": 0.0}, 60 + more, noise=0.1, seed=1000 + seed)
        told += more == 0 or judge("sql", again, DEFAULTS, look=2).verdict == "pass"
    assert told >= 0.8 * 40


def test_too_few_groups_say_how_many_are_lacking() -> None:
    assert judge("sql", simulated({"sql": -0.5}, 13), DEFAULTS).more_groups == 7


def test_the_anchor_and_the_known_rows_wait_too() -> None:
    noisy = simulated({"math": 0.0}, 40, noise=0.2)
    calm = [replace(score, row=f"new {score.row}", known=False) for score in simulated({"math": 0.0}, 4000, noise=0.01)]
    known = judge("math", noisy + calm, DEFAULTS, tested_by="version 4")
    assert known.loss.verdict == "pass" and known.verdict == "not enough data" and known.more_groups > 0
    assert "on the 40 test rows that version 4 was tested on" in known.reason and not known.improved
    steady = simulated({"math": 0.0}, 60, noise=0.001)
    rng = np.random.default_rng(2)
    anchored = [replace(score, anchor=(score.incumbent or 0) + rng.normal(0, 0.3)) for score in steady]
    found = judge("math", anchored, DEFAULTS)
    assert found.loss.verdict == "pass" and found.verdict == "not enough data"
    assert "cannot tell whether within the tolerance of 0.04" in found.reason and "best champion" in found.reason


def test_an_objection_in_a_few_words() -> None:
    lost = [replace(score, incumbent_abstained=False, challenger_abstained=int(score.row) < 2)
            for score in simulated({"sql": 0.118}, 59, noise=0.001)]
    decision = gate(simulated({"math": 0, "python": 0}) + lost)
    assert decision.brief == ["sql +0.118 nats, 2 of 59 rows now go to the base"]


def test_an_old_domain_whose_incumbent_did_not_answer_is_not_taken_for_new() -> None:
    scores = [Score(s.domain, s.row, s.challenger, None if s.domain == "sql" else s.incumbent, s.base)
              for s in simulated({"math": 0, "python": 0, "sql": 0})]
    decision = gate(scores)
    assert decision.domains["sql"].verdict == "not enough data"
    assert not decision.promote


def test_removed_domains_are_named() -> None:
    decision = gate(simulated({"math": -0.1, "python": 0}), challenger=("math", "python"))
    assert decision.removed == ["sql"]
    assert "removed: sql" in decision.reason


@pytest.mark.parametrize(("after", "word"), [({"challenger_routed": "elsewhere"}, "accuracy fell from 100.0% to 93.3%"),
                                             ({"challenger_abstained": True}, "abstentions rose from 0.0% to 6.7%")])
def test_routing_outside_its_bounds_is_refused(after: dict[str, Any], word: str) -> None:
    """Four of sixty prompts of each domain: too few to tell in any of them, enough in all three together."""
    before = [replace(score, incumbent_routed=score.domain, challenger_routed=score.domain, incumbent_abstained=False,
                      challenger_abstained=False) for score in simulated(dict.fromkeys(DOMAINS, -0.1))]
    assert gate(before).promote
    decision = gate([replace(score, **after) if int(score.row) < 4 else score for score in before])
    assert not decision.promote and word in decision.reason and not decision.worse


@pytest.mark.parametrize(("after", "said"), [
    ({"challenger_abstained": True}, "abstentions rose from 0.0% to 20.0%"),
    ({"challenger_routed": "new"}, "routing accuracy fell from 100.0% to 80.0%")])
def test_a_large_newcomer_hides_no_lost_prompts(after: dict[str, Any], said: str) -> None:
    """Five of the 25 prompts of the only old domain are lost; the 400 of the new one are all routed right."""
    old = [replace(score, incumbent_routed="math", challenger_routed="math", incumbent_abstained=False,
                   challenger_abstained=False) for score in simulated({"math": 0.0}, 25, noise=0)]
    old = [replace(score, **after) if int(score.row) < 5 else score for score in old]
    new = [replace(score, incumbent=None, challenger_routed="new", challenger_abstained=False)
           for score in simulated({"new": 0.0}, 400)]
    decision = gate(old + new, incumbent=("math",), challenger=("math", "new"))
    assert decision.improved == ["new"] and not decision.promote and said in decision.reason


@pytest.mark.parametrize("rows", [20, 60])
def test_false_promotions_are_rare(rows: int) -> None:
    """No true difference anywhere and no domain failing for its width: 5 % promoted is the bound."""
    rules = ReleaseParams(tolerance=1.0)
    promoted = sum(gate(simulated(dict.fromkeys(DOMAINS, 0.0), rows, seed=seed), rules).promote for seed in range(300))
    assert promoted <= 0.05 * 300


def test_power_at_a_known_difference() -> None:
    found = sum(gate(simulated({"math": -0.015, "python": 0, "sql": 0}, seed=seed)).promote for seed in range(50))
    assert found >= 45


def test_the_interval_covers_the_true_difference() -> None:
    """Skewed differences on few rows, where the plain percentile interval is too short."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        values = rng.exponential(0.1, 20) - 0.1
        verdict = judge("d", [Score("d", str(i), 1 + float(v), 1.0) for i, v in enumerate(values)],
                        ReleaseParams(tolerance=10)).loss
        assert verdict.interval is not None
        hits += verdict.interval[0] <= 0 <= verdict.interval[1]
    assert hits >= 0.90 * 300


def test_a_decision_becomes_json() -> None:
    import json

    decision = gate(simulated({"math": -0.1, "python": 0, "sql": 0}))
    assert json.loads(json.dumps(decision.as_dict()))["improved"] == ["math"]


# The domain's own metric.

def answered(shifts: dict[str, float], rows: int = 60, seed: int = 0, loss: float = -0.05) -> list[Score]:
    """Releases whose losses differ by `loss`, and whose right answers differ by these shares."""
    rng = np.random.default_rng(seed)
    scores = []
    for score in simulated(dict.fromkeys(shifts, loss), rows, seed=seed):
        before = float(rng.random() < 0.5)
        turned = rng.random() < abs(shifts[score.domain])
        after = float(shifts[score.domain] > 0) if turned else before
        scores.append(Score(score.domain, score.row, score.challenger, score.incumbent, score.base, after, before, 0.0))
    return scores


def test_a_worse_metric_refuses_although_the_loss_is_better() -> None:
    decision = gate(answered({"math": 0, "python": -0.6, "sql": 0}))
    python = decision.domains["python"]
    assert not decision.promote and "python: worse than the tolerance of 0.05" in decision.reason
    assert (python.verdict, python.loss.verdict, python.improved) == ("fail", "pass", False)
    assert python.metric is not None and python.metric.interval is not None
    assert python.metric.interval[0] < (python.metric.point or 0) < python.metric.interval[1] < 0


def test_a_better_metric_promotes_where_the_loss_is_equal() -> None:
    decision = gate(answered({"math": 0.6, "python": 0, "sql": 0}, loss=0))
    assert decision.promote and decision.improved == ["math"]
    math = decision.domains["math"]
    assert math.metric is not None and math.metric.improved and not math.loss.improved


def test_equal_answers_pass_and_promote_nobody() -> None:
    decision = gate([Score(s.domain, s.row, s.incumbent, s.incumbent, s.base, 1.0, 1.0)
                     for s in simulated(dict.fromkeys(DOMAINS, 0.0))])
    assert not decision.promote and decision.improved == []
    assert all(each.metric is not None and each.metric.verdict == "pass" for each in decision.domains.values())


@pytest.mark.parametrize(("rows", "shift", "said"), [(19, 0.0, "19 answers to compare, 20 are needed"),
                                                     (24, -0.1, "cannot tell whether within 0.05")])
def test_a_metric_that_cannot_tell_says_so_and_is_no_bar(rows: int, shift: float, said: str) -> None:
    few = {score.row for score in simulated({"sql": 0})[:rows]}
    scores = [s if s.row in few else Score(s.domain, s.row, s.challenger, s.incumbent)
              for s in answered(dict.fromkeys(DOMAINS, shift), seed=2)]
    decision = gate(scores)
    assert decision.promote
    for each in decision.domains.values():
        assert each.metric is not None and each.metric.verdict == "not enough data" and said in each.metric.reason
        assert each.verdict == each.loss.verdict == "pass"


def test_a_new_domains_answers_are_compared_with_the_bases() -> None:
    decision = gate(unanswered(answered({"math": 0, "python": 0, "sql": 0})), incumbent=("math", "python"))
    sql = decision.domains["sql"]
    assert sql.against == "base" and sql.metric is not None and sql.metric.improved
    assert decision.domains["math"].metric is not None and not decision.domains["math"].metric.improved


def test_the_seed_decides_and_the_same_seed_decides_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = answered({"math": -0.1, "python": 0.1, "sql": 0})
    first = gate(scores)
    assert gate(scores) == first
    monkeypatch.setattr(module, "SEED", 1)
    other = gate(scores)
    assert other.domains["math"].loss.interval != first.domains["math"].loss.interval


def test_few_rows_that_lose_much_are_not_overlooked() -> None:
    """Most rows gain a little and a few lose much: no true gain. The percentile interval alone promotes one in
    eight such draws."""
    rng = np.random.default_rng(4)
    promoted = 0
    for _ in range(200):
        drawn = rng.exponential(0.1, (len(DOMAINS), 20)) - 0.1
        promoted += gate([Score(domain, str(row), 2 + float(value), 2.0)
                          for domain, values in zip(DOMAINS, drawn, strict=True) for row, value in enumerate(values)],
                         ReleaseParams(tolerance=10)).promote
    assert promoted <= 0.1 * 200


# Rows that the incumbent was tested on, and others.

def arrived(domain: str, known: float, new: float, rows: int = 40, seed: int = 0) -> list[Score]:
    """Rows that the incumbent was tested on, and as many new ones, with these differences of loss."""
    old = [replace(score, known=True) for score in simulated({domain: known}, rows, seed=seed)]
    return old + [replace(score, row=f"new {score.row}", known=False)
                  for score in simulated({domain: new}, rows, seed=seed + 1)]


def test_poison_is_refused_on_the_known_rows_however_good_it_looks_on_its_own() -> None:
    decision = gate(arrived("math", +0.3, -3.0) + simulated({"python": -0.1, "sql": 0}), tested_by="version 4")
    math = decision.domains["math"]
    assert not decision.promote and decision.improved == ["python"]
    assert math.loss.verdict == "pass" and math.loss.improved and math.loss.rows == 80
    assert math.verdict == "fail" and math.known is not None and math.known.loss.rows == 40
    assert "math: worse than the tolerance of 0.02 allows: loss +0.3" in decision.reason
    assert "on the 40 test rows that version 4 was tested on" in decision.reason
    assert decision.domains["python"].known is None   # it has no other rows
    said = gate_text({"version": 5, "against": 4, **decision.as_dict()})
    assert re.search(r"math +loss +pass", said) and re.search(r"math +loss, known +fail", said)


@pytest.mark.parametrize(("decision", "verdict"), [
    ({"promote": True, "outcome": "promote"}, "pass"), ({"promote": False, "outcome": "worse"}, "refused"),
    ({"promote": False, "outcome": "not enough data"}, "not enough data"),
    ({"promote": False, "outcome": "no better"}, "no better"),
    ({"promote": False}, "refused"), ({"promote": True}, "pass")])   # of an old workspace
def test_only_a_worse_release_reads_as_refused(decision: dict[str, Any], verdict: str) -> None:
    assert verdict_of(decision) == verdict
    assert f": {verdict}" in gate_text({"version": 5, "against": 4, "reason": "x", **decision}).splitlines()[0]


def test_new_rows_alone_show_that_a_domain_is_better() -> None:
    decision = gate(arrived("math", 0.0, -0.3) + simulated({"python": 0, "sql": 0}))
    math = decision.domains["math"]
    assert decision.promote and decision.improved == ["math"]
    assert math.known is not None and math.known.loss.verdict == "pass" and not math.known.loss.improved


def test_a_metric_that_fell_on_the_known_rows_refuses() -> None:
    scores = answered({"math": -0.6}) + [replace(score, row=f"new {score.row}", known=False)
                                         for score in answered({"math": 0.9}, rows=120, seed=1)]
    math = judge("math", scores, DEFAULTS)
    assert math.metric is not None and math.metric.improved and math.verdict == "fail" and not math.improved
    assert math.known is not None and math.known.metric is not None and math.known.metric.verdict == "fail"
    assert "on the 60 answers to test rows that the incumbent was tested on" in math.reason


@pytest.mark.parametrize(("rows", "rise", "verdict"), [(6, 0.3, "fail"), (5, 0.3, "pass"), (10, 0.0, "pass"),
                                                       (10, -0.3, "pass"), (0, 0.0, "pass")])
def test_few_known_rows_refuse_only_what_is_surely_worse(rows: int, rise: float, verdict: str) -> None:
    """Five out of five worse happens to one equal challenger in 32, six out of six to one in 64."""
    scores = arrived("math", rise, -3.0, rows=60)
    found = judge("math", scores[:rows] + scores[60:], DEFAULTS, tested_by="version 4")
    assert found.verdict == verdict and found.known is not None
    assert found.known.loss.verdict == ("fail" if verdict == "fail" else "not enough data")
    assert (found.known.loss.reason == "none of the test rows that version 4 was tested on is left") == (rows == 0)
    assert found.improved == (verdict == "pass")


def test_a_new_domains_rows_are_never_known() -> None:
    scores = [replace(score, known=False) for score in unanswered(simulated({"sql": 0}))]
    verdict = judge("sql", scores, DEFAULTS, new=True)
    assert verdict.known is None and verdict.against == "base" and verdict.improved


def routed(domain: str, guesses: dict[str, int], known: bool = True) -> list[Score]:
    """Rows with equal losses that went to their own domain, and go to these now."""
    now = [guess for guess, count in guesses.items() for _ in range(count)]
    return [replace(score, known=known, incumbent_routed=domain, challenger_routed=guess)
            for score, guess in zip(simulated({domain: 0.0}, len(now), noise=0), now, strict=True)]


@pytest.mark.parametrize(("guesses", "refused"), [
    ({"math": 40}, False), ({"math": 36, "sql": 4}, False),   # as likely as not, once in 16
    ({"math": 34, "sql": 6}, True), ({"math": 20, "sql": 15, "python": 5}, True)])
def test_a_domain_whose_known_prompts_go_elsewhere_is_refused(guesses: dict[str, int], refused: bool) -> None:
    """Losses are equal, and accuracy over all domains, which many others could hide it in, is too."""
    scores = routed("math", guesses) + simulated({"python": -0.1, "sql": 0})
    decision = gate(scores, tested_by="version 4")
    assert decision.promote != refused
    found = decision.routing["domains"]["math"]
    assert found["rows"] == 40 and found["after"] == guesses and found["before"] == {"math": 40}
    lost = {guess: count for guess, count in guesses.items() if guess != "math"}
    assert found["lost"] == lost
    if refused:
        assert f"math: its routing accuracy fell from 100.0% to {guesses['math'] / 40:.1%}, " in decision.reason
        assert all(f"{count} prompts go to {guess} now" in decision.reason for guess, count in lost.items())
        assert "on the 40 test rows that version 4 was tested on" in decision.reason


@pytest.mark.parametrize(("guesses", "refused"), [({"sql": 12}, True), ({"math": 6, "sql": 6}, True),
                                                  ({"math": 10, "sql": 2}, False), ({"math": 12}, False)])
def test_new_rows_that_go_to_another_domain_are_refused_as_its_own(guesses: dict[str, int], refused: bool) -> None:
    """As under the incumbent, and known prompts go where they went: nothing else would speak against them."""
    new = [replace(score, row=f"new {score.row}", incumbent_routed=score.challenger_routed)
           for score in routed("math", guesses, known=False)]
    decision = gate(routed("math", {"math": 30}) + new + simulated({"python": -0.1, "sql": 0}), tested_by="version 4")
    assert decision.promote != refused and decision.routing["domains"]["math"]["new"] == guesses
    said = f"math: of its 12 new test rows {guesses.get('sql')} go to sql, as those that version 4 was tested on do not"
    assert (said in decision.reason) == refused


def test_one_row_that_gains_much_is_no_reason_to_fear_a_loss() -> None:
    """Bootstrap t alone says +0.03: a router that gives one prompt more to the right expert would be refused."""
    scores = [Score("math", str(row), 0.5 if row == 3 else 5.0, 5.0) for row in range(26)]
    loss = judge("math", scores, DEFAULTS).loss
    assert loss.verdict == "pass" and loss.interval is not None and loss.interval[1] == 0 and not loss.improved


# Groups, looks and the anchor.

def grouped(scores: list[Score], size: int) -> list[Score]:
    """Every row `size` times, with equal losses, as one group."""
    return [replace(score, row=f"{score.row}-{copy}", group=score.row) for score in scores for copy in range(size)]


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(0, 1000), st.floats(-0.05, 0.05))
def test_rows_repeated_within_their_groups_tell_nothing_new(size: int, seed: int, shift: float) -> None:
    scores = simulated({"math": shift}, 30, seed=seed)
    once, often = judge("math", scores, DEFAULTS).loss, judge("math", grouped(scores, size), DEFAULTS).loss
    assert (often.rows, often.groups, once.groups) == (30 * size, 30, 30) and often.verdict == once.verdict
    assert often.point == pytest.approx(once.point) and often.interval == pytest.approx(once.interval)


def test_groups_are_counted_where_rows_were() -> None:
    scores = grouped(simulated({"math": -0.5}, 19), 8)
    verdict = judge("math", scores, DEFAULTS)
    assert verdict.verdict == "not enough data"
    assert verdict.reason == "152 rows in 19 groups to compare, 20 groups are needed"


def test_a_group_has_one_vote() -> None:
    """Six rows that go elsewhere are six votes apart, and one together."""
    scores = routed("math", {"math": 34, "sql": 6})
    apart = gate(scores + simulated({"python": -0.1, "sql": 0}))
    together = gate([replace(score, group="one" if score.challenger_routed == "sql" else score.row) for score in scores]
                    + simulated({"python": -0.1, "sql": 0}))
    assert not apart.promote and together.promote
    assert together.routing["domains"]["math"]["groups_lost"] == 1


def test_the_difference_is_that_of_the_losses_that_reports_show() -> None:
    scores = [replace(score, tokens=1 + int(score.row) % 7) for score in simulated({"math": -0.1}, 50)]
    tokens = sum(score.tokens for score in scores)
    after, before = (sum(getattr(score, name) * score.tokens for score in scores) / tokens
                     for name in ("challenger", "incumbent"))
    assert judge("math", scores, DEFAULTS).loss.point == pytest.approx(after - before)


@pytest.mark.parametrize("rows", [1, 19, 60])
def test_the_same_expert_on_every_row_is_no_difference_whatever_their_number(rows: int) -> None:
    scores = [replace(score, challenger=score.incumbent, same_expert=True) for score in simulated({"math": 0.0}, rows)]
    verdict = judge("math", scores, DEFAULTS)
    assert (verdict.verdict, verdict.loss.point, verdict.loss.interval) == ("pass", 0.0, (0.0, 0.0))
    assert verdict.look == 0 and judge("math", scores, DEFAULTS, look=5).look == 4
    one = judge("math", [replace(scores[0], same_expert=False), *scores[1:]], DEFAULTS)
    assert (one.verdict == "pass") == (rows >= DEFAULTS.min_rows)


def test_each_look_at_the_same_rows_asks_for_more() -> None:
    scores = simulated({"math": 0.0, "python": 0.0, "sql": -0.006}, noise=0.01)
    intervals = []
    for look in (1, 2, 5, 30):
        verdict = judge("sql", [one for one in scores if one.domain == "sql"], DEFAULTS, chances=3, look=look)
        assert verdict.loss.interval is not None and verdict.look == look
        intervals.append(verdict.loss.interval)
    assert all(later[0] < earlier[0] < earlier[1] < later[1]
               for earlier, later in itertools.pairwise(intervals))
    assert gate(scores).promote and not gate(scores, looks=dict.fromkeys(DOMAINS, 30)).promote
    said = gate_text({"version": 5, "against": 4, **gate(scores, looks={"sql": 3}).as_dict()})
    assert "looks at these test rows, this one included: sql 3; each makes the intervals wider" in said


@given(st.floats(0.51, 0.999), st.integers(1, 10_000))
def test_all_looks_together_leave_out_little_more_than_the_first(confidence: float, looks: int) -> None:
    spent = sum(module.tail_share(confidence, look) for look in range(1, looks + 1))
    assert module.tail_share(confidence, 1) == pytest.approx((1 - confidence) / 2)
    assert spent < 1.645 * module.tail_share(confidence, 1)


def test_small_losses_do_not_add_up() -> None:
    """Each release is worse than the last by half of the tolerance: the anchor ends it."""
    promoted, loss = 0, 0.0
    for release in range(20):
        worse = simulated({"math": 0.01, "python": -0.05, "sql": 0.0}, 160, noise=0.005, seed=release)
        decision = gate([replace(score, anchor=score.incumbent - loss if score.domain == "math" else None)
                         for score in worse if score.incumbent is not None])
        if not decision.promote:
            assert re.search("math: worse than the tolerance of 0.04 allows: loss", decision.reason)
            assert "against its best champion so far" in decision.reason and decision.harm
            break
        promoted, loss = promoted + 1, loss + 0.01
    assert 1 <= promoted <= 3


def test_a_domain_that_does_not_change_answers_for_no_earlier_loss() -> None:
    scores = [replace(score, challenger=score.incumbent, same_expert=True, anchor=score.incumbent - 1)
              for score in simulated({"math": 0.0}, 60) if score.incumbent is not None]
    assert judge("math", scores, DEFAULTS).verdict == "pass"
    assert judge("math", [replace(one, same_expert=False) for one in scores], DEFAULTS).verdict == "fail"


def test_an_anchor_with_few_groups_left_binds_nobody() -> None:
    scores = simulated({"math": 0.0}, 60)
    anchored = [replace(score, anchor=score.incumbent - 1 if int(score.row) < 19 else None) for score in scores
                if score.incumbent is not None]
    assert judge("math", anchored, DEFAULTS).anchor is None


# The first release.

def first(scores: list[Score]) -> Decision:
    return decide([replace(score, incumbent=None) for score in scores], DEFAULTS, incumbent=(), challenger=DOMAINS,
                  first=True)


def test_a_first_release_is_compared_with_the_base() -> None:
    decision = first(simulated(dict.fromkeys(DOMAINS, 0.0)))
    assert decision.promote and decision.improved == list(DOMAINS) and decision.unjudged == []
    assert decision.reason == "First release; better than the base: math, python, sql."


def test_a_first_release_that_is_shown_to_be_worse_than_the_base_is_refused() -> None:
    decision = first(simulated({"math": 0.0, "python": 0.0, "sql": 0.5}))
    assert not decision.promote and decision.worse == ["sql"] and decision.harm
    assert decision.reason.startswith("sql: worse than the base: loss +0.2")


def test_a_first_release_names_what_cannot_be_judged_and_is_not_refused_for_it() -> None:
    decision = first(simulated({"math": 0.0, "python": 0.0}) + simulated({"sql": 0.5}, 12))
    assert decision.promote and decision.unjudged == ["sql"]
    assert "cannot be judged: sql (12 rows to compare, 20 are needed)" in decision.reason


@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_a_first_release_that_may_be_worse_than_the_base_is_let_through(noise: float) -> None:
    scores = [replace(score, base=score.incumbent + noise * np.sin(int(score.row)))
              for score in simulated(dict.fromkeys(DOMAINS, 0.0)) if score.incumbent is not None]
    decision = first(scores)
    assert decision.promote and decision.reason == "First release."
