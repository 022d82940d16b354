"""Figures to text, against literal text."""

from moa.report import trace_text

TRACE = [{"level": 0, "domain": "sql", "probability": 0.513}, {"level": 1, "domain": "math", "probability": 0.874},
         {"level": 2, "domain": "math", "probability": 1.0}]
DECISION = {"domain": "math", "confidence": 0.874, "abstained": False, "score": 1.94, "threshold": 0.5,
            "rule": "early", "levels": [1]}


def test_a_trace_is_a_plot() -> None:
    assert trace_text(TRACE, DECISION) == """\
level                       probability  domain
    0  ██████████░░░░░░░░░░       51.3%  sql
    1  █████████████████░░░       87.4%  math  <- read
    2  ████████████████████      100.0%  math
rule early: math, confidence 87.4%"""


def test_a_trace_says_why_the_router_abstains() -> None:
    told = trace_text(TRACE, {**DECISION, "abstained": True, "threshold": 2.5, "rule": "vote", "levels": [0, 1, 2]})
    assert told.count("<- read") == 3
    assert told.splitlines()[-1] == \
        "rule vote: math, confidence 87.4%; its score 1.94 is below 2.5, so the router abstains"
