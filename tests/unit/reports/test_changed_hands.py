"""Known prompts that changed hands: against the champion's rows, in a comparison, as text and in the page."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moa.core.config import Config
from moa.core.files import write_json
from moa.core.paths import MANIFEST, Workspace
from moa.data import corpus
from moa.mixture import incumbent
from moa.reports import changed_hands
from moa.reports import facts as report_facts
from moa.reports import page as report_page

CONFIG = Config.model_validate({"base": {"source": "path:toy"}, "domains": {"law": {"metric": "rouge_l"}}})
BASE = {"weights": "w", "tokenizer": "t", "template": "p"}


def identity(number: int) -> str:
    return f"{number:08x}" + "0" * 24


def rows(*answered: tuple[str, float]) -> list[dict[str, Any]]:
    """An evaluation's rows of the domain `law`: by whom each is answered, and its loss, under `routed`."""
    return [{"domain": "law", "row": identity(number), "system": system, "answered_by": by, "loss": loss, "tokens": 3,
             "score": None} for number, (by, loss) in enumerate(answered) for system in ("base", "forced", "routed")]


def write(folder: Path, content: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(content), folder / incumbent.ROWS)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A champion, and a mixture whose router gives row 1 to the base and row 2 to another expert."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = Workspace(tmp_path)
    write(made.champion, rows(("law", 1.0), ("law", 1.0), ("law", 2.0)))
    write(made.reports, rows(("law", 1.5), ("base", 3.25), ("sql", 1.5)))
    write_json(made.champion / MANIFEST, {"digest": "1" * 64, "base": BASE})
    write_json(made.mixture / MANIFEST, {"digest": "2" * 64, "base": BASE, "router": {"rule": "early", "layer": 1}})
    talk = [{"role": "user", "content": "Who owns\n<b>the tree</b>?"}, {"role": "assistant", "content": "She."}]
    made.corpus("law").mkdir(parents=True)
    pq.write_table(corpus.table([corpus.Row(identity(1), tuple(talk), 1, 1)]), made.corpus("law") / "test.parquet")
    write_json(made.corpus("law") / MANIFEST, {"digest": "l" * 64, "rows": {}})
    return made


def test_against_the_champion(workspace: Workspace) -> None:
    found = changed_hands.since_champion(workspace)
    assert found is not None and (found["before"], found["now"]) == ("the champion", "this workspace")
    assert [(row["row"], row["before"], row["after"], row["rise"], row["question"]) for row in found["rows"]] == [
        (identity(1), "law", "base", 2.25, "Who owns <b>the tree</b>?"), (identity(2), "law", "sql", -0.5, "")]
    assert changed_hands.text(found) == """\
2 known prompts changed hands from the champion to this workspace, the worst rise of loss first:
domain  row       before -> now  loss              rise  question
law     00000001  law -> base    1.000 -> 3.250  +2.250  Who owns <b>the tree</b>?
law     00000002  law -> sql     2.000 -> 1.500  -0.500"""
    html = report_page.render(report_facts.gather(workspace, CONFIG))
    assert "Who owns &lt;b&gt;the tree&lt;/b&gt;?</td><td>law</td><td>base</td>" in html
    assert "2 known prompts changed hands from the champion to this workspace" in html


def test_none_moved_is_said(workspace: Workspace) -> None:
    write(workspace.reports, rows(("law", 9.0), ("law", 1.0), ("law", 2.0)))
    found = changed_hands.since_champion(workspace)
    assert changed_hands.text(found) == "No known prompt changed hands."
    assert "<p>No known prompt changed hands.</p>" in report_page.render(report_facts.gather(workspace, CONFIG))


@pytest.mark.parametrize("case", ["no champion", "the champion itself", "no rows of its own", "another base"])
def test_without_two_evaluations_nothing_is_shown(workspace: Workspace, case: str) -> None:
    manifest = {"digest": "2" * 64, "base": BASE}
    if case == "no champion":
        (workspace.champion / MANIFEST).unlink()
        (workspace.champion / incumbent.ROWS).unlink()
    elif case == "the champion itself":
        write_json(workspace.champion / MANIFEST, manifest)
    elif case == "no rows of its own":
        (workspace.reports / incumbent.ROWS).unlink()
    else:
        write_json(workspace.champion / MANIFEST, {**manifest, "digest": "1" * 64, "base": BASE | {"weights": "x"}})
    assert changed_hands.since_champion(workspace) is None
    assert changed_hands.text(None) == "" and changed_hands.section(None) is None
    assert "changed hands" not in report_page.render(report_facts.gather(workspace, CONFIG))


def test_a_comparison_has_the_rows_that_both_releases_answered(workspace: Workspace) -> None:
    both = {"domain": "law", "incumbent_by": "law", "incumbent_loss": 1.0, "challenger_loss": 2.0}
    compared = {"incumbent": 1, "challenger": 2, "rows": [
        {**both, "row": identity(0), "challenger_by": "law"}, {**both, "row": identity(1), "challenger_by": "base"},
        {"domain": "new", "row": identity(7), "challenger_by": "new", "challenger_loss": 1.0, "base_loss": 2.0}]}
    found = changed_hands.of_comparison(workspace, compared)
    assert found is not None and (found["before"], found["now"]) == ("version 1", "version 2")
    assert [row["row"] for row in found["rows"]] == [identity(1)]
    assert changed_hands.text(found).startswith("1 known prompt changed hands from version 1 to version 2, the worst")


def test_releases_of_a_workspace_without_a_registry_make_none(workspace: Workspace) -> None:
    assert changed_hands.of_releases(workspace, CONFIG, 1, 2) is None and not workspace.mlflow.exists()
    assert changed_hands.of_releases(workspace, CONFIG, None, 1) is None   # the first release


def test_many_are_cut_short(workspace: Workspace) -> None:
    number = changed_hands.IN_PAGE + 5
    write(workspace.champion, rows(*[("law", 1.0)] * number))
    write(workspace.reports, rows(*[("base", 1.0 + place) for place in range(number)]))
    found = changed_hands.since_champion(workspace)
    assert changed_hands.text(found).endswith("\n... and 95 more.")
    html = report_page.render(report_facts.gather(workspace, CONFIG))
    assert '<p class="soft">... and 5 more.</p>' in html
