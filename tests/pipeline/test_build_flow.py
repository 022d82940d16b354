"""The build under a real Prefect server: the states that Prefect has seen, asked of Prefect itself."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import toy

from flows import server
from flows.launch import run
from flows.session import Options
from moa.workspace import Workspace

EVERYTHING = {"base", "prepare@math", "prepare@sql", "train@math", "train@sql", "assemble", "evaluate"}


@pytest.fixture(scope="module")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of our own, started as `moa run` starts one, once for this module."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"):
            patch.delenv(name, raising=False)
            patch.setenv(name, "")   # so that what the server sets is taken back
            os.environ.pop(name)
        patch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "site"))
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("home")))
        home = Workspace(tmp_path_factory.mktemp("server"))
        with server.running(home) as started:
            assert started.own
            yield started.ready()
        assert not server.answers(started.url)
        assert (home.prefect / "prefect.db").exists()   # history stays


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setattr("moa.experts.finished", toy.finished)
    monkeypatch.setattr("flows.session._release_hooks", lambda *_: [("register", lambda: {"version": 1})])
    return toy.make(tmp_path / "w")


def last_run(url: str) -> tuple[str, dict[str, str]]:
    """State of the newest flow run, and of each of its task runs, by Prefect's own account."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.client.schemas.sorting import FlowRunSort

    server.Server(url).settle()
    with get_client(sync_client=True) as client:
        newest = client.read_flow_runs(limit=1, sort=FlowRunSort.START_TIME_DESC)[0]
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[newest.id])))
        assert newest.state is not None
        return newest.state.name, {task.name: task.state.name for task in tasks if task.state}


def test_states(prefect_url: str, workspace: Workspace) -> None:
    toy.control(workspace, fail=["train@math"])
    result = run(workspace, Options())
    assert str(result.failure()).startswith("Failed: train@math.")
    flow, tasks = last_run(prefect_url)
    assert flow == "Failed"
    assert tasks["train@math"] == "Failed" and tasks["train@sql"] == "Completed"
    assert tasks["assemble"] == tasks["evaluate"] == "Skipped" and "register" not in tasks

    toy.control(workspace)
    toy.runs(workspace)
    assert run(workspace, Options()).failure() is None
    assert toy.runs(workspace) == ["assemble", "evaluate", "train math"]
    flow, tasks = last_run(prefect_url)
    assert flow == "Completed"
    assert {name for name, state in tasks.items() if state == "Cached"} == {"base", "prepare@math", "prepare@sql",
                                                                           "train@sql"}
    assert tasks["train@math"] == tasks["evaluate"] == tasks["register"] == "Completed"

    result = run(workspace, Options())
    assert last_run(prefect_url) == ("Completed", {**dict.fromkeys(EVERYTHING, "Cached"), "register": "Completed"})
    assert result.release == {"version": 1} and not toy.runs(workspace)


def test_without_prefect_the_same_happens(prefect_url: str, workspace: Workspace, tmp_path: Path) -> None:
    other = Workspace(shutil.copytree(workspace.root, tmp_path / "other"))
    local, under_prefect = run(workspace, Options(), local=True).as_dict(), run(other, Options()).as_dict()
    for result in (local, under_prefect):
        result.pop("seconds")
    assert local == under_prefect
    assert toy.runs(workspace) == toy.runs(other)
    assert toy.value(workspace.mixture) == toy.value(other.mixture)
