"""Why a domain got worse: what differs for the rows that got worse."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.evaluation.comparison import attribute_regressions

DOMAINS = ("alpha", "beta")


def parts(prompt: str = "", **experts: str) -> dict[str, Any]:
    """A release; an expert is written as its digest and its corpus, such as "a1/a"."""
    return {"prompt": {"system": prompt},
            "experts": {name: dict(zip(("digest", "corpus"), said.split("/"), strict=True))
                        for name, said in experts.items()}}


def rows(domain: str, by: str, now: str, count: int = 10, rise: float = 0.5, fall: float = 0.0) -> list[dict[str, Any]]:
    return [{"domain": domain, "row": f"{by}{now}{number}", "incumbent_by": by, "challenger_by": now,
             "incumbent_loss": 1.0, "challenger_loss": 1.0 + rise, "incumbent_score": 1.0,
             "challenger_score": 1.0 - fall} for number in range(count)]


OLD = parts(alpha="a1/a", beta="b1/b")


@pytest.mark.parametrize(("new", "worse", "said"), [
    (parts(alpha="a2/a", beta="b1/b"), rows("alpha", "alpha", "alpha"), "its expert changed from a1 to a2"),
    (parts(alpha="a2/c", beta="b1/b"), rows("alpha", "alpha", "alpha"),
     "its expert changed from a1 to a2 and learned from another corpus"),
    (parts(alpha="a2/b", beta="b1/b"), rows("alpha", "alpha", "alpha"),
     "its expert changed from a1 to a2 and learned from the corpus of beta"),
    (OLD, rows("alpha", "alpha", "beta"), "the router gives 10 of its 10 rows to beta now"),
    (OLD, rows("alpha", "alpha", "beta", 3) + rows("alpha", "alpha", "base", 3) + rows("alpha", "alpha", "alpha", 4, 0),
     "the router gives 6 of its 10 rows to base and beta now"),
    (parts("Be brief.", alpha="a1/a", beta="b1/b"), rows("alpha", "alpha", "alpha"), "the prompt changed"),
    # Both changed: what the most of the rise comes from.
    (parts(alpha="a2/a", beta="b1/b"), rows("alpha", "alpha", "beta", 2, 0.1) + rows("alpha", "alpha", "alpha", 8),
     "its expert changed from a1 to a2"),
    (parts(alpha="a2/a", beta="b1/b"), rows("alpha", "alpha", "beta", 2, 9) + rows("alpha", "alpha", "alpha", 8),
     "the router gives 2 of its 10 rows to beta now"),
    # Some of its rows were never its own expert's.
    (parts(alpha="a1/a", beta="b2/b"), rows("alpha", "beta", "beta", 4) + rows("alpha", "alpha", "alpha", 6, 0),
     "the expert of beta, which answers 4 of 10 of its rows, changed from b1 to b2"),
    # Losses equal, answers worse.
    (parts(alpha="a2/a", beta="b1/b"), rows("alpha", "alpha", "beta", 5, 0, 0.0) + rows("alpha", "alpha", "alpha", 5, 0,
                                                                                        1.0),
     "its expert changed from a1 to a2"),
    (parts(alpha="a2/a", beta="b1/b"), rows("alpha", "alpha", "alpha", 5, float("nan"))
     + rows("alpha", "alpha", "beta", 5, 9), "its expert changed from a1 to a2"),
])
def test_the_cause_is_what_the_rise_comes_from(new: dict[str, Any], worse: list[dict[str, Any]], said: str) -> None:
    assert attribute_regressions(worse, OLD, new) == {"alpha": said}


def test_a_new_domain_is_compared_with_the_base() -> None:
    new = parts(alpha="a1/a", beta="b1/b", gamma="c1/c")
    own = [{"domain": "gamma", "row": str(number), "challenger_by": "gamma", "challenger_loss": 2.0, "base_loss": 1.0}
           for number in range(5)]
    assert attribute_regressions(own, OLD, new) == {"gamma": "its expert is new"}
    strays = [{**row, "challenger_by": "alpha"} for row in own]
    assert attribute_regressions(strays, OLD, new) == {"gamma": "the router gives 5 of its 5 rows to alpha now"}


def test_a_domain_that_the_challenger_lacks_has_no_cause() -> None:
    gone = [{"domain": "beta", "row": "1", "incumbent_by": "beta", "incumbent_loss": 1.0}]
    assert attribute_regressions(gone, OLD, parts(alpha="a1/a")) == {}


@given(st.lists(st.tuples(st.sampled_from(DOMAINS), st.sampled_from([*DOMAINS, "base"])), max_size=20))
def test_where_nothing_differs_nothing_is_blamed(answered: list[tuple[str, str]]) -> None:
    same = [row for domain, by in answered for row in rows(domain, by, by, 1, 0)]
    assert attribute_regressions(same, OLD, OLD) == {}
