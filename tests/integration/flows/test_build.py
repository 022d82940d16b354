"""The build under a real Prefect server: the states that Prefect has seen, asked of Prefect itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows import prefect_server
from flows.launch import run
from flows.prefect_api import Api
from flows.steps.session import BuildOptions, open_session
from moa.core.config import load
from moa.core.paths import Workspace
from moa.mixture import incumbent
from tests import toy

EVERYTHING = {"base", "prepare@math", "prepare@sql", "train@math", "train@sql", "assemble", "evaluate"}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setattr("moa.experts.train.finished", toy.finished)
    monkeypatch.setattr("flows.steps.session._release_hooks", lambda *_: [("register", lambda: {"version": 1})])
    return toy.make(tmp_path / "w")


def newest_run(client: Any) -> Any:
    """The newest flow run that no deployment made: other tests leave scheduled runs on this server."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
    from prefect.client.schemas.sorting import FlowRunSort

    return client.read_flow_runs(flow_run_filter=FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(is_null_=True)),
                                 limit=1, sort=FlowRunSort.START_TIME_DESC)[0]


def last_run(url: str) -> tuple[str, dict[str, str]]:
    """State of the newest flow run, and of each of its task runs, by Prefect's own account."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    prefect_server.Server(Api(url)).settle()
    with get_client(sync_client=True) as client:
        newest = newest_run(client)
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[newest.id])))
        assert newest.state is not None
        return newest.state.name, {task.name: task.state.name for task in tasks if task.state}


def test_states(prefect_url: str, workspace: Workspace) -> None:
    toy.control(workspace, fail=["train@math"])
    result = run(workspace, BuildOptions())
    assert str(result.failure()).startswith("Failed: train@math.")
    flow, tasks = last_run(prefect_url)
    assert flow == "Failed"
    assert tasks["train@math"] == "Failed" and tasks["train@sql"] == "Completed"
    assert tasks["assemble"] == tasks["evaluate"] == "Skipped" and "register" not in tasks

    toy.control(workspace)
    toy.runs(workspace)
    assert run(workspace, BuildOptions()).failure() is None
    assert toy.runs(workspace) == ["assemble", "evaluate", "train math"]
    flow, tasks = last_run(prefect_url)
    assert flow == "Completed"
    assert {name for name, state in tasks.items() if state == "Cached"} == {"base", "prepare@math", "prepare@sql",
                                                                            "train@sql"}
    assert tasks["train@math"] == tasks["evaluate"] == tasks["register"] == "Completed"

    result = run(workspace, BuildOptions())
    assert last_run(prefect_url) == ("Completed", {**dict.fromkeys(EVERYTHING, "Cached"), "register": "Completed"})
    assert result.release == {"version": 1} and not toy.runs(workspace)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_recalibration_is_of_one_run(workspace: Workspace, wanted: bool) -> None:
    incumbent.recalibrate(workspace, True)   # left by a run that was killed
    with open_session(workspace, BuildOptions(recalibrate=wanted)):
        incumbent.write_extended(workspace, load(workspace.params))
        assert (incumbent.extended(workspace) == incumbent.AFRESH) == wanted
    incumbent.write_extended(workspace, load(workspace.params))
    assert incumbent.extended(workspace) is None


# What a release leaves, as flows.steps.release says it, with a metric that could not tell.
COMPARED = {"verdict": "pass", "reason": "loss -0.3 nats", "rows": 53, "unmatched": 0, "point": -0.3,
            "interval": [-0.4, -0.2], "improved": True}
UNKNOWN = {"verdict": "not enough data", "reason": "6 answers to compare, 20 are needed", "rows": 6, "unmatched": 0,
           "point": None, "interval": None, "improved": False}
RELEASE = {"name": "moa-mixture", "version": 2, "champion": 2, "waiting": False, "decision": {
    "promote": True, "reason": "No domain is worse; better: math.", "against": 1, "domains": {
        "math": {"verdict": "pass", "reason": "", "loss": COMPARED, "metric": UNKNOWN}}}}
# The toy's evaluate writes one value; here it writes a summary of moa's shape beside it.
SUMMARY = {"domains": {"math": {system: {"loss": 1.25, "score": 0.5, "rows": 9, "answered": 4}
                                for system in ("base", "routed", "forced")}},
           "routing": {"accuracy": 0.75, "abstention": 0.25, "confusion": {"math": {"math": 3, "sql": 1},
                                                                           "sql": {"math": 0, "sql": 4}}}}


def artifacts_of_the_last_run() -> dict[str, Any]:
    """By key, what Prefect keeps with the newest flow run; its own records of failures have no key."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    with get_client(sync_client=True) as client:
        newest = newest_run(client)
        found = client.read_artifacts(artifact_filter=ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[newest.id])))
        return {each.key: each for each in found if each.key}


