"""What `moa up` keeps alive: processes and servers that are killed come back, and `moa status` says so meanwhile."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows import prefect_server, status
from flows.keep_alive import CommandService, ServiceKeeper, ServiceRecord, State
from flows.sensor import Sensor
from flows.steps import event_log
from moa.core.files import read_json
from moa.core.paths import Workspace
from tests import tiny

ROWS = 120
PARAMS: dict[str, Any] = {
    "train": {"rank": 2, "alpha": 4.0, "epochs": 1, "batch_rows": 8, "learning_rate": 0.02, "batch_tokens": 2048},
    "evaluate": {"generate_rows": 2, "max_new_tokens": 8},
    "release": {"min_rows": 4, "metric_rows": 0},
    "adapt": {"settle": 0.5, "debounce": 0.0, "poll": 0.5, "golden": 0, "candidates": 0},
    "retrain": {"cron": None}, "drift": {"cron": None},
}


def environment() -> dict[str, str]:
    left_out = ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    return {**{key: value for key, value in os.environ.items() if key not in left_out}, "OMP_NUM_THREADS": "1"}


def until(seen: Callable[[], Any], process: "subprocess.Popen[str] | None" = None, seconds: float = 400) -> Any:
    end = time.monotonic() + seconds
    while not (found := seen()):
        assert process is None or process.poll() is None, "moa up ended"
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
    return found


def made(root: Path) -> Workspace:
    workspace = tiny.workspace(root, (), **PARAMS)
    subprocess.run(["git", "init", "-q", "."], cwd=root, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=root, check=True, env=environment())
    return workspace


def drop(workspace: Workspace, domain: str) -> None:
    """Good rows, and a file that no reader should meet."""
    folder = workspace.incoming / domain
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"instruction": ["Ask?"], "output": ["Say."],
                             "at": pa.array([1], pa.timestamp("us", tz="Mars/Olympus"))}), folder / "zone.parquet")
    lines = (json.dumps(tiny.row(domain, number)) + "\n" for number in range(ROWS))
    (folder / "rows.jsonl").write_text("".join(lines))


def parts(workspace: Workspace) -> dict[str, Any]:
    try:
        return dict(read_json(workspace.up)["parts"])
    except (OSError, ValueError):
        return {}


def moa(workspace: Workspace, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "moa", *words], cwd=workspace.root, env=environment(),
                          capture_output=True, text=True, check=False)


def started(workspace: Workspace, *words: str) -> "subprocess.Popen[str]":
    with (workspace.root / "up.log").open("w") as out:
        return subprocess.Popen([sys.executable, "-m", "moa", "up", "--no-ui", *words], cwd=workspace.root, text=True,
                                env=environment(), stdout=out, stderr=subprocess.STDOUT)


def commands(process: "subprocess.Popen[str]", *words: str) -> list[psutil.Process]:
    """The children of `moa up` that were called so; without the supervisors, which have a file for a module."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            line = child.cmdline()
        except psutil.Error:
            continue
        if line[1:1 + len(words)] == list(words):
            found.append(child)
    return found


# The sensor.

@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return made(tmp_path / "w")


def test_a_sensor_outlives_whatever_a_look_raises(workspace: Workspace) -> None:
    drop(workspace, "law")
    (workspace.local).mkdir(exist_ok=True)
    workspace.adaptation_state.write_text("{")   # cut off by a broken disk: what reads it raises no error of moa's
    asked: list[list[str]] = []
    heard = threading.Event()

    def ask(names: Any) -> bool:
        asked.append(list(names))
        heard.set()
        return True

    sensor = Sensor(workspace, ask)
    thread = threading.Thread(target=sensor.run)
    thread.start()
    try:
        trouble = until(lambda: sensor.trouble)
        assert trouble.startswith("data/incoming could not be looked at: JSONDecodeError: ")
        workspace.adaptation_state.unlink()
        assert heard.wait(120) and asked[0] == ["law"]
        until(lambda: sensor.trouble is None)
    finally:
        sensor.stop()
        thread.join()


# The keeper, over small commands.

LISTEN = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1"]
LEAVE = [sys.executable, "-c", "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()", *LISTEN]


@pytest.fixture
def keeper(workspace: Workspace) -> Iterator[ServiceKeeper]:
    made = ServiceKeeper(workspace.up, {"pid": os.getpid()}, lambda line: None, lambda why: None)
    yield made
    made.stop()


def state(keeper: ServiceKeeper, name: str) -> ServiceRecord:
    return keeper._records[name]


def test_a_killed_command_comes_back_at_its_port(workspace: Workspace, keeper: ServiceKeeper) -> None:
    """Although what it had started itself lives on and holds the port."""
    port = prefect_server.free_port()
    part = CommandService(workspace, "pages", [*LEAVE, str(port)], port, {}, {})
    keeper.keep(part)
    keeper.start()
    until(lambda: parts(workspace).get("pages", {}).get("state") == "up")
    for times in (1, 2):
        supervisor = psutil.Process(part._process._process.pid)
        (supervisor if times == 2 else supervisor.children()[0]).kill()
        until(lambda times=times: parts(workspace)["pages"]["restarts"] == times)
        until(lambda: parts(workspace)["pages"]["state"] == "up")
    assert psutil.Process(part._process._process.pid).children(recursive=True)


