"""What a champion and its workspace disagree on."""

from typing import Any

import pytest

from flows.status import disagreements, text

CHAMPION = {"math": {"digest": "a"}, "sql": {"digest": "b"}}


@pytest.mark.parametrize(("workspace", "found", "said"), [
    ({"math": "a", "sql": "b"}, {}, []),
    ({"math": "a", "law": None}, {"champion_only": ["sql"], "workspace_only": ["law"]},
     ["it has sql, which this workspace lacks", "it lacks law, which this workspace has"]),
    ({"math": "c", "sql": None}, {"expert_differs": ["math", "sql"]},
     ["its expert of math, sql is not the one in this workspace"])])
def test_what_differs_is_named_and_nothing_else(workspace: dict[str, str | None], found: dict[str, list[str]],
                                                said: list[str]) -> None:
    assert disagreements(CHAMPION, workspace) == found
    facts: dict[str, Any] = {
        "workspace": "w", "domains": list(workspace), "champion": "moa version 1", "disagreements": found, "stale": [],
        "unjudged": {}, "pending": [], "due": {"reason": "nothing."}, "arrived": [], "working": None,
        "interrupted": None, "up": None, "troubles": [], "prefect": {"url": None}, "scheduled": [], "ledger": []}
    lines = text(facts).splitlines()
    assert [line.strip() for line in lines[3:3 + len(said)]] == said
    assert lines[3 + len(said)].startswith("stale")


def test_a_domain_that_the_gate_cannot_judge_is_named_with_the_rows_that_it_lacks() -> None:
    facts = {"workspace": "w", "domains": ["math", "sql"], "champion": "moa version 1", "disagreements": {},
             "unjudged": {"sql": 1200}, "stale": [], "pending": [], "due": {"reason": "nothing."}, "arrived": [],
             "working": None, "interrupted": None, "up": None, "troubles": [], "prefect": {"url": None},
             "scheduled": [], "ledger": []}
    assert text(facts).splitlines()[3] == (
        "gate       cannot judge sql, which has too few test rows: about 1,200 more rows are needed")
