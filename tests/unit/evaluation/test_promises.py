"""What the router promises, in words: the numbers of the calibration, and short for many domains."""

from typing import Any

import numpy as np
import pytest

from moa.core.config import AssembleParams
from moa.evaluation import promises
from moa.mixture import abstention
from moa.mixture.assemble import PROMISING

PARAMS = AssembleParams()


def manifest(groups: tuple[int, int]) -> dict[str, Any]:
    return {"groups": dict(zip(("train", "validation"), groups, strict=True))}


@pytest.mark.parametrize(("groups", "rests_on"), [((200, 30), 182), ((480, 60), PROMISING), ((5000, 600), PROMISING),
                                                  ((20, 3), 3)])
def test_a_promise_rests_on_the_groups_that_the_router_reads(groups: tuple[int, int], rests_on: int) -> None:
    assert promises.groups_of(manifest(groups), PARAMS) == rests_on   # but for the 48 rows of the heads


def test_a_few_domains_have_a_sentence_each_which_says_what_the_calibration_will() -> None:
    corpora = {"math": manifest((148, 17)), "sql": manifest((480, 60))}
    said = promises.expected(corpora, PARAMS)
    assert said == ["math: of fresh prompts at most 2.53% are left to the base (95 % confidence, 117 groups); 1.00% "
                    "takes 182 more groups.",
                    "sql: of fresh prompts at most 0.98% are left to the base (95 % confidence, 480 groups)."]
    kept = {domain: abstention.promise(np.linspace(0, 1, count), range(count), 0.01).as_dict()
            for domain, count in (("math", 117), ("sql", 480))}
    assert promises.recorded(kept) == said and kept["math"]["more"] == 182


def test_many_domains_have_two_sentences() -> None:
    groups = {f"d{number}": 100 if number < 20 else 480 for number in range(60)} | {"new": 5}
    kept, short = promises.sentences(groups, 0.01)
    assert kept == "Of fresh prompts at most 1.00% are left to the base in 40 of 61 domains (95 % confidence)."
    assert short.startswith("Too few groups to promise 1.00%: new (at most 45.07%, 294 more groups), d0 (at most "
                            "2.95%, 199 more groups), ")
    assert short.endswith(" and 9 more.") and len(promises.sentences(dict.fromkeys("abcdef", 480), 0.01)) == 1


def test_a_router_that_never_abstains_and_one_from_before_promises() -> None:
    never = ["No prompt is left to the base (assemble.max_abstention is null)."]
    assert promises.recorded({}) == never
    assert promises.expected({"math": manifest((9, 1))}, AssembleParams(max_abstention=None)) == never
    assert promises.recorded(None) == []
    assert promises.expected({"math": {"rows": {"train": 5}}}, PARAMS) == []   # a corpus from before groups


def test_no_number_of_groups_promises_nothing_at_all() -> None:
    assert promises.too_few({"math": 480}, 0.0) == "No number of groups promises 0%: math (at most 0.62%)."
