"""kill -9 at any step of a release: a process of its own registers, gates and promotes on real MLflow, and is killed
before one of the steps it takes. Each MLflow call, each write to the database and its commit, and each step on the disk
is such a step.

Whatever it leaves has one champion (or still none, before the first), whose files and whose experts are all there and
which the gate passed; and the same command again ends where it would have ended, with nothing there twice.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from flows.steps import release
from moa.core import digests
from moa.core.paths import Workspace
from moa.release import mlflow_client
from moa.release.registry import Registry
from tests.integration.release.test_registry import CONFIG, build, rows

Action = Callable[[Workspace], object]
# What Python tells auditors before it does it; `open` counts when it is for writing.
STEPS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.copyfile", "shutil.move"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("INSERT", "UPDATE", "DELETE")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A workspace whose database MLflow has opened here, without a connection left open: a forked child goes on."""
    from mlflow.tracking import MlflowClient

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
        patch.setattr("flows.steps.release.compare", lambda *_: rows(-0.2))
        root = tmp_path_factory.mktemp("faults")
        patch.chdir(root)
        workspace = Workspace(root / "w")
        workspace.mlflow.mkdir(parents=True)
        workspace.params.write_text("{}")
        (workspace.root / "dvc.yaml").write_text("{}")
        mlflow_client.quiet_mlflow()
        address = mlflow_client.uri(workspace)
        import mlflow.artifacts
        import mlflow.pyfunc  # noqa: F401  loaded once, not by every child

        MlflowClient(address, address).search_experiments()
        MlflowClient(address, address).search_registered_models()
        yield workspace


class Copies:
    """The workspace as it was, at the same path each time: MLflow has its database open by that."""

    def __init__(self, workspace: Workspace, kept: Path) -> None:
        self.workspace, self.kept = workspace, kept
        shutil.copytree(workspace.root, kept)

    def again(self) -> Workspace:
        shutil.rmtree(self.workspace.root)
        shutil.copytree(self.kept, self.workspace.root)
        return self.workspace


def in_a_process(workspace: Workspace, action: Action, step: int | None, seen: Path | None = None) -> bool:
    """Let a forked process do `action`, killed before its `step`-th step. Whether it was; `seen` gets a line a step."""
    child = os.fork()
    if child == 0:
        status, count, inside = 1, 0, False
        root = str(workspace.root)

        def taken(what: str) -> None:
            nonlocal count, inside
            if inside:
                return
            inside = True
            count += 1
            if seen is not None:
                with seen.open("a") as file:
                    file.write(what + "\n")
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            inside = False

        try:
            _listen(taken, root)
            action(workspace)
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def _listen(taken: Callable[[str], None], root: str) -> None:
    """Call `taken` before every step of this process."""
    from mlflow.tracking import MlflowClient
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **named: Any) -> Any:
            taken(f"call {name}")
            return real(*words, **named)
        return call

    for name in dir(MlflowClient):
        if not name.startswith("_") and callable(real := getattr(MlflowClient, name)):
            setattr(MlflowClient, name, wrapped(name, real))

    def executes(_: Any, __: Any, statement: str, *___: Any) -> None:
        if statement.lstrip().upper().startswith(CHANGES):
            taken(f"sql {' '.join(statement.split()[:3])}")

    event.listen(Engine, "before_cursor_execute", executes)
    event.listen(Engine, "commit", lambda _: taken("commit"))

    def audit(what: str, words: tuple[Any, ...]) -> None:
        writing = what == "open" and isinstance(words[2], int) and words[2] & WRITING
        if (writing or what in STEPS) and isinstance(words[0], str | os.PathLike) and os.fspath(
                words[0]).startswith(root):
            taken(f"disk {what} {Path(words[0]).name}")

    sys.addaudithook(audit)


def steps_of(workspace: Workspace, action: Action, log: Path) -> list[str]:
    """Every step that `action` takes, by its kind and name."""
    log.unlink(missing_ok=True)
    assert not in_a_process(workspace, action, None, log)
    return log.read_text().splitlines()


