"""How surely more prompts go astray than before."""

import pytest

from moa.evaluation.statistics import exact_test, routing_changes, sign_test


@pytest.mark.parametrize(("lost", "gained", "chance"), [(0, 0, 1), (5, 0, 1 / 32), (6, 0, 1 / 64), (3, 3, 42 / 64)])
def test_how_surely_prompts_stray(lost: int, gained: int, chance: float) -> None:
    found = routing_changes("math", [("math", "sql")] * lost + [("sql", "math")] * gained + [("math", "math")] * 20)
    assert found.chance == pytest.approx(chance) == sign_test(lost, gained)
    assert found.fall == pytest.approx((lost - gained) / (20 + lost + gained))


def test_how_surely_these_are_missed_more_than_others() -> None:
    assert exact_test(2, 2, 0, 2) == pytest.approx(1 / 6)
    assert exact_test(0, 5, 3, 5) == 1 == exact_test(0, 5, 0, 5)
    assert exact_test(3, 4, 1, 6) == pytest.approx((4 * 6 + 1) / 210)