def test_one_that_ends_at_once_is_down_and_its_pauses_grow(workspace: Workspace, keeper: ServiceKeeper,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    gave_up: list[str] = []
    keeper.give_up = gave_up.append
    part = CommandService(workspace, "pages", ["/bin/sh", "-c", "exit 3"], prefect_server.free_port(), {}, {})
    keeper.keep(part, most=2)
    clock, pauses = [0.0], []
    monkeypatch.setattr("flows.keep_alive.time.monotonic", lambda: clock[0])
    for _ in range(8):
        part._process.wait()
        keeper.look()
        due = keeper._services[0].restart_at
        assert due is not None and state(keeper, "pages").state == "down"
        assert "ended with status 3 (its output: .moa/logs/up-pages.log)" in state(keeper, "pages").why
        pauses.append(due - clock[0])
        keeper.look()   # not yet
        assert keeper._services[0].restart_at == due
        clock[0] = due
        keeper.look()
    assert pauses == [2, 4, 8, 16, 32, 60, 60, 60] and state(keeper, "pages").restarts == 8
    assert gave_up == ["pages ended with status 3 (its output: .moa/logs/up-pages.log), 3 times in a row."]


def test_one_that_waits_is_not_down(workspace: Workspace, keeper: ServiceKeeper) -> None:
    part = CommandService(workspace, "serve", ["/bin/sh", "-c", "exit 4"], prefect_server.free_port(), {},
                          {4: "nothing yet"})
    keeper.keep(part)
    part._process.wait()
    keeper.look()
    assert (state(keeper, "serve").state, state(keeper, "serve").why) == ("waiting", "nothing yet")
    assert status._troubles(workspace, read_json(workspace.up)) == []


def test_a_part_that_fails_in_any_way_takes_no_other_with_it(workspace: Workspace, keeper: ServiceKeeper) -> None:
    class Bad:
        name = "bad"

        def state(self) -> State:
            raise KeyError("Mars/Olympus")

        def start(self) -> None:
            pass

        def stop(self) -> None:
            pass

    port = prefect_server.free_port()
    keeper.keep(Bad())
    keeper.keep(CommandService(workspace, "pages", [*LISTEN, str(port)], port, {}, {}))
    keeper.start()
    until(lambda: parts(workspace).get("pages", {}).get("state") == "up")
    assert status._troubles(workspace, read_json(workspace.up))[0].startswith("bad is down since ")


# `moa up` itself.

def test_everything_comes_back_and_the_rows_are_learned(tmp_path: Path) -> None:
    """Prefect's server, MLflow's pages and `moa serve` are killed; among the files are some that cannot be read."""
    workspace = made(tmp_path / "w")
    process = started(workspace, "--mlflow", "--mlflow-port", "0", "--serve", "--serve-port", "0")
    try:
        wanted = {"prefect": "up", "mlflow": "up", "serve": "waiting", "sensor": "up", "flows": "up"}
        until(lambda: {name: each["state"] for name, each in parts(workspace).items()} == wanted, process)
        done = moa(workspace, "status", "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["troubles"] == []
        for name, words in (("mlflow", ("-m", "mlflow")), ("prefect", ("-P", "-m", "flows.prefect_app"))):
            for child in commands(process, *words):
                child.kill()
            until(lambda name=name: parts(workspace)[name]["restarts"] >= 1, process)
            until(lambda name=name: parts(workspace)[name]["state"] == "up", process)
        until(lambda: parts(workspace)["flows"]["state"] == "up", process)
        drop(workspace, "law")
        until(lambda: event_log.read(workspace, kinds=["released"]), process)
        rejected, = event_log.read(workspace, kinds=["rejected"])
        assert rejected["file"] == "zone.parquet" and "Mars/Olympus" in rejected["reason"]
        until(lambda: parts(workspace)["serve"]["state"] == "up", process)
        before = parts(workspace)["serve"]["restarts"]
        for child in commands(process, "-P", "-m", "moa", "serve"):
            child.kill()
        until(lambda: parts(workspace)["serve"]["restarts"] > before, process)
        until(lambda: parts(workspace)["serve"]["state"] == "up", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, (workspace.root / "up.log").read_text()
        assert not workspace.up.exists()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_a_prefect_server_that_cannot_live_ends_moa_up(tmp_path: Path) -> None:
    workspace = made(tmp_path / "w")
    process = started(workspace)
    try:
        until(lambda: parts(workspace).get("prefect", {}).get("state") == "up", process)
        (workspace.prefect / "prefect.db").write_text("no database\n" * 100)
        for each in workspace.prefect.glob("prefect.db-*"):
            each.unlink()
        for child in commands(process, "-P", "-m", "flows.prefect_app"):
            child.kill()
        until(lambda: parts(workspace)["prefect"]["state"] == "down", process)
        shown = moa(workspace, "status")
        assert shown.returncode == 1 and "prefect is down since" in shown.stdout, shown.stdout + shown.stderr
        assert process.wait(500) == 1
        *_, last = (workspace.root / "up.log").read_text().splitlines()   # Prefect's own words come before
        assert last.startswith("moa: `moa up` gave up: prefect ended") and "6 times in a row" in last, last
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_moa_up_that_was_killed_is_a_trouble(tmp_path: Path) -> None:
    workspace = made(tmp_path / "w")
    process = started(workspace)
    until(lambda: parts(workspace).get("sensor", {}).get("state") == "up", process)
    process.kill()
    process.wait()
    shown = moa(workspace, "status")
    assert shown.returncode == 1 and "moa up was killed: start it again" in shown.stdout
