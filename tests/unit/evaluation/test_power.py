"""What test rows can show, held against the gate itself."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.core.config import ReleaseParams
from moa.evaluation import gate, power, statistics
from moa.evaluation.gate import Score

RULES = ReleaseParams()
SHARE = gate.tail_share(RULES.confidence, 1)


def manifest(test_groups: int, kept: int = 1000) -> dict[str, Any]:
    return {"groups": {"train": 8 * test_groups, "validation": test_groups, "test": test_groups},
            "rows": {"kept": kept}}


@given(st.integers(2, 5000), st.floats(0.001, 2), st.sampled_from([0.05, 0.025, 0.001]))
def test_more_groups_show_less_and_the_fewest_are_found(groups: int, deviation: float, share: float) -> None:
    shown = statistics.smallest_difference(groups, deviation, share)
    assert statistics.smallest_difference(groups + 1, deviation, share) < shown
    assert statistics.groups_needed(shown * (1 + 1e-9), deviation, share) == groups


def test_the_gate_passes_an_equal_release_as_often_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many groups as the tolerance needs, at the deviation that the sentence names."""
    monkeypatch.setattr(gate, "RESAMPLES", 2000)
    groups = statistics.groups_needed(RULES.tolerance, power.LOSS_DEVIATION, SHARE)
    rng, passed = np.random.default_rng(5), 0
    for _ in range(200):
        before = rng.gamma(4, 0.25, groups)
        after = before + rng.normal(0, power.LOSS_DEVIATION, groups)
        scores = [Score("math", str(row), float(mine), float(other))
                  for row, (mine, other) in enumerate(zip(after, before, strict=True))]
        passed += gate.judge("math", scores, RULES).verdict == "pass"
    assert 0.82 < passed / 200 < 0.97   # POWER is 0.9; a little less, as the gate takes the wider of two intervals


@pytest.mark.parametrize(("groups", "said"), [
    (19, "math: 19 test groups are too few for a verdict of the gate, which needs 20: about 53 more rows."),
    (59, "math: 59 test groups can show a rise of loss from 0.043 nats on and a fall of score from 0.20 on; a rise "
         "of 0.02 takes 206 more, about 3,492 rows (if losses differ by 0.1 nats between trainings)."),
    (400, "math: 400 test groups can show a rise of loss from 0.016 nats on and a fall of score from 0.20 on "
          "(if losses differ by 0.1 nats between trainings).")])
def test_the_sentence(groups: int, said: str) -> None:
    found = power.resolution(manifest(groups), RULES)
    assert found is not None and power.sentence("math", found, RULES) == said


def test_a_corpus_that_counts_no_groups_says_nothing() -> None:
    assert power.resolution({"rows": {"kept": 100}}, RULES) is None
