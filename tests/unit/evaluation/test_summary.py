"""The evaluation as text, against literal text."""

from typing import Any

from moa.evaluation.summary import markdown, table

FIGURES = {"loss": 0.5, "perplexity": 1.65, "score": 0.25}
OLD: dict[str, Any] = {"domains": {domain: dict.fromkeys(("base", "routed", "forced"), FIGURES)
                                   for domain in ("law", "sql")},
                       "routing": {"accuracy": 0.975, "abstention": 0.0125, "ece": 0.02}}
MEASURED = {"rows": 40, "groups": 35, "abstained": 1, "groups_abstained": 1, "share": 0.025, "limit": 0.1291}
PROMISES = {"law": {"groups": 117, "share": 0.02528, "wanted": 0.01, "more": 182},
            "sql": {"groups": 500, "share": 0.0095, "wanted": 0.01, "more": 0}}
BINS = [{"low": 0.4, "high": 0.5, "rows": 2, "confidence": 0.45, "right": 0.5, "interval": [0.0945, 0.9055]},
        {"low": 0.9, "high": 1.0, "rows": 1038, "confidence": 0.99, "right": 1.0, "interval": [0.9963, 1.0]}]
NEW = OLD | {"routing": OLD["routing"] | {"by_domain": {"law": MEASURED, "sql": MEASURED}, "promises": PROMISES,
                                          "reliability": BINS}}


def test_abstention_stands_beside_its_limit_and_the_promise() -> None:
    assert table(NEW) == """\
domain  system         loss  perplexity  score  left to the base (95 % limit, promise)
law     base          0.500        1.65  0.250
        routed        0.500        1.65  0.250  2.5% (12.9%, 2.53%)
        label forced  0.500        1.65  0.250
sql     base          0.500        1.65  0.250
        routed        0.500        1.65  0.250  2.5% (12.9%, 0.95%)
        label forced  0.500        1.65  0.250
routing accuracy 97.5%, abstention 1.2%, calibration error 2.0%
Too few groups to promise 1.00%: law (at most 2.53%, 182 more groups)."""


def test_a_router_that_never_abstains_promises_nothing_and_says_so() -> None:
    said = table(NEW | {"routing": NEW["routing"] | {"promises": {}}}).splitlines()
    assert said[2].endswith("2.5% (12.9%, -)")
    assert said[-1] == "No prompt is left to the base (assemble.max_abstention is null)."


def test_an_evaluation_of_before_has_neither_column_nor_remark() -> None:
    assert "left to the base" not in table(OLD)
    assert table(OLD).splitlines()[-1] == "routing accuracy 97.5%, abstention 1.2%, calibration error 2.0%"
    assert markdown(OLD) == f"```\n{table(OLD)}\n```\n"


def test_the_report_shows_how_far_the_confidence_can_be_relied_on() -> None:
    assert markdown(NEW) == f"""\
```
{table(NEW)}
```

How often the router's best guess is right, by its confidence:

```
confidence    mean   right    95 % interval   rows
40% to 50%   45.0%   50.0%    9.4% to 90.5%      2
90% to 100%  99.0%  100.0%  99.6% to 100.0%  1,038
```
"""