def test_a_build_leaves_its_report_and_the_gates_verdicts(prefect_url: str, workspace: Workspace,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.steps.session._release_hooks", lambda *_: [("promote", lambda: RELEASE)])
    steps = workspace.root / "steps.py"
    steps.write_text(steps.read_text().replace(
        'read(data / "mixture"))})', 'read(data / "mixture"))})\n        '
        f'(data / "reports" / "summary.json").write_text({json.dumps(json.dumps(SUMMARY))})'))
    assert run(workspace, BuildOptions()).failure() is None
    found = artifacts_of_the_last_run()
    assert {key: each.type for key, each in found.items()} == {"moa-report": "markdown", "moa-gate": "table"}
    told = found["moa-report"].data
    for line in ("**Release** version 2 of moa-mixture: No domain is worse; better: math; champion is version 2.",
                 "| math | label forced | 1.250 | 0.500 | 9 / 4 |", "accuracy 75.0%, abstention 25.0%",
                 "| math | 3 | 1 |"):
        assert line in told.splitlines(), told
    assert [(row["domain"], row["measure"], row["verdict"], row["difference"], row["interval"])
            for row in json.loads(found["moa-gate"].data)] == [
        ("math", "loss", "pass", -0.3, "-0.4000 to -0.2000"), ("math", "metric", "not enough data", None, ""),
        ("", "release", "pass", None, "")]

    toy.add_rows(workspace, "math", "more")
    toy.control(workspace, fail=["train@math"])
    assert run(workspace, BuildOptions()).failure() is not None
    found = artifacts_of_the_last_run()
    assert found.keys() == {"moa-report"}
    assert "- failed: train@math" in found["moa-report"].data and "label forced" not in found["moa-report"].data


def test_a_report_that_cannot_be_kept_fails_no_build(prefect_url: str, workspace: Workspace,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    steps = workspace.root / "steps.py"   # an evaluation that no report can be made of
    steps.write_text(steps.read_text().replace(
        'read(data / "mixture"))})', 'read(data / "mixture"))})\n        '
        '(data / "reports" / "summary.json").write_text(\'{"domains": 7}\')'))
    result = run(workspace, BuildOptions())
    assert result.failure() is None and result.release == {"version": 1}
    assert last_run(prefect_url)[0] == "Completed" and not artifacts_of_the_last_run()
    assert "Prefect did not keep this build's report: AttributeError" in capsys.readouterr().err


def test_without_prefect_the_same_happens(prefect_url: str, workspace: Workspace, tmp_path: Path) -> None:
    other = Workspace(shutil.copytree(workspace.root, tmp_path / "other"))
    local, under_prefect = run(workspace, BuildOptions(), local=True).as_dict(), run(other, BuildOptions()).as_dict()
    for result in (local, under_prefect):
        result.pop("seconds")
    assert local == under_prefect
    assert toy.runs(workspace) == toy.runs(other)
    assert toy.value(workspace.mixture) == toy.value(other.mixture)
