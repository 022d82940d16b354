"""Tests of routing changes, and bootstrap intervals of weighted means."""

import numpy as np
import pytest

from moa.evaluation.statistics import exact_test, interval, resampled, routing_changes, sign_test


def test_equal_weights_change_nothing() -> None:
    values = np.random.default_rng(0).normal(size=30)
    weights = np.full(30, 7.0)
    plain, weighted = resampled(values, 500, 1), resampled(values, 500, 1, weights)
    assert weighted[0] == pytest.approx(plain[0]) and weighted[1] == pytest.approx(plain[1])
    assert interval(values, *weighted, 0.025, weights) == pytest.approx(interval(values, *plain, 0.025))


def test_an_interval_of_a_weighted_mean_covers_it_about_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(3), 0
    for trial in range(200):   # weights from 1 to 40, values that depend on them
        weights = rng.integers(1, 41, size=40).astype(float)
        values = weights + rng.normal(size=40)
        low, high = interval(values, *resampled(values, 500, trial, weights), 0.025, weights)
        covered += low <= 27.0 <= high   # E[w^2] / E[w] = (1 + 2 * 40) / 3
    assert covered >= 185


@pytest.mark.parametrize(("lost", "gained", "chance"), [(0, 0, 1), (5, 0, 1 / 32), (6, 0, 1 / 64), (3, 3, 42 / 64)])
def test_how_surely_prompts_stray(lost: int, gained: int, chance: float) -> None:
    guesses = [("math", "sql")] * lost + [("sql", "math")] * gained + [("math", "math")] * 20
    found = routing_changes("math", [(str(row), *each) for row, each in enumerate(guesses)])
    assert found.chance == pytest.approx(chance) == sign_test(lost, gained)
    assert found.fall == pytest.approx((lost - gained) / (20 + lost + gained))


def test_how_surely_these_are_missed_more_than_others() -> None:
    assert exact_test(2, 2, 0, 2) == pytest.approx(1 / 6)
    assert exact_test(0, 5, 3, 5) == 1 == exact_test(0, 5, 0, 5)
    assert exact_test(3, 4, 1, 6) == pytest.approx((4 * 6 + 1) / 210)
