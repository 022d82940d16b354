"""A change happens as a whole or not at all: `domain add` and `domain remove` are ended before every step they take on
the disk, and what the next command finds is the old state or the new one."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from moa.core import config, transaction
from moa.core.errors import ArtifactError, DataError, PipelineError
from moa.core.paths import Workspace
from moa.workspace import domains
from moa.workspace import plan as planning
from moa.workspace.data_versions import DataVersions
from moa.workspace.init import init
from moa.workspace.pipeline import Pipeline

# What Python tells auditors before it does it; `open` counts when it is for writing.
STEPS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod", "os.truncate", "shutil.copyfile"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OWN = (".git", ".dvc", ".moa")   # not part of the state; DVC's cache may hold more than it needs
PROBE = re.compile(r"\.[\w-]{22}\.tmp")   # DVC tries what links the disk knows with these; git and DVC ignore them
ROWS = "".join(json.dumps({"instruction": f"Ask {number}?", "output": f"Say {number}."}) + "\n" for number in range(40))
Action = Callable[[Workspace], object]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the domains tax and sport; tax has a comment behind it."""
    folder = tmp_path_factory.mktemp("change")
    (folder / "base").mkdir()
    init(folder / "w", f"path:{folder / 'base'}", folder)
    workspace = Workspace(folder / "w")
    for name in ("tax", "sport", "more"):
        (folder / f"{name}.jsonl").write_text(ROWS.replace("Ask", name))
    for name in ("tax", "sport"):
        domains.add(workspace, name, [f"{name}.jsonl"], folder, {})
    text = workspace.params.read_text()
    workspace.params.write_text(text.replace("  tax:", "  # the first\n  tax:   # of two"))
    for output in (workspace.corpus("tax"), workspace.expert("tax")):
        output.mkdir(parents=True)
        (output / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def copied(template: Path, tmp_path: Path) -> Callable[[], Workspace]:
    """Makes the workspace anew."""
    def make() -> Workspace:
        shutil.rmtree(tmp_path / "w", ignore_errors=True)
        return Workspace(shutil.copytree(template / "w", tmp_path / "w", symlinks=True))
    return make


def state(workspace: Workspace) -> tuple[dict[str, bytes], Any]:
    """Every file of people's and of DVC's, and the plan."""
    files = {path.relative_to(workspace.root).as_posix(): path.read_bytes()
             for path in sorted(workspace.root.rglob("*")) if path.is_file() and not PROBE.fullmatch(path.name)
             and path.relative_to(workspace.root).parts[0] not in OWN}
    content = config.load(workspace.params)
    plan = planning.make_plan(Pipeline(workspace).snapshot(), content, planning.Statistics.read(workspace, content))
    return files, plan.as_dict()


def ended(workspace: Workspace, action: Action, step: int | None) -> bool:
    """Let a process do `action` and end it, as SIGKILL would, before its `step`-th step. Whether it was ended."""
    child = os.fork()
    if child == 0:
        status, count, root = 1, 0, str(workspace.root)

        def audit(event: str, words: tuple[Any, ...]) -> None:
            nonlocal count
            writing = event == "open" and isinstance(words[2], int) and words[2] & WRITING
            if (writing or event in STEPS) and isinstance(words[0], str | os.PathLike):
                path = os.fspath(words[0])
                if path.startswith(root) and "/.dvc/" not in path and "/.git/" not in path:
                    count += 1
                    if count == step:
                        os._exit(9)
        sys.addaudithook(audit)
        try:
            action(workspace)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def add_new(workspace: Workspace, sources: Path) -> object:
    return domains.add(workspace, "law", ["tax.jsonl", "more.jsonl"], sources, {"metric": "json_equal"})


def add_more(workspace: Workspace, sources: Path) -> object:
    return domains.add(workspace, "tax", ["more.jsonl"], sources, {})


def remove_one(workspace: Workspace, _sources: Path) -> object:
    return domains.remove(workspace, "tax")


@pytest.mark.slow
@pytest.mark.parametrize("command", [add_new, add_more, remove_one])
def test_killed_at_any_step_it_leaves_the_old_state_or_the_new(
        command: Callable[[Workspace, Path], object], template: Path, copied: Callable[[], Workspace]) -> None:
    def action(workspace: Workspace) -> object:
        return command(workspace, template)

    old = state(copied())
    workspace = copied()
    assert not ended(workspace, action, None)
    new = state(workspace)
    assert new != old
    seen = []
    every = 1 if os.environ.get("MOA_EVERY_STEP") else 3
    for step in range(1, 500, every):
        workspace = copied()
        if not ended(workspace, action, step):
            break
        transaction.recover(workspace)
        found = state(workspace)
        assert found in (old, new), f"step {step}"
        assert not workspace.journal.exists()
        seen.append(found == new)
    assert len(seen) * every > 15 and seen == sorted(seen) and not seen[0] and seen[-1]   # one commit, from old to new


@pytest.mark.slow
def test_undoing_can_itself_be_killed(template: Path, copied: Callable[[], Workspace]) -> None:
    old = state(copied())
    for step in range(1, 100):
        workspace = copied()
        with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
            patch.setattr(transaction, "undo", lambda _: [])   # the process is gone
            patch.setattr(DataVersions, "add", _interrupt)
            add_more(workspace, template)
        assert workspace.journal.exists() and state(workspace) != old
        survived = not ended(workspace, transaction.recover, step)
        transaction.recover(workspace)
        assert state(workspace) == old
        if survived:
            break
    assert step > 5


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("error", "said"), [
    (KeyboardInterrupt("ended"), "ended"),
    (OSError(28, "No space left on device"), r"^`moa domain add law` failed \(No space left on device\); nothing was")])
