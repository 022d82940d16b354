"""Rows that wait for others: remembered, counted and said."""

from pathlib import Path

from flows.steps import deferral
from flows.steps.deferral import Deferral
from moa.core.config import Config, load
from moa.core.paths import Workspace
from tests import toy


def configured(root: Path, extra: str = "") -> tuple[Workspace, Config]:
    workspace = Workspace(root)
    workspace.params.write_text(toy.PARAMS + extra)
    return workspace, load(workspace.params)


def test_entries_last_until_their_rows_are_tried_again_or_the_rules_change(tmp_path: Path) -> None:
    workspace, config = configured(tmp_path)
    assert deferral.read(workspace, config) == {}
    law = Deferral(deferral.NOT_ENOUGH, 370, 120, deferral.rules_of(config))
    tax = Deferral(deferral.NO_BETTER, 40, 10, deferral.rules_of(config), "sql", 500)
    deferral.note(workspace, config, {"law": law})
    deferral.note(workspace, config, {"tax": tax})
    assert deferral.read(workspace, config) == {"law": law, "tax": tax}
    workspace, other = configured(tmp_path, "release: {min_rows: 5}\n")
    assert deferral.read(workspace, other) == {}   # under other rules other rows are lacking, or none
    deferral.forget(workspace, config, ["law", "math"])
    assert deferral.read(workspace, config) == {"tax": tax}
    deferral.forget(workspace, config, ["tax"])
    assert not workspace.deferrals.exists()
    workspace.deferrals.write_text("{")
    assert deferral.read(workspace, config) == {}


def test_what_is_lacking(tmp_path: Path) -> None:
    own = Deferral(deferral.NOT_ENOUGH, 370, 120, "")
    assert [own.lacks(rows, 0, 0) for rows in (250, 300, 370, 400)] == [120, 70, 0, -30]
    others = Deferral(deferral.NOT_ENOUGH, 370, 120, "", "sql", 500)
    assert [others.lacks(250, *rows) for rows in ((0, 500), (20, 500), (20, 600))] == [120, 100, 0]
    assert deferral.reason("law", own) == "not enough data: 120 more rows of law"
    assert deferral.reason("law", others) == "not enough data: 120 more rows of sql"
    assert deferral.sentence(deferral.NO_BETTER, 1, "law") == "no better than what answers today: 1 more row of law"
