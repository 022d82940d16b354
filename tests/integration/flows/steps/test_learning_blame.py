"""Who is to blame for a failed stage, its rows or the machine: decided by the error that its process hands over."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.steps import learning
from flows.steps.adaptation_state import AdaptationState
from flows.steps.run_context import RunContext
from flows.steps.runner import LocalRunner
from flows.steps.session import BuildOptions, open_session
from flows.steps.stage_order import build
from moa.core.errors import PipelineError
from moa.workspace.data_versions import DataVersions
from tests import tiny, toy


@pytest.fixture
def work(tmp_path: Path) -> RunContext:
    """A tiny workspace whose domain alpha has rows that DVC tracks, and nothing built yet."""
    workspace = tiny.workspace(tmp_path / "w", ("alpha",))
    shutil.copy(tiny.REPOSITORY / "data" / ".gitignore", workspace.data / ".gitignore")
    subprocess.run(["git", "init", "-q", workspace.root], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=workspace.root, check=True)
    context = RunContext(workspace, DataVersions(workspace), LocalRunner(1))
    context.versions.add(workspace.raw("alpha"))
    return context


def tried(work: RunContext, name: str, text: str) -> tuple[bool, AdaptationState]:
    """Add a file of rows to alpha and try to learn it. Returns whether the error was raised, and the state."""
    attempt = AdaptationState.begin("a test")
    attempt.note(work.workspace, {"alpha": True})
    (work.workspace.raw("alpha") / name).write_text(text, encoding="utf-8")
    work.versions.add(work.workspace.raw("alpha"))
    with work.versions.lock():
        try:
            assert learning._try(work, attempt, attempt.touched(work.workspace)) is None
        except PipelineError as error:
            assert error.stage == "prepare@alpha" and error.cause is not None
            return True, attempt
    return False, attempt


def test_a_full_disk_is_the_machines_fault(work: RunContext) -> None:
    pipeline = work.workspace.root / "dvc.yaml"   # 4 KiB is the largest file that this stage can write
    pipeline.write_text(pipeline.read_text().replace("cmd: moa prepare", "cmd: ulimit -f 8; moa prepare"))
    raised, attempt = tried(work, "more.jsonl", "".join(json.dumps(tiny.row("alpha", number)) + "\n"
                                                        for number in range(1000, 1400)))
    assert raised and not attempt.refused
    assert (work.workspace.raw("alpha") / "more.jsonl").exists()


def test_rows_are_at_fault_whatever_words_they_hold(work: RunContext) -> None:
    name = "No space left on device, disk was interrupted.jsonl"
    raised, attempt = tried(work, name, "{\n" * 100)
    assert not raised and name in attempt.refused["alpha"]


# Trainings, which run in one process for several domains.

RECORDS: dict[str, dict[str, Any]] = {
    "rows": {"error": "TrainingError", "errno": None, "message": "The loss on `Input/output error` is not finite."},
    "disk": {"error": "OSError", "errno": 28, "message": "It cannot be written."},
    "old": {"error": "DataError", "errno": 28, "message": "It cannot be read."},
    "base": {"error": "BaseModelError", "errno": None, "message": "The base is gone."}}


@pytest.mark.parametrize(("records", "refused"), [
    (["rows"], True), (["disk"], False), (["old"], False), (["base"], False), (["rows", "disk"], False),
    (["disk", "rows"], False), ([], False)])
def test_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[str], refused: bool) -> None:
    workspace = toy.make(tmp_path / "w")
    monkeypatch.chdir(workspace.root)
    monkeypatch.setattr("flows.steps.session._finished", toy.finished)
    versions = DataVersions(workspace)
    versions.add(workspace.raw("math"))
    attempt = AdaptationState.begin("a test")
    attempt.note(workspace, {"math": True})
    toy.add_rows(workspace, "math", "more")
    versions.add(workspace.raw("math"))
    toy.control(workspace, errors={"train@math": [RECORDS[name] for name in records]})
    with open_session(workspace, BuildOptions()) as session:
        session.hooks = ()
        result = build(session, LocalRunner(1))
    assert result.named("failed") == ["train@math"]
    error = result.outcomes["train@math"].error
    assert isinstance(error, PipelineError) and error.cause is not None and error.cause.status == 1
    work, failure = RunContext(workspace, versions, LocalRunner(1)), PipelineError("The build failed.")
    try:
        learning._blame(work, attempt, {"train@math": error}, failure)
    except PipelineError as raised:
        assert raised is failure and not refused and not attempt.refused
    else:
        assert refused and attempt.refused.keys() == {"math"}
        assert "The loss on `Input/output error` is not finite." in attempt.refused["math"]
