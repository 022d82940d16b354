"""What an evaluation's rows tell of the router, held against scipy, the calibration error and plain counting."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from moa.evaluation.routing import abstentions, changed_hands, reliability
from moa.mixture.calibration import expected_calibration_error


def row(number: int, **values: Any) -> dict[str, Any]:
    """One routed test row of the domain `law`, which the router names with confidence 0.9."""
    return {"domain": "law", "row": f"{number:032x}", "system": "routed", "answered_by": "law", "loss": 1.0,
            "routed_to": "law", "confidence": 0.9, "abstained": False, "group": None, **values}


def test_abstention_is_counted_in_rows_and_bounded_in_groups() -> None:
    rows = [row(number, group=f"g{number // 4}", abstained=number in (0, 1, 9)) for number in range(40)]
    rows += [row(number, domain="sql") for number in range(7)]
    rows += [row(number, system="base", abstained=True) for number in range(40)]
    found = abstentions(rows)
    assert found["law"] == {"rows": 40, "abstained": 3, "share": 0.075, "groups": 10, "groups_abstained": 2,
                            "limit": pytest.approx(binomtest(2, 10, alternative="less").proportion_ci(0.95).high)}
    assert (found["sql"]["groups"], found["sql"]["abstained"]) == (7, 0)
    assert found["sql"]["limit"] == pytest.approx(1 - 0.05 ** (1 / 7))   # none of seven
    assert abstentions([]) == {}


def test_a_domain_that_is_always_left_to_the_base_has_no_limit_below_one() -> None:
    assert abstentions([row(number, abstained=True) for number in range(3)])["law"]["limit"] == 1.0


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=80))
def test_the_bins_come_to_the_calibration_error(cases: list[tuple[float, bool]]) -> None:
    rows = [row(number, confidence=confidence, routed_to="law" if right else "sql")
            for number, (confidence, right) in enumerate(cases)]
    bins = reliability(rows)
    gap = sum(each["rows"] * abs(each["right"] - each["confidence"]) for each in bins) / len(rows)
    expected = expected_calibration_error(torch.tensor([confidence for confidence, _ in cases], dtype=torch.float64),
                                          torch.tensor([right for _, right in cases]))
    assert gap == pytest.approx(expected)
    assert sum(each["rows"] for each in bins) == len(rows)
    assert [each["low"] for each in bins] == sorted(each["low"] for each in bins)
    for each in bins:
        assert each["low"] - 1e-9 <= each["confidence"] <= each["high"] + 1e-9
        assert 0 <= each["interval"][0] <= each["right"] + 1e-9 and each["right"] <= each["interval"][1] + 1e-9 <= 1.1


def test_the_interval_is_wilsons() -> None:
    rows = [row(number, confidence=0.95, routed_to="sql" if number < 3 else "law") for number in range(20)]
    only, = reliability(rows)
    z, share, count = 1.959963984540054, 17 / 20, 20
    centre, half = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    assert only["interval"] == pytest.approx([end / (1 + z**2 / count) for end in (centre - half, centre + half)])
    assert (only["low"], only["high"], only["right"]) == (14 / 15, 1.0, 0.85)
    assert reliability([]) == []


def test_the_prompts_that_another_label_answers_now_come_worst_first() -> None:
    before = [row(1), row(2, loss=2.0), row(3), row(4, answered_by="base"), row(5), row(6), row(1, system="forced")]
    after = [row(1), row(2, answered_by="sql", loss=1.5), row(3, answered_by="base", loss=4.0), row(4, loss=0.5),
             row(5, answered_by="sql", loss=math.nan), row(7, answered_by="sql"), row(1, domain="sql"),
             row(6, loss=9.0), row(1, system="forced", answered_by="sql")]
    found = changed_hands(before, after)
    assert [(one["row"][-1], one["before"], one["after"]) for one in found] == [
        ("5", "law", "sql"), ("3", "law", "base"), ("2", "law", "sql"), ("4", "base", "law")]
    assert found[1] == {"domain": "law", "row": row(3)["row"], "before": "law", "after": "base", "loss_before": 1.0,
                        "loss_after": 4.0, "rise": 3.0}
    assert changed_hands(before, before) == [] and changed_hands([], after) == []
