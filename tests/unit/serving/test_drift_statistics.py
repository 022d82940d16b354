"""What counts as a shift, and what as a domain that is missing: pure numbers."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moa.serving import drift_statistics
from moa.serving.drift_statistics import RoutedPrompt

DOMAINS = ("code", "law", "math", "tales")
LIMIT = 0.25
counts = st.lists(st.integers(0, 500), min_size=2, max_size=12)


# The index.

@given(st.data())
def test_the_index_is_symmetric_and_never_negative(data: st.DataObject) -> None:
    first = data.draw(counts)
    second = data.draw(st.lists(st.integers(0, 500), min_size=len(first), max_size=len(first)))
    assume(sum(first) and sum(second))
    number = drift_statistics.psi(first, second)
    assert number == pytest.approx(drift_statistics.psi(second, first))
    assert number >= -1e-12 and math.isfinite(number)


@given(counts, st.integers(1, 50))
def test_equal_shares_have_index_zero_however_many_rows(first: list[int], times: int) -> None:
    assume(sum(first))
    assert drift_statistics.psi(first, [times * count for count in first]) == pytest.approx(0, abs=1e-9)


def test_the_index_is_the_textbooks_where_rows_are_many() -> None:
    first, second = [0.5, 0.3, 0.2], [0.4, 0.3, 0.3]
    textbook = sum((p - q) * math.log(p / q) for p, q in zip(first, second, strict=True))
    found = drift_statistics.psi([1e9 * p for p in first], [1e9 * q for q in second])
    assert found == pytest.approx(textbook, rel=1e-6)
    assert math.isnan(drift_statistics.psi([0, 0], [1, 2]))


# Verdicts.

def prompts(source: np.random.Generator, number: int, *, shares: Sequence[float] = (0.25,) * 4, lower: float = 0.0,
            abstaining: float = 0.01) -> list[RoutedPrompt]:
    """Prompts whose score depends on their domain, as real routers' do; `lower` moves all."""
    found = []
    for label in source.choice(len(DOMAINS), size=number, p=shares):
        score = source.normal(0.6 + 0.08 * label - lower, 0.05)
        found.append(RoutedPrompt(domain=DOMAINS[label], score=score,
                                  confidence=float(source.beta(20 + label, 1)) - lower / 2,
                                  abstained=bool(source.random() < abstaining)))
    return found


def judged(traffic: list[RoutedPrompt], validation: list[RoutedPrompt], least: int = 100) -> dict[str,
                                                                                                  drift_statistics.Measure]:
    found = drift_statistics.measures(traffic, validation, window=1000, least=least, psi_limit=LIMIT)
    assert tuple(measure.name for measure in found) == drift_statistics.MEASURES
    return {measure.name: measure for measure in found}


@pytest.mark.parametrize(("rows", "asked"), [(60, 100), (150, 220), (400, 1000)])
def test_unchanged_traffic_is_seldom_called_shifted(rows: int, asked: int) -> None:
    """Few rows make large indices: without the test beside it, most of these checks would cry wolf."""
    checks, alarms, large = 120, 0, 0
    for seed in range(checks):
        source = np.random.default_rng([rows, seed])
        # Another mix of domains than validation's is no shift of the score.
        measures = judged(prompts(source, asked, shares=(0.7, 0.1, 0.1, 0.1)), prompts(source, rows))
        alarms += drift_statistics.overall(list(measures.values())) == "shifted"
        large += (measures["score"].number or 0) >= LIMIT
    assert alarms <= drift_statistics.FALSE_ALARMS * checks
    assert large > checks / 4 or rows > 60


def test_a_shift_of_every_kind_is_found_and_no_other_measure_says_so() -> None:
    for seed in range(10):
        source = np.random.default_rng(seed)
        validation, before = prompts(source, 200), prompts(source, 300)
        moved = judged(prompts(source, 300, lower=0.08), validation)
        assert (moved["score"].verdict, moved["confidence"].verdict) == ("shifted", "shifted")
        assert moved["score"].p is not None and moved["score"].p < drift_statistics.ALPHA
        assert moved["abstention"].verdict == moved["domains"].verdict == "stable"

        left = judged(prompts(source, 300, abstaining=0.2), validation)
        assert left["abstention"].verdict == "shifted" and left["score"].verdict == "stable"

        other = judged([*before, *prompts(source, 300, shares=(0.05, 0.05, 0.1, 0.8))], validation)
        assert other["domains"].verdict == "shifted" and "tales" in other["domains"].reason
        assert other["score"].verdict == other["abstention"].verdict == "stable"