def test_an_error_in_the_middle_is_undone_at_once(error: BaseException, said: str, template: Path,
                                                  copied: Callable[[], Workspace],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    workspace = copied()
    old = state(workspace)
    monkeypatch.setattr(domains, "_note_origins", fail)
    with pytest.raises((KeyboardInterrupt, ArtifactError), match=said):
        add_new(workspace, template)
    assert state(workspace) == old and not workspace.journal.exists()


def test_a_source_that_changes_while_it_is_copied(template: Path, copied: Callable[[], Workspace],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = copied()
    old = state(workspace)
    copy = shutil.copyfile
    monkeypatch.setattr("moa.workspace.row_sources.shutil.copyfile",
                        lambda source, target: copy(template / "sport.jsonl", target))
    with pytest.raises(DataError, match=r"more.jsonl changed while it was copied"):
        add_more(workspace, template)
    assert state(workspace) == old


def test_what_somebody_did_since_is_kept(template: Path, copied: Callable[[], Workspace]) -> None:
    workspace = copied()
    old = state(workspace)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(transaction, "undo", lambda _: [])
        patch.setattr("moa.workspace.domains.parameters.load", _after_writing(workspace))
        add_new(workspace, template)
    workspace.params.write_text(workspace.params.read_text() + "# mine\n")
    (workspace.raw("law") / "mine.jsonl").write_text(ROWS)
    said = transaction.recover(workspace)
    assert state(workspace) == old
    assert (workspace.displaced / "params.yaml").read_text().endswith("# mine\n")
    assert (workspace.displaced / "data/raw/law/mine.jsonl").read_text() == ROWS
    assert said == ["an interrupted `moa domain add law` was undone.",
                    "params.yaml had been edited since: that is kept as .moa/kept/params.yaml.",
                    "data/raw/law had been edited since: that is kept as .moa/kept/data/raw/law/mine.jsonl."]


def _after_writing(workspace: Workspace) -> Callable[[Path], config.Config]:
    """params.yaml is read before the change, and again when it was written: then the process is gone."""
    before, load = workspace.params.read_bytes(), config.load

    def read(path: Path) -> config.Config:
        if path.read_bytes() != before:
            raise KeyboardInterrupt
        return load(path)
    return read


def test_a_change_that_is_being_made_is_left_alone(copied: Callable[[], Workspace], template: Path) -> None:
    workspace = copied()
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(transaction, "undo", lambda _: [])
        patch.setattr(DataVersions, "add", _interrupt)
        add_more(workspace, template)
    with FileLock(workspace.lock):
        assert transaction.recover(workspace) == [] and workspace.journal.exists()
        with pytest.raises(PipelineError, match="Another moa run"):
            add_more(workspace, template)
    add_more(workspace, template)   # undoes it itself, under its own lock
    assert len(list(workspace.raw("tax").iterdir())) == 2
