"""What an adaptation by hand waits for, and which domains it takes out of a release that the gate does not pass."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from flows.steps.learning import MOST_WAITS, blamed, check_acceptance, wait_until_settled
from moa.core.errors import UsageError
from moa.core.paths import Workspace
from moa.workspace import incoming
from tests import toy

SETTLE = 0.2


def arrived(root: Path) -> Path:
    path = root / "data" / "incoming" / "math" / "rows.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("{}\n")
    return path


def test_what_was_just_written_is_waited_for(tmp_path: Path) -> None:
    path = arrived(tmp_path)
    wait_until_settled(Workspace(tmp_path), SETTLE)
    assert time.time() - path.stat().st_mtime >= SETTLE


def test_nothing_is_waited_for_where_nothing_was_just_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.steps.learning.time.sleep", lambda _: pytest.fail("it waits"))
    wait_until_settled(Workspace(tmp_path), SETTLE)
    os.utime(arrived(tmp_path), (1e9, 1e9))
    wait_until_settled(Workspace(tmp_path), SETTLE)


def test_a_file_that_keeps_growing_is_left_to_the_next_run(tmp_path: Path) -> None:
    path, done = arrived(tmp_path), threading.Event()

    def write() -> None:
        while not done.wait(SETTLE / 20):
            path.open("a").write("{}\n")

    writer = threading.Thread(target=write)
    writer.start()
    began = time.monotonic()
    wait_until_settled(Workspace(tmp_path), SETTLE)
    assert time.monotonic() - began >= MOST_WAITS * SETTLE
    done.set()
    writer.join()


def decision(verdicts: dict[str, str], harm: bool = False, worse: tuple[str, ...] = (),
             lost: dict[str, dict[str, int]] | None = None) -> dict[str, Any]:
    return {"promote": False, "harm": harm, "worse": list(worse),
            "domains": {name: {"verdict": verdict} for name, verdict in verdicts.items()},
            "routing": {"domains": {name: {"lost": to} for name, to in (lost or {}).items()}}}


@pytest.mark.parametrize(("given", "refused", "deferred"), [
    # Domains that fail are refused, and the others are tried again without them, whatever was said of those.
    (decision({"math": "fail", "law": "not enough data", "tax": "pass"}, True, ("math",)), ["math"], {}),
    (decision({"sql": "fail", "law": "pass"}, True, ("sql",), {"sql": {"law": 9}}), ["law"], {}),   # law takes its rows
    (decision({"sql": "fail"}, True, ("sql",)), ["law", "math", "tax"], {}),   # none of them is to blame
    (decision({"math": "not enough data", "law": "pass", "tax": "no better"}), [], {"math": "math", "tax": "tax"}),
    (decision({"math": "pass", "law": "pass", "tax": "pass"}), [], {}),
    (decision({"math": "pass", "law": "pass", "tax": "pass", "sql": "not enough data"}), [],
     {"law": "sql", "tax": "sql"}),   # with the new domains the router has changed
    ({"promote": False, "harm": False}, [], {}), ({"promote": True}, [], {})])
def test_who_is_taken_out_of_a_release(given: dict[str, Any], refused: list[str], deferred: dict[str, str]) -> None:
    """math is known and has new rows, law and tax are new, sql is known and has none."""
    assert blamed(given, ["law", "math", "tax"], ["law", "tax"]) == (refused, deferred)


def test_an_acceptance_needs_refused_rows_and_a_reason(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.params.write_text(toy.PARAMS)
    (tmp_path / "good.jsonl").write_text('{"instruction": "Ask?", "output": "Say."}\n')
    (tmp_path / "bad.jsonl").write_text("{\n")
    assert check_acceptance(workspace, None, "") == ""
    with pytest.raises(UsageError, match="--reason TEXT goes with --accept NAME"):
        check_acceptance(workspace, None, "I know")
    with pytest.raises(UsageError, match="--accept NAME needs --reason TEXT"):
        check_acceptance(workspace, "math", "  ")
    incoming.reject(workspace, "math", [tmp_path / "bad.jsonl"], "unreadable")
    with pytest.raises(UsageError, match="No rows of math were refused: data/incoming/"):
        check_acceptance(workspace, "math", "I know")
    incoming.reject(workspace, "math", [tmp_path / "good.jsonl"], "the gate refused it")
    assert check_acceptance(workspace, "math", " I know ") == "I know"
    taken, = incoming.take_back(workspace, "math", incoming.refused_files(workspace, "math"))
    assert taken.path == workspace.incoming / "math" / "good.jsonl" and taken.path.read_text().startswith('{"instr')
    assert sorted(path.name for path in (workspace.quarantine / "math").iterdir()) == ["bad.jsonl",
                                                                                       "bad.jsonl.reason.json"]
