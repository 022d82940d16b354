"""The promise of a threshold: its numbers are the textbook's, and fresh prompts keep it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from moa.mixture.abstention import (
    CONFIDENCE,
    ROUNDING,
    group_minima,
    groups_needed,
    low_end,
    most_left,
    promise,
    sentence,
    upper_limit,
)

shares = st.sampled_from([0.002, 0.01, 0.05, 0.3])


@pytest.mark.parametrize(("share", "groups"), [(0.01, 299), (0.05, 59), (0.1, 29), (0.001, 2995)])
def test_the_fewest_groups_for_a_promise_are_the_tables(share: float, groups: int) -> None:
    assert groups_needed(share) == groups
    assert upper_limit(0, groups) <= share < upper_limit(0, groups - 1)


@given(groups=st.integers(1, 3000), data=st.data())
def test_the_upper_limit_is_the_exact_binomial_one(groups: int, data: st.DataObject) -> None:
    left = data.draw(st.integers(0, min(groups, 40)))
    found = upper_limit(left, groups)
    exact = binomtest(left, groups, alternative="less").proportion_ci(CONFIDENCE, "exact").high
    assert found == pytest.approx(exact, abs=1e-9)


@given(groups=st.integers(1, 3000), share=shares)
def test_one_more_prompt_left_would_break_the_promise(groups: int, share: float) -> None:
    left = most_left(groups, share)
    assert 0 <= left < groups
    if left:
        assert upper_limit(left, groups) <= share
    if left + 1 < groups:
        assert upper_limit(left + 1, groups) > share


@settings(deadline=None)
@given(scores=st.lists(st.floats(-1, 1), min_size=1, max_size=400), share=shares, data=st.data())
def test_the_threshold_leaves_out_as_many_groups_as_it_may(scores: list[float], share: float,
                                                           data: st.DataObject) -> None:
    groups = data.draw(st.lists(st.integers(0, 300), min_size=len(scores), max_size=len(scores)))
    found = promise(np.array(scores), groups, share)
    below = {group for score, group in zip(scores, groups, strict=True) if score < found.threshold}
    assert found.groups == len(set(groups))
    assert len(below) <= found.left
    at_most = {group for score, group in zip(scores, groups, strict=True) if score <= found.threshold + 3e-6}
    if not found.more:
        assert len(at_most) > found.left   # a little higher, and one more group would lie below
    assert (found.share <= share) == (found.more == 0)


@pytest.mark.parametrize("groups", [20, 60, 150])
def test_few_groups_leave_as_little_to_the_base_as_many_would(groups: int) -> None:
    """The share of fresh prompts below the threshold, where the low end is exponential: in the mean what was wanted."""
    rng, left = np.random.default_rng(7), []
    for _ in range(2000):
        threshold = promise(-rng.exponential(size=groups), range(groups), 0.01).threshold
        left.append(math.exp(threshold))   # P(-X < threshold), X exponential of mean 1
    lowest = 1 / (groups + 1)              # what it would be at the lowest of the groups
    assert np.mean(left) < min(0.011, 0.75 * lowest)


@given(scores=st.lists(st.floats(-1, 1), min_size=1, max_size=298), by=st.floats(-3, 3), scale=st.floats(0.1, 10))
def test_a_threshold_of_few_groups_moves_and_stretches_with_their_scores(scores: list[float], by: float,
                                                                        scale: float) -> None:
    plain, moved = (promise(np.array(each), range(len(scores)), 0.01).threshold + ROUNDING
                    for each in (scores, [scale * score + by for score in scores]))
    assert plain <= min(scores) + 1e-9
    assert moved == pytest.approx(scale * plain + by, abs=1e-6)


def test_few_groups_reach_halfway_to_the_nearest_strange_prompt() -> None:
    few, many, strange = np.linspace(0.6, 0.61, 50), np.linspace(0.6, 0.61, 400), np.array([-0.3, 0.2])
    assert promise(few, range(50), 0.01, strange).threshold == pytest.approx(0.4, abs=1e-5)
    alone = promise(few, range(50), 0.01).threshold
    assert 0.59 < alone < 0.6
    assert promise(few, range(50), 0.01, np.array([0.605])).threshold == alone   # halfway would be higher
    assert promise(many, range(400), 0.01, strange) == promise(many, range(400), 0.01)
    assert promise(few, range(50), 0.01, strange).share == promise(few, range(50), 0.01).share


@given(times=st.floats(1, 1000), tail=st.integers(1, 20))
def test_the_low_end_lies_the_lower_the_more_scores_there_are(times: float, tail: int) -> None:
    scores = np.sort(np.random.default_rng(1).normal(size=50))
    assert low_end(scores, 1, tail) == scores[0]
    assert low_end(scores, 2 * times, tail) <= low_end(scores, times, tail) <= scores[0]


def test_a_group_has_its_lowest_score() -> None:
    assert group_minima(np.array([0.5, 0.2, 0.9, 0.4]), ["a", "b", "a", "b"]).tolist() == [0.2, 0.5]


@pytest.mark.parametrize("groups", [40, 299, 700])
def test_fresh_prompts_keep_the_promise_as_often_as_it_says(groups: int) -> None:
    """The share below the threshold is known exactly for uniform scores: the threshold itself."""
    rng, draws = np.random.default_rng(5), 2000
    kept = 0
    for _ in range(draws):
        found = promise(rng.random(groups), range(groups), 0.01)
        kept += found.threshold <= found.share
    fewest = binom.ppf(0.001, draws, CONFIDENCE)
    assert kept >= fewest


@pytest.mark.parametrize(("groups", "share", "said"), [
    (500, 0.01, "math: of fresh prompts at most 0.95% are left to the base (95 % confidence, 500 groups)."),
    (140, 0.01, "math: of fresh prompts at most 2.12% are left to the base (95 % confidence, 140 groups); 1.00% takes "
                "159 more groups."),
    (40, None, "math: no prompt is left to the base (assemble.max_abstention is null)."),
    (0, 0.01, "math: of fresh prompts at most 100.00% are left to the base (95 % confidence, 0 groups); 1.00% takes "
              "299 more groups."),
])
def test_the_sentence(groups: int, share: float | None, said: str) -> None:
    assert sentence("math", groups, share) == said


def test_no_number_of_groups_promises_nothing_at_all() -> None:
    with pytest.raises(ValueError):
        groups_needed(0)
    found = promise(np.array([0.3, 0.1]), ["a", "b"], 0.0)
    assert math.isclose(found.threshold, 0.1, abs_tol=1e-5) and found.more == 0
