"""Figures to text, against literal text."""

from typing import Any

import pytest

from moa.reports.text import answered_by, build_markdown, trace_text

TRACE = [{"level": 0, "domain": "sql", "probability": 0.513}, {"level": 1, "domain": "math", "probability": 0.874},
         {"level": 2, "domain": "math", "probability": 1.0}]
DECISION = {"domain": "math", "confidence": 0.874, "abstained": False, "score": 0.19, "threshold": 0.1,
            "rule": "early", "levels": [1]}


def test_a_trace_is_a_plot() -> None:
    assert trace_text(TRACE, DECISION) == """\
level                       probability  domain
    0  ██████████░░░░░░░░░░       51.3%  sql
    1  █████████████████░░░       87.4%  math  <- read
    2  ████████████████████      100.0%  math
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
    ({"abstained": True, "confidence": 1.0, "domain": "support", "answered_by": "base", "similarity": 0.04,
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
