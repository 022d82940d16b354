"""What a learning run says at its end, and with which exit code."""

from typing import Any

import pytest
import typer

from moa.cli.operate import _print_outcome

GATED = {"version": 2, "champion": 1, "worse": [], "reason": "No domain is worse; better: math."}


@pytest.mark.parametrize(("facts", "code", "said"), [
    ({"state": "skipped", "reason": "nothing is stale"}, 0, "Nothing was done: nothing is stale"),
    ({**GATED, "state": "released", "outcome": "promote"}, 0, "Version 2 is champion now: No domain is worse"),
    ({**GATED, "state": "kept", "outcome": "no better"}, 0, "Version 2 was not promoted"),
    ({**GATED, "state": "kept", "outcome": "not enough data"}, 4, "Version 2 was not promoted"),
    ({**GATED, "state": "waiting", "outcome": "promote"}, 4, "waits for `moa release promote 2`"),
    ({**GATED, "state": "refused", "outcome": "worse", "reason": "math: worse."}, 3,
     "REFUSED, and the champion stays: math: worse."),
    ({"state": "skipped", "reason": "law waits: not enough data: 9 more rows of law.", "outcome": "not enough data"}, 4,
     "Nothing was done: law waits: not enough data: 9 more rows of law."),
    ({"state": "deferred", "reason": "law waits: not enough data: 9 more rows of law", "outcome": "not enough data",
      "deferred": {"law": "law waits"}}, 4,
     "the champion stays: law waits: not enough data: 9 more rows of law. The rows wait in data/incoming."),
    ({"state": "refused", "undone": {"math": ["a.jsonl"]}, "reason": "the gate refused it: math: worse."}, 3,
     "REFUSED, and the champion stays: the gate refused it: math: worse.")])
def test_the_end_is_said_and_coded(facts: dict[str, Any], code: int, said: str,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    found = 0
    try:
        _print_outcome(facts, as_json=False)
    except typer.Exit as end:
        found = end.exit_code
    printed = capsys.readouterr()
    assert found == code and said in printed.out
    if "undone" in facts:
        assert "without a.jsonl: they lie in data/incoming/.rejected/math, each with its reason." in printed.err