def test_too_few_prompts_have_no_verdict() -> None:
    source = np.random.default_rng(0)
    validation = prompts(source, 100)
    few = judged(prompts(source, 99, lower=0.5), validation)
    assert {measure.verdict for measure in few.values()} == {"not enough data"}
    assert drift_statistics.overall(list(few.values())) == "not enough data"
    assert "99 prompts, and a verdict needs 100" in few["score"].reason
    one_window = judged(prompts(source, 150, shares=(1, 0, 0, 0)), validation)["domains"]
    assert one_window.verdict == "not enough data" and (one_window.number or 0) > LIMIT
    assert one_window.detail == {"against": "validation"}
    strange = [RoutedPrompt(domain="new", score=0.5, confidence=0.5, abstained=False)] * 200
    assert judged(strange, validation)["score"].verdict == "not enough data"
    assert judged(prompts(source, 200), [])["abstention"].verdict == "not enough data"


def test_only_the_newest_prompts_are_compared() -> None:
    source = np.random.default_rng(1)
    validation = prompts(source, 300)
    old, new = prompts(source, 2000, lower=0.2), prompts(source, 1000)
    assert judged([*old, *new], validation)["score"].verdict == "stable"
    assert judged([*new, *old], validation)["score"].verdict == "shifted"


def test_scores_that_are_all_the_same_are_no_shift() -> None:
    same = [RoutedPrompt(domain="law", score=1e6, confidence=1.0, abstained=False)] * 150
    measures = judged(same, same)
    assert measures["score"].verdict == measures["confidence"].verdict == measures["abstention"].verdict == "stable"
    assert measures["score"].number == pytest.approx(0)


# Groups.

def cloud(source: np.random.Generator, centre: int, number: int, noise: float = 0.8) -> np.ndarray:
    """Prompts of one domain in 32 dimensions."""
    middle = np.zeros(32)
    middle[centre] = 5
    return middle + noise * source.normal(size=(number, 32))


@pytest.mark.parametrize("seed", range(5))
def test_each_missing_domain_is_one_group_and_stragglers_are_none(seed: int) -> None:
    source = np.random.default_rng(seed)
    width = drift_statistics.widest(drift_statistics.unit(cloud(source, place, 30)) for place in range(4))
    assert width is not None
    small, large = cloud(source, 10, 15), cloud(source, 11, 40)
    stragglers = source.normal(size=(15, 32)) * 5
    unit = drift_statistics.unit(np.concatenate([small, stragglers, large]))
    first, second = (set(group) for group in drift_statistics.groups(unit, width, 10))
    assert first <= set(range(30, 70)) and second <= set(range(15))
    assert len(first) >= 34 and len(second) >= 12   # those far out of their own domain may stay alone
    assert drift_statistics.groups(unit, width, 10) == [sorted(first), sorted(second)]
    assert drift_statistics.groups(unit, width, 41) == []
    assert set(drift_statistics.typical(unit, sorted(second))) < second


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_groups_do_not_depend_on_the_order_of_prompts(seed: int) -> None:
    source = np.random.default_rng(seed)
    unit = drift_statistics.unit(
        np.concatenate([cloud(source, 1, 20), cloud(source, 2, 15), source.normal(size=(9, 32))]))
    order = source.permutation(len(unit))
    plain = drift_statistics.groups(unit, 0.8, 5)
    shuffled = [{int(order[place]) for place in group} for group in drift_statistics.groups(unit[order], 0.8, 5)]
    assert sorted(map(sorted, shuffled)) == sorted(map(sorted, plain))


def test_distances() -> None:
    vectors = drift_statistics.unit([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])   # each two are 1, 1 and 2 apart
    assert drift_statistics.reach(vectors) == pytest.approx(1.5)
    assert drift_statistics.widest([vectors, vectors[:2], vectors[:1]]) == pytest.approx(1.5)
    assert drift_statistics.widest([vectors[:1]]) is None
    assert drift_statistics.groups(vectors[:1], 1.0, 1) == []
    assert drift_statistics.unit([[0.0, 0.0]]).tolist() == [[0.0, 0.0]]
