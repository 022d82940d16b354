"""The gate's decision as one line."""

from typing import Any

import pytest

from moa.core.config import ReleaseParams
from moa.evaluation.gate import Score, decide
from moa.reports.text import gate_line


def decision(rise: float, noise: float = 0.0, against: int | None = 1, lost: int = 0) -> dict[str, Any]:
    """The gate on version 2, whose losses in support differ so."""
    scores = [Score("support", f"{row:02}", 1 + rise + noise * (-1) ** row, 1.0, incumbent_abstained=False,
                    challenger_abstained=row < lost) for row in range(59)]
    return {**decide(scores, ReleaseParams(), incumbent=("support",), challenger=("support",)).as_dict(), "version": 2,
            "against": against}


@pytest.mark.parametrize(("given", "how", "said"), [
    (decision(0.118, lost=2), {}, "gate REFUSED version 2: support +0.118 nats, 2 of 59 rows now go to the base; "
                                  "champion stays 1; next: `moa gate 2`"),
    (decision(0.118), {"touched": ["support"]}, "gate REFUSED version 2: support +0.118 nats; champion stays 1; next: "
                                                "`moa adapt --accept support --reason TEXT`, if you know better"),
    (decision(0.118), {"accepted": True}, "gate REFUSED version 2: support +0.118 nats; accepted, so it becomes "
                                          "champion all the same"),
    (decision(0.0, 0.1), {"rows": {"support": 1200}}, "gate WAITING version 2: support +0.002 nats (up to +0.0"),
    (decision(0.0), {}, "gate NO BETTER version 2: No domain is worse, but none is really better either; champion "
                        "stays 1; next: `moa gate 2`"),
    (decision(-0.1), {}, "gate PASSED version 2: better: support -0.100 nats; it becomes champion"),
    (decision(-0.1), {"waits": True}, "gate PASSED version 2: better: support -0.100 nats; champion stays 1; next: "
                                      "`moa release promote 2`"),
    ({"version": 1, "against": 1, "promote": False, "reason": "already champion"}, {},
     "gate UNCHANGED version 1: already champion"),
    ({"version": 2, "against": 3, "promote": False, "reason": "version 2 was champion before."}, {},
     "gate NO BETTER version 2: version 2 was champion before; champion stays 3; next: `moa gate 2`")])
def test_a_line(given: dict[str, Any], how: dict[str, Any], said: str) -> None:
    line = gate_line(given, how.pop("rows", {}), **how)
    assert line.startswith(said) and "\n" not in line
    if "WAITING" in said:
        assert line.endswith("champion stays 1; next: add 1,200 rows of support")
