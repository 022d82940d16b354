"""Figures to text, against literal text."""

from typing import Any

import pytest

from moa.core.config import ReleaseParams
from moa.evaluation.gate import Score, decide
from moa.reports.text import answered_by, build_markdown, gate_line, trace_text

TRACE = [{"level": 0, "domain": "sql", "probability": 0.513}, {"level": 1, "domain": "math", "probability": 0.874},
         {"level": 2, "domain": "math", "probability": 1.0}]
DECISION = {"domain": "math", "confidence": 0.874, "abstained": False, "score": 0.19, "threshold": 0.1,
            "rule": "early", "levels": [1]}


def test_a_trace_is_a_plot() -> None:
    assert trace_text(TRACE, DECISION) == """\
level                        probability  domain
    0  ██████████░░░░░░░░░░        51.3%  sql
    1  █████████████████░░░        87.4%  math  <- read
    2  ████████████████████       100.0%  math
rule early: math, confidence 87.4%"""


def test_a_trace_says_why_the_router_abstains() -> None:
    told = trace_text(TRACE, {**DECISION, "abstained": True, "threshold": 0.25, "rule": "vote", "levels": [0, 1, 2]})
    assert told.count("<- read") == 3
    assert told.splitlines()[-1] == \
        ("rule vote: math, confidence 87.4%; similarity 0.19 is below 0.25, as for every other domain, so the router "
         "abstains")


@pytest.mark.parametrize(("reply", "said"), [
    ({"abstained": False, "confidence": 0.987, "domain": "math", "answered_by": "math"},
     "math answered (confidence 0.99)"),
    ({"abstained": False, "confidence": None, "domain": "base", "answered_by": "base"}, "base answered, as asked for"),
    ({"abstained": True, "confidence": None, "domain": "support", "answered_by": "base", "similarity": 0.04,
      "threshold": 0.16}, "the base answered: unlike support's rows (0.04 < 0.16); --domain support forces it")])
def test_who_answered_is_said(reply: dict[str, Any], said: str) -> None:
    assert answered_by(reply) == said


EVALUATION = {
    "scores": {"sql": {"base": {"loss": 1.5, "loss_interval": (1.25, 1.75), "score": None, "score_interval": None,
                                "rows": 40, "answered": 0},
                       "forced": {"loss": 0.5, "loss_interval": None, "score": 0.75, "score_interval": (0.5, 1.0),
                                  "rows": 40, "answered": 16}}},
    "tax": {"sql": {"loss": 0.125, "loss_interval": (0.0, 0.25), "score": 0.0, "score_interval": (0.0, 0.0)}},
    "routing": {"accuracy": 0.975, "abstention": 0.01, "ece": 0.02, "confusion": {"sql": {"sql": 39}}}}
ROUTER = {"levels": [{"level": 0, "accuracy": 0.5, "agreement": 0.625},
                     {"level": 1, "accuracy": 1.0, "agreement": 1.0}]}
RELEASE = {"name": "moa-mixture", "version": 3, "champion": None, "waiting": True,
           "decision": {"reason": "No domain is worse; better: sql | math."}}


def test_a_build_in_markdown() -> None:
    assert build_markdown(EVALUATION, ROUTER, RELEASE) == """\
**Release** version 3 of moa-mixture: No domain is worse; better: sql | math; there is no champion yet; it waits for \
approval.

### Scores

| domain | system | loss | metric | rows / answered |
| --- | --- | --- | --- | --- |
| sql | base | 1.500 [1.250, 1.750] | - | 40 / 0 |
| sql | label forced | 0.500 | 0.750 [0.500, 1.000] | 40 / 16 |

### Routing

accuracy 97.5%, abstention 1.0%, calibration error 2.0%

| rows of / best guess | sql |
| --- | --- |
| sql | 39 |

| routing tax | loss, routed - forced | metric, forced - routed |
| --- | --- | --- |
| sql | 0.125 [0.000, 0.250] | 0.000 [0.000, 0.000] |

### Layer agreement

| level | accuracy | agreement |
| --- | --- | --- |
| 0 | 50.0% | 62.5% |
| 1 | 100.0% | 100.0% |
"""


def test_a_build_in_markdown_ends_with_the_prompts_that_changed_hands() -> None:
    assert build_markdown(EVALUATION, ROUTER, RELEASE, "No known prompt changed hands.").endswith(
        "\n\n### Known prompts that changed hands\n\n```text\nNo known prompt changed hands.\n```\n")


def test_markdown_leaves_out_what_there_is_not() -> None:
    assert build_markdown(None, {}, None) == "\n"
    assert build_markdown(None, {}, {"version": 1}) == "**Release** version 1 of ?; there is no champion yet.\n"


def test_a_build_shows_abstention_and_reliability_where_they_were_measured() -> None:
    routing = {**EVALUATION["routing"], "by_domain": {"sql": {
        "rows": 40, "groups": 35, "abstained": 1, "groups_abstained": 1, "share": 0.025, "limit": 0.1291}},
        "reliability": [{"low": 0.9, "high": 1.0, "rows": 40, "confidence": 0.99, "right": 0.975,
                         "interval": [0.8711, 0.9956]}]}
    router = {**ROUTER, "promises": {"sql": {"groups": 117, "share": 0.02528, "wanted": 0.01, "more": 182}}}
    said = build_markdown({**EVALUATION, "routing": routing}, router, RELEASE)
    assert """\
| domain | rows / groups | left to the base (95 % limit, promise) |
| --- | --- | --- |
| sql | 40 / 35 | 2.5% (12.9%, 2.53%) |

Too few groups to promise 1.00%: sql (at most 2.53%, 182 more groups).

| confidence | mean | right | 95 % interval | rows |
| --- | --- | --- | --- | --- |
| 90% to 100% | 99.0% | 97.5% | 87.1% to 99.6% | 40 |
""" in said
    never = build_markdown({**EVALUATION, "routing": routing}, {**ROUTER, "promises": {}}, RELEASE)
    assert "No prompt is left to the base (assemble.max_abstention is null)." in never


# The gate in one line.

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
