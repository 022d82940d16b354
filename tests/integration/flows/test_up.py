"""`moa up` as typed: a real Prefect server, its schedules and triggers, rows that arrive before and while it runs."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ruamel.yaml import YAML

from flows import prefect_api
from flows.sensor import send_arrival_event
from flows.steps import event_log
from moa.core import config
from moa.core.paths import Workspace
from moa.workspace import init
from moa.workspace.lock import LockHolder
from tests import tiny
from tests.waiting import Gate, until

ROWS = 120
PROJECT = "tiny-1a2b3c"
PARAMS: dict[str, Any] = {
    "project": PROJECT,
    "train": {"rank": 2, "alpha": 4.0, "epochs": 1, "batch_rows": 8, "learning_rate": 0.02, "batch_tokens": 2048},
    "evaluate": {"generate_rows": 2, "max_new_tokens": 8},
    "release": {"min_rows": 4, "metric_rows": 0},
    "adapt": {"settle": 0.5, "debounce": 0.0, "poll": 0.5, "golden": 0, "candidates": 0},
    "retrain": {"cron": None, "interval": 30.0},
    "drift": {"cron": None},
}


def environment() -> dict[str, str]:
    left_out = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_HOME", "MLFLOW_TRACKING_URI",
                "MLFLOW_REGISTRY_URI")
    return {**{key: value for key, value in os.environ.items() if key not in left_out}, "OMP_NUM_THREADS": "1"}


def drop(workspace: Workspace, domain: str) -> Path:
    path = workspace.incoming / domain / "rows.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(tiny.telling_row(domain, number)) + "\n" for number in range(ROWS)))
    return path


def told(workspace: Workspace, kind: str, **facts: Any) -> list[dict[str, Any]]:
    return [entry for entry in event_log.read(workspace, kinds=[kind])
            if all(entry.get(key) == value for key, value in facts.items())]


def empty(root: Path) -> Workspace:
    """A workspace without any domain, into which the rows of one have come."""
    workspace = tiny.workspace(root, (), **PARAMS)
    subprocess.run(["git", "init", "-q", "."], cwd=root, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=root, check=True, env=environment())
    drop(workspace, "alpha")
    return workspace


def start(workspace: Workspace, **extra: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-m", "moa", "up", "--no-ui"], cwd=workspace.root, text=True,
                            env={**environment(), **extra}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workspace, "subprocess.Popen[str]"]]:
    """`moa up`, started where rows waited, and done with them. The tests add to what it has learned, in any order."""
    workspace = empty(tmp_path_factory.mktemp("up") / "w")
    process = start(workspace)
    try:
        until(lambda: told(workspace, "released", version=1), process)
        until(lambda: told(workspace, "finished"), process)
        yield workspace, process
    finally:
        process.kill()
        process.communicate()


def test_rows_that_came_while_it_did_not_run(running: tuple[Workspace, "subprocess.Popen[str]"]) -> None:
    workspace, _ = running
    assert "alpha" in YAML(typ="safe").load(workspace.params)["domains"]
    started = told(workspace, "started")[0]
    assert started["trigger"] == "rows of alpha arrived" and not list(workspace.incoming.rglob("*.jsonl"))


def test_an_event_from_another_process_starts_a_run(running: tuple[Workspace, "subprocess.Popen[str]"]) -> None:
    workspace, process = running

    def reason() -> str:
        """Why the run that a nudge sets off does nothing: a scheduled one may be at work just then."""
        already = len(told(workspace, "skipped", trigger="rows of elsewhere arrived"))
        assert send_arrival_event(workspace, ["elsewhere"])
        skipped = until(lambda: told(workspace, "skipped", trigger="rows of elsewhere arrived")[already:], process)
        return str(skipped[0]["reason"])

    until(lambda: reason() == "nothing that can be learned waits.", process)



def test_rows_that_are_ingested_meanwhile(running: tuple[Workspace, "subprocess.Popen[str]"], tmp_path: Path) -> None:
    workspace, process = running
    rows = tmp_path / "beta.jsonl"
    rows.write_text("".join(json.dumps(tiny.telling_row("beta", number)) + "\n" for number in range(ROWS)))
    said = subprocess.run([sys.executable, "-m", "moa", "ingest", "beta", str(rows)], cwd=workspace.root, check=True,
                          env=environment(), capture_output=True, text=True).stdout
    assert "`moa up` runs here and will learn it." in said
    until(lambda: told(workspace, "released", version=2), process)
    until(lambda: told(workspace, "finished", result="adaptation released")[1:], process)
    assert [path.name for path in sorted(workspace.data.glob("experts/*"))
            if path.is_dir()] == ["alpha", "beta"]


def test_the_schedule_fires(running: tuple[Workspace, "subprocess.Popen[str]"]) -> None:
    workspace, process = running
    already = len(told(workspace, "skipped", trigger="the schedule", reason="nothing is stale"))
    until(lambda: told(workspace, "skipped", trigger="the schedule", reason="nothing is stale")[already:], process)


def test_status_and_a_second_one(running: tuple[Workspace, "subprocess.Popen[str]"]) -> None:
    workspace, process = running
    facts = json.loads(subprocess.run([sys.executable, "-m", "moa", "status", "--json"], cwd=workspace.root, check=True,
                                      env=environment(), capture_output=True, text=True).stdout)
    assert facts["up"]["pid"] == process.pid and facts["prefect"]["answers"]
    assert facts["champion"].startswith(f"moa-{PROJECT}-mixture version ")
    assert {each["flow"] for each in facts["scheduled"]} >= {"retrain"}
    again = subprocess.run([sys.executable, "-m", "moa", "up"], cwd=workspace.root, env=environment(), text=True,
                           capture_output=True)
    assert again.returncode == 1 and again.stderr == "moa: `moa up` runs here already: see `moa status`.\n"


def test_the_same_for_a_work_pool(running: tuple[Workspace, "subprocess.Popen[str]"]) -> None:
    """prefect.yaml deploys what `moa up` serves, and a worker of the pool runs it."""
    workspace, _ = running
    scaffold = (init.SCAFFOLD / "prefect.yaml").read_text()
    (workspace.root / "prefect.yaml").write_text(scaffold.replace(init.PROJECT, PROJECT))
    api = prefect_api.workspace_api(workspace)
    assert api is not None

    def prefect(*words: str) -> None:
        subprocess.run([sys.executable, "-m", "prefect", "--no-prompt", *words], cwd=workspace.root, check=True,
                       env={**environment(), **api.environment()}, capture_output=True, text=True)

    prefect("work-pool", "create", f"moa-{PROJECT}", "--type", "process")
    prefect("deploy", "--all")
    known = {(each["name"], each["entrypoint"].rsplit(".", 1)[-1]): each
             for each in api.ask("deployments/filter", {})}
    assert known.keys() == {(name, flow) for name in (f"moa-{PROJECT}", f"moa-{PROJECT}-pool")
                            for flow in ("adapt", "retrain", "drift")}
    served = {flow: [schedule["schedule"] for schedule in known[f"moa-{PROJECT}-pool", flow]["schedules"]]
              for flow in ("adapt", "retrain", "drift")}
    assert [each["cron"] for each in served["retrain"]] == [config.RetrainParams().cron]
    assert [each["cron"] for each in served["drift"]] == [config.DriftParams().cron] and not served["adapt"]
    already = len(told(workspace, "skipped", trigger="the pool"))
    prefect("deployment", "run", f"adapt/moa-{PROJECT}-pool", "--param", 'trigger="the pool"')
    prefect("worker", "start", "--pool", f"moa-{PROJECT}", "--run-once")
    assert len(told(workspace, "skipped", trigger="the pool")) == already + 1


def test_sigterm_ends_all_of_it_and_kill_leaves_no_process_behind(tmp_path: Path) -> None:
    """What kill -9 of `moa up` in mid-training left half done is ended by the next one."""
    workspace = empty(tmp_path / "w")
    process = start(workspace)
    until(lambda: told(workspace, "finished"), process)
    api = prefect_api.workspace_api(workspace)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert "Traceback" not in out and "Watching  data/incoming/NAME/" in out
    stamp = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d  "   # what its flows do has a time
    for line in ("arrived ", "train@alpha +done", "gate PASSED version 1: First release", "promote +done +version 1 is "
                 "champion", "released +version 1"):
        assert re.search(stamp + line, out, re.MULTILINE), (line, out)
    psutil.wait_procs(children)
    assert api is not None and not api.answers() and not workspace.up.exists()
    assert told(workspace, "released", version=1) and told(workspace, "down")

    drop(workspace, "gamma")
    gate = Gate(tmp_path, "moa.experts.train:Checkpoint.save_now_and_then")
    process = start(workspace, **gate.environment)
    until(gate.reached, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    psutil.wait_procs(children)
    assert workspace.adaptation_state.exists()

    process = start(workspace)
    try:
        until(lambda: told(workspace, "released", version=2), process)
        assert told(workspace, "taken-over")
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


CLOSES = """
import pathlib, sys, flows.build
flows.build.close_abandoned = lambda: pathlib.Path("closed").touch()
sys.argv = ["moa", "up", "--no-ui"]
from moa.cli.main import main
main()
"""


@pytest.mark.parametrize("at_work", [True, False])
def test_flow_runs_of_a_run_at_work_are_not_taken_for_abandoned(tmp_path: Path, at_work: bool) -> None:
    """Its server may be another one on the same database."""
    workspace = empty(tmp_path)
    workspace.lock.parent.mkdir(parents=True, exist_ok=True)
    with LockHolder.of(workspace).seen() if at_work else contextlib.nullcontext():
        process = subprocess.Popen([sys.executable, "-c", CLOSES], cwd=tmp_path, env=environment(), text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            until(workspace.up.exists, process)
            assert (tmp_path / "closed").exists() != at_work
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()
