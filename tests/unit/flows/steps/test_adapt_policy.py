"""When what waits is learned: a table of cases, and what holds in every case."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.steps.adapt_policy import GRAIN, AdaptDecision, PendingRows, decide
from moa.core.config import AdaptParams

NOW, MIN_NEW = 1_800_000_000.0, 30


def waiting(domain: str = "sql", rows: int = 40, age: float = 100, *, known: bool = True) -> PendingRows:
    return PendingRows(domain, known, rows, NOW - age, 1)


def short(domain: str, rows: int, lacking: int, of: str = "", *, known: bool = True) -> PendingRows:
    return replace(waiting(domain, rows, known=known), lacking=lacking, why="not enough data", of=of or domain)


@pytest.mark.parametrize(("pending", "params", "last_end", "expected"), [
    ([], {}, None, AdaptDecision(False, (), "nothing that can be learned waits.")),
    ([waiting()], {}, None, AdaptDecision(True, ("sql",), "40 new rows of sql.")),
    ([waiting("tax"), waiting("law", 1)], {}, NOW - 1,
     AdaptDecision(True, ("law", "tax"), "41 new rows of law and tax.")),
    ([waiting(rows=0)], {}, None, AdaptDecision(False, (), "nothing that can be learned waits.")),
    ([waiting(age=4)], {}, None,
     AdaptDecision(False, ("sql",),
                   "the newest file is younger than adapt.debounce (10 s); waiting: 40 new rows of sql.", 6)),
    ([waiting(age=4)], {"debounce": 0.0}, None, AdaptDecision(True, ("sql",), "40 new rows of sql.")),
    ([waiting()], {"cooldown": 60.0}, NOW - 20,
     AdaptDecision(False, ("sql",),
                   "the last run ended less than adapt.cooldown (60 s) ago; waiting: 40 new rows of sql.", 40)),
    ([waiting()], {"cooldown": 60.0}, NOW - 60, AdaptDecision(True, ("sql",), "40 new rows of sql.")),
    ([waiting()], {"cooldown": 60.0}, None, AdaptDecision(True, ("sql",), "40 new rows of sql.")),
    ([waiting(age=0)], {"cooldown": 60.0, "debounce": 90.0}, NOW - 20,   # the longer of the two
     AdaptDecision(False, ("sql",),
                   "the newest file is younger than adapt.debounce (90 s); waiting: 40 new rows of sql.", 90)),
    ([waiting(rows=4), waiting("tax", 5)], {"min_rows": 10}, None,
     AdaptDecision(False, ("sql", "tax"), "adapt.min_rows is 10; waiting: 9 new rows of sql and tax.")),
    ([waiting(rows=5), waiting("tax", 5)], {"min_rows": 10}, None,
     AdaptDecision(True, ("sql", "tax"), "10 new rows of sql and tax.")),
    ([waiting("law", 29, known=False)], {}, None,
     AdaptDecision(False, (), "law has 29 usable rows, and a new domain needs 30.")),
    ([waiting("law", 30, known=False)], {}, None, AdaptDecision(True, ("law",), "30 new rows of law.")),
    ([waiting("law", 1, 0, known=False), waiting(rows=1)], {}, None,   # no newcomer to wait for, and no rows of a run
     AdaptDecision(True, ("sql",),
                   "1 new row of sql; law has 1 usable row, and a new domain needs 30.")),
    ([waiting("law", 29, known=False), waiting(rows=1)], {"min_rows": 30}, None,
     AdaptDecision(False, ("sql",),
                   "adapt.min_rows is 30; waiting: 1 new row of sql; law has 29 usable rows, and a new "
                   "domain needs 30.")),
    # Rows that were tried wait for others, and hold up no other domain.
    ([short("law", 250, 120)], {"cooldown": 60.0}, NOW - 1,
     AdaptDecision(False, (), "law waits: not enough data: 120 more rows of law.")),
    ([short("law", 250, 1, of="sql", known=False), waiting(rows=40)], {}, None,
     AdaptDecision(True, ("sql",), "40 new rows of sql; law waits: not enough data: 1 more row of sql.")),
    ([short("law", 370, 0)], {}, None, AdaptDecision(True, ("law",), "370 new rows of law.")),
    # future
    ([waiting(age=-3600)], {"cooldown": 60.0}, NOW + 3600, AdaptDecision(True, ("sql",), "40 new rows of sql.")),
])
def test_table(pending: list[PendingRows], params: dict[str, float], last_end: float | None,
               expected: AdaptDecision) -> None:
    assert decide(pending, AdaptParams(**params), NOW, last_end, MIN_NEW) == expected


ages = st.integers(0, 10_000)
some = st.lists(st.builds(waiting, st.sampled_from(["law", "sql", "tax"]), st.integers(0, 60), ages,
                          known=st.booleans()), max_size=4)
policies = st.builds(AdaptParams, min_rows=st.integers(1, 80), debounce=st.floats(0, 5000), cooldown=st.floats(0, 5000))
ends = st.none() | ages.map(lambda age: NOW - age)


def enough(pending: list[PendingRows], params: AdaptParams) -> bool:
    rows = [each.rows for each in pending if each.known or each.rows >= MIN_NEW]
    return sum(rows) >= params.min_rows


@given(some, policies, ends)
def test_with_enough_rows_waiting_long_enough_runs_and_without_nothing_does(
        pending: list[PendingRows], params: AdaptParams, last_end: float | None) -> None:
    later = decide(pending, params, NOW + 10_001, last_end, MIN_NEW)
    assert later.run == enough(pending, params) and later.wait is None


@given(some, policies, ends)
def test_no_run_while_cooling_down_or_right_behind_a_newcomer(pending: list[PendingRows], params: AdaptParams,
                                                              last_end: float | None) -> None:
    if decide(pending, params, NOW, last_end, MIN_NEW).run:
        assert last_end is None or NOW - last_end > params.cooldown - 2 * GRAIN
        assert all(NOW - each.newest > params.debounce - 2 * GRAIN for each in pending if each.known and each.rows)


@given(some, policies, ends, st.floats(0, 1))
def test_wait_is_when_the_answer_changes(pending: list[PendingRows], params: AdaptParams, last_end: float | None,
                                         share: float) -> None:
    due = decide(pending, params, NOW, last_end, MIN_NEW)
    if due.wait is None:
        assert decide(pending, params, NOW + 20_000 * share, last_end, MIN_NEW).run == due.run
        return
    assert not due.run and due.wait > 0
    before = NOW + due.wait * share
    if before < NOW + due.wait - 2 * GRAIN:
        assert not decide(pending, params, before, last_end, MIN_NEW).run
    assert decide(pending, params, NOW + due.wait, last_end, MIN_NEW).run


@given(some, policies, ends)
def test_every_answer_has_its_reason(pending: list[PendingRows], params: AdaptParams, last_end: float | None) -> None:
    due = decide(pending, params, NOW, last_end, MIN_NEW)
    assert due.reason.endswith(".") and (due.domains or not due.run)
    for each in pending:
        if each.domain in due.domains or (not each.known and 0 < each.rows < MIN_NEW):
            assert each.domain in due.reason