def points(steps: list[str], count: int) -> list[int]:
    """Numbers of the steps to be killed before: where the gate's word, the history and the alias are written, the last
    one, and `count` others, evenly; all of them with MOA_EVERY_STEP."""
    everything = range(1, len(steps) + 1)
    if os.environ.get("MOA_EVERY_STEP"):
        return list(everything)
    setting = [number for number in everything if steps[number - 1].startswith(("call set_model", "call set_reg"))]
    return sorted({*setting, *everything[::-(-len(steps) // count)][:count], len(steps)})


# What must be true whenever a process is killed.

def champion_is_whole(workspace: Workspace, allowed: set[int | None]) -> int | None:
    """The champion, one of `allowed`: with its files, its experts, a gate that it passed, and its place in history."""
    registry = Registry(workspace, CONFIG)
    version, history = registry.champion(), registry.history()
    assert (version.version if version else None) in allowed
    if version is None:
        return None
    registry.check(version)   # every file, as it was registered
    assert version.gate is not None and version.gate["promote"]
    for domain, pin in version.experts.items():
        expert = registry.client.get_model_version(pin["name"], str(pin["version"]))
        assert expert.tags["moa.digest"] == pin["digest"]
        model = registry.client.get_logged_model(expert.source.rpartition("/")[2])
        stored = Path(urlparse(model.artifact_location).path)
        assert digests.by_name(stored) == json.loads(expert.tags["moa.files"]), domain
    served = [entry for entry in history if entry.effective]
    assert served and served[-1].version == version.version
    return version.version


def content(workspace: Workspace) -> dict[str, Any]:
    """What MLflow holds, but for times and random names."""
    registry = Registry(workspace, CONFIG)
    client, experiment = registry.open()
    return {"runs": sorted((run.data.tags["moa.digest"], run.info.status) for run in client.search_runs([experiment])),
            "models": len(client.search_logged_models([experiment])),
            "versions": sorted((each.name, int(each.version), each.tags["moa.digest"])
                               for each in client.search_model_versions()),
            "history": [(entry.n, entry.version, entry.previous, entry.reason, entry.effective)
                        for entry in registry.history()],
            "champion": registry.get("champion").version}


def killed_everywhere(copies: Copies, action: Action, allowed: list[int | None], log: Path, count: int) -> int:
    """Kill `action` at its steps, one after the other; how many. The champion changes once, from first to last."""
    workspace = copies.again()
    steps = steps_of(workspace, action, log)
    whole = content(workspace)
    found = []
    for step in points(steps, count):
        workspace = copies.again()
        assert in_a_process(workspace, action, step), f"step {step}, {steps[step - 1]}, was not reached"
        found.append(champion_is_whole(workspace, set(allowed)))
        action(workspace)
        assert content(workspace) == whole, f"step {step}, {steps[step - 1]}"
    assert found == sorted(found, key=allowed.index) and found[0] == allowed[0]
    return len(found)


def run_release(workspace: Workspace) -> object:
    return release.release(workspace, CONFIG)


@pytest.fixture(scope="module")
def empty(place: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Copies:
    """Built, nothing released."""
    build(place)
    return Copies(place, tmp_path_factory.mktemp("kept") / "empty")


@pytest.fixture(scope="module")
def waiting(empty: Copies, tmp_path_factory: pytest.TempPathFactory) -> Copies:
    """Version 1 is champion, a better version 2 waits."""
    workspace = empty.again()
    run_release(workspace)
    build(workspace, "better")
    release.release(workspace, CONFIG, promote=False)
    return Copies(workspace, tmp_path_factory.mktemp("kept") / "waiting")


def test_the_first_release(empty: Copies, tmp_path: Path) -> None:
    assert killed_everywhere(empty, run_release, [None, 1], tmp_path / "steps", count=6) > 7


def test_a_release_that_follows_another(empty: Copies, tmp_path: Path) -> None:
    workspace = empty.again()
    run_release(workspace)
    build(workspace, "better")
    copies = Copies(workspace, tmp_path / "second")
    assert killed_everywhere(copies, run_release, [1, 2], tmp_path / "steps", count=10) > 11


def test_an_approval(waiting: Copies, tmp_path: Path) -> None:
    def approve(workspace: Workspace) -> object:
        return release.approve(workspace, CONFIG, 2)

    assert killed_everywhere(waiting, approve, [1, 2], tmp_path / "steps", count=5) > 6


def test_a_rollback(waiting: Copies, tmp_path: Path) -> None:
    workspace = waiting.again()
    release.approve(workspace, CONFIG, 2)
    copies = Copies(workspace, tmp_path / "approved")

    def back(workspace: Workspace) -> object:
        # Again after it was killed, somebody looks first.
        if Registry(workspace, CONFIG).get("champion").version == 1:
            return release.promote(workspace, CONFIG, 1, "rollback from version 2")
        return release.roll_back(workspace, CONFIG)

    assert killed_everywhere(copies, back, [2, 1], tmp_path / "steps", count=5) > 6
