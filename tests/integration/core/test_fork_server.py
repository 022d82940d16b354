"""Steps forked from a process that has imported their libraries: nothing is different but the time they take."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moa.base import pin
from moa.core import config, subprocesses
from moa.core.errors import PipelineError
from moa.core.fork_server import ForkServer
from moa.core.paths import MANIFEST, Workspace
from moa.core.progress import MARKER
from moa.core.subprocesses import LIBRARIES, environment, execute, moa_json, own, steps_forked
from moa.core.supervisor import SupervisedProcess, stop_all
from tests import tiny
from tests.waiting import until

STEPS = '''
import json, os, signal, subprocess, sys, time
from pathlib import Path

def facts():
    print(json.dumps({"words": sys.argv, "folder": os.getcwd(), "device": os.environ.get("MOA_DEVICE"),
                      "home": os.environ.get("HOME"), "terminal": sys.stdin.isatty(), "said": sys.stdin.read(),
                      "group": os.getpgid(0), "modules": sorted(sys.modules)}))

def status():
    return int(sys.argv[1])

def fail():
    raise ValueError("no luck")

def signalled():
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def said():
    sys.exit("moa: no luck")

def handlers():
    import atexit, threading
    atexit.register(print, "handler")
    threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
    print("end")

def flood():
    for number in range(int(sys.argv[1])):
        print(number, "x" * 80)

def both():
    print("out")
    print("error", file=sys.stderr)

def meet():
    mine, other = map(Path, sys.argv[1:])
    mine.touch()
    while not other.exists():
        time.sleep(0.02)

def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    child = subprocess.Popen([sys.executable, "-c", script])
    print(os.getpid(), child.pid, flush=True)
    child.wait()

def compute():
    import torch
    torch.set_num_threads(2)
    product = torch.ones(600, 600) @ torch.ones(600, 600)
    print(json.dumps([float(product[0, 0]), torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork()]))
'''


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "steps_here").mkdir()
    (tmp_path / "steps_here" / "toy_steps.py").write_text(STEPS)
    return environment({"PYTHONPATH": f"{tmp_path / 'steps_here'}{os.pathsep}{os.environ['PYTHONPATH']}"})


@pytest.fixture
def server(tmp_path: Path, env: dict[str, str]) -> Iterator[ForkServer]:
    started = ForkServer(["json"], cwd=tmp_path, env=env)
    assert started.ready(env)
    yield started
    started.stop()


def forked(server: ForkServer, words: Sequence[object], folder: Path, env: dict[str, str]) -> tuple[int, list[str]]:
    lines: list[str] = []
    process = SupervisedProcess([f"toy_steps:{words[0]}", *map(str, words)], cwd=folder, env=env, server=server)
    return process.follow(lines.append), lines


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


# What a step gets, and what it leaves.

def test_words_folder_environment_and_an_empty_standard_input(server: ForkServer, tmp_path: Path,
                                                              env: dict[str, str]) -> None:
    status, lines = forked(server, ["facts", "a b", "ü"], tmp_path, {**env, "MOA_DEVICE": "cuda:1"})
    said = json.loads("".join(lines))
    assert status == 0 and said["words"] == ["facts", "a b", "ü"] and said["folder"] == str(tmp_path)
    assert said["device"] == "cuda:1" and said["home"] == env.get("HOME")
    assert not said["terminal"] and said["said"] == ""
    assert said["group"] not in (os.getpgid(0), server._process.pid)
    # The code of moa that runs is that on the disk when the step starts.
    assert {name for name in said["modules"] if name.split(".")[0] in ("moa", "flows")} == {
        "moa", "moa.core", "moa.core.supervisor"}
    status, lines = forked(server, ["facts"], tmp_path, env)
    assert json.loads("".join(lines))["device"] is None   # what one step got is not left to the next


@pytest.mark.parametrize(("words", "expected"), [(["status", 0], 0), (["status", 3], 3), (["signalled"], 128 + 9)])
def test_exit_status(server: ForkServer, tmp_path: Path, env: dict[str, str], words: list[object],
                     expected: int) -> None:
    status, lines = forked(server, words, tmp_path, env)
    assert status == expected and lines == (["still here"] if words == ["signalled"] else [])
    script = f"import sys, toy_steps; sys.exit(toy_steps.{words[0]}())"
    process = SupervisedProcess(["/bin/sh", "-c", f"{sys.executable} -c '{script}' {words[-1]}"], cwd=tmp_path, env=env)
    assert process.follow(lambda _: None) == expected   # as from a shell


def test_an_error_keeps_its_traceback(server: ForkServer, tmp_path: Path, env: dict[str, str]) -> None:
    status, lines = forked(server, ["fail"], tmp_path, env)
    assert status == 1 and lines[0].startswith("Traceback") and lines[-1] == "ValueError: no luck"
    status, lines = forked(server, ["unknown"], tmp_path, env)
    assert status == 1 and "unknown" in lines[-1]
    status, lines = forked(server, ["status", 0], tmp_path / "no such folder", env)
    assert status == 1 and "no such folder" in lines[-1]   # what does not even begin has not succeeded


def test_threads_and_exit_handlers_end_as_ever(server: ForkServer, tmp_path: Path, env: dict[str, str]) -> None:
    assert forked(server, ["handlers"], tmp_path, env) == (0, ["end", "thread", "handler"])
    assert forked(server, ["said"], tmp_path, env) == (1, ["moa: no luck"])


def test_a_flood_of_lines_arrives_whole(server: ForkServer, tmp_path: Path, env: dict[str, str]) -> None:
    status, lines = forked(server, ["flood", 20_000], tmp_path, env)
    assert status == 0 and [int(line.split()[0]) for line in lines] == list(range(20_000))


def test_the_error_stream_can_go_elsewhere(server: ForkServer, tmp_path: Path, env: dict[str, str]) -> None:
    assert sorted(forked(server, ["both"], tmp_path, env)[1]) == ["error", "out"]
    out: list[str] = []
    with (tmp_path / "errors").open("w") as file:
        SupervisedProcess(["toy_steps:both"], cwd=tmp_path, env=env, stderr=file, server=server).follow(out.append)
    assert out == ["out"] and (tmp_path / "errors").read_text() == "error\n"


def test_steps_run_side_by_side(server: ForkServer, tmp_path: Path, env: dict[str, str]) -> None:
    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(forked, server, ["meet", tmp_path / mine, tmp_path / other], tmp_path, env)
                for mine, other in (("a", "b"), ("b", "a"))]
        assert [end.result() for end in ends] == [(0, []), (0, [])]


def test_the_libraries_can_be_forked(tmp_path: Path, env: dict[str, str]) -> None:
    """Importing them starts no pool of threads and touches no GPU, so a step computes with threads of its own."""
    server = ForkServer(LIBRARIES, cwd=tmp_path, env=env)
    assert server.ready(env)
    try:
        assert forked(server, ["compute"], tmp_path, env) == (0, ["[600.0, false, false]"])
        status, lines = forked(server, ["facts"], tmp_path, env)
    finally:
        server.stop()
    assert status == 0 and set(LIBRARIES) <= set(json.loads("".join(lines))["modules"])


# How it ends.

def test_a_step_that_does_not_listen_is_ended_with_its_children(server: ForkServer, tmp_path: Path,
                                                                env: dict[str, str]) -> None:
    pids: list[int] = []
    process = SupervisedProcess(["toy_steps:deaf"], cwd=tmp_path, env=env, server=server)

    def heard(line: str) -> None:
        pids.extend(map(int, line.split()))
        if len(pids) == 3:   # the child's 1, and both pids
            process.stop()

    process.follow(heard)
    assert process.stopped and process.ended
    for pid in pids:
        until(lambda pid=pid: pid == 1 or gone(pid))
    assert forked(server, ["status", 0], tmp_path, env) == (0, [])   # and the next one runs


DRIVER = """
import os, sys
from pathlib import Path
from moa.core.fork_server import ForkServer
from moa.core.supervisor import SupervisedProcess
server = ForkServer(["json"], cwd=Path(), env=os.environ)
assert server.ready(os.environ)
print(server._process.pid, flush=True)
step = SupervisedProcess(["toy_steps:deaf"], cwd=Path(), env=os.environ, server=server)
step.follow(lambda line: print(line, flush=True))
"""


def test_nothing_outlives_a_caller_that_is_killed(tmp_path: Path, env: dict[str, str]) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    said = [int(word) for _ in range(3) for word in driver.stdout.readline().split()]
    pids = [pid for pid in said if pid != 1]   # of the fork server, the step and the step's child
    groups = {os.getpgid(pid) for pid in pids}   # two: one is led by the supervisor
    assert len(pids) == 3 and len(groups) == 2
    driver.kill()
    driver.wait()
    for pid in (*pids, *groups):
        until(lambda pid=pid: gone(pid))


def test_a_supervisor_that_is_killed(server: ForkServer, tmp_path: Path, env: dict[str, str]) -> None:
    process = SupervisedProcess(["toy_steps:deaf"], cwd=tmp_path, env=env, server=server)
    pids: list[int] = []

    def heard(line: str) -> None:
        pids.extend(map(int, line.split()))
        if len(pids) == 3:
            os.kill(os.getpgid(max(pids)), signal.SIGKILL)
            until(lambda: process.ended)
            process.stop()

    process.follow(heard)
    assert process.wait() == -signal.SIGKILL
    for pid in pids:
        until(lambda pid=pid: pid == 1 or gone(pid))


# Which commands are forked, and in what environment.

@pytest.mark.parametrize(("command", "words"), [
    (["/bin/sh", "-c", "moa prepare --domain math"], ["moa", "prepare", "--domain", "math"]),
    (["/bin/sh", "-c", "moa train --domain 'a b'"], ["moa", "train", "--domain", "a b"]),
    ([sys.executable, "-P", "-m", "moa", "release", "list"], ["moa", "release", "list"]),
    (["/bin/sh", "-c", "moa prepare --domain math && true"], None),
    (["/bin/sh", "-c", "moa prepare --domain $HOME"], None),
    (["/bin/sh", "-c", "moa prepare --domain *"], None),
    (["/bin/sh", "-c", "moa prepare; true"], None),
    (["/bin/sh", "-c", "moa prepare --domain 'math"], None),
    (["/bin/sh", "-c", "MOA_DTYPE=float32 moa train --domain math"], None),
    (["/bin/sh", "-c", "nice moa train --domain math"], None),
    (["/bin/sh", "-c", "python steps.py prepare"], None),
    (["/bin/sh", "-c", ""], None),
    ([sys.executable, "-m", "dvc", "repro"], None),
])
def test_only_a_command_of_moas_own_is_forked(command: list[str], words: list[str] | None) -> None:
    assert own(command, environment()["PATH"]) == words


def test_another_program_called_moa_is_not_forked(tmp_path: Path) -> None:
    other = tmp_path / "moa"
    other.write_text("#!/bin/sh\necho from moa.cli.main import main\n")
    other.chmod(0o755)
    assert own(["/bin/sh", "-c", "moa prepare"], f"{tmp_path}{os.pathsep}{os.environ['PATH']}") is None
    assert own(["/bin/sh", "-c", "moa prepare"], str(tmp_path / "nowhere")) is None


def test_a_variable_that_libraries_read_when_imported(server: ForkServer, env: dict[str, str]) -> None:
    assert server.ready({**env, "MOA_DEVICE": "cpu", "MLFLOW_TRACKING_URI": "sqlite:///x"})
    assert not server.ready({**env, "OMP_NUM_THREADS": "7"})
    assert server.ready(env)


def test_a_server_that_is_gone(server: ForkServer, tmp_path: Path, env: dict[str, str]) -> None:
    server._process.kill()
    server._process.wait()
    assert not server.ready(env)
    broken = ForkServer(["json"], cwd=tmp_path, env={**env, "PYTHONHOME": str(tmp_path)})   # no Python starts there
    assert not broken.ready({**env, "PYTHONHOME": str(tmp_path)})
    broken.stop()


# As `execute` and `moa_json` use it.

@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    made = tiny.workspace(tmp_path / "w")
    monkeypatch.chdir(made.root)
    pin.fetch(made, config.load(made.params).base)
    return made


@pytest.fixture
def two_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocesses, "LIBRARIES", ("typer", "numpy"))   # the others take their time, and no other way


def test_a_step_leaves_the_same_log_and_files(workspace: Workspace, two_libraries: None,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    def step(name: str, words: str) -> tuple[object, ...]:
        lines: list[str] = []
        try:
            execute(workspace, name, ["/bin/sh", "-c", words], lines.append)
            error = ""
        except PipelineError as caught:
            error = str(caught)
        marked = {line.partition(MARKER)[0] for line in lines if MARKER in line}
        log = (workspace.logs / f"{name}.log").read_text()
        return [line for line in lines if MARKER not in line], marked, error, log

    def steps() -> list[object]:
        done: list[object] = [step("prepare@alpha", "moa prepare --domain alpha"),
                              (workspace.corpus("alpha") / MANIFEST).read_text()]
        return [*done, step("nope", "moa prepare --domain nope"), step("wrong", "moa prepare --wrong")]

    with steps_forked():
        found = steps()
        assert subprocesses._shared.server is not None
    assert subprocesses._shared.server is None
    monkeypatch.setenv("MOA_FORK_SERVER", "0")
    with steps_forked():
        assert steps() == found
        assert subprocesses._shared.server is None
    _, marked, error, log = found[0]   # type: ignore[misc]
    assert not error and marked == {""} and log.startswith("$ /bin/sh -c 'moa prepare --domain alpha'\n")
    assert "No domain 'nope'" in found[2][2]   # type: ignore[index]


def test_what_a_command_prints(workspace: Workspace, two_libraries: None) -> None:
    outside = moa_json(workspace, "domain", "list")
    with steps_forked():
        assert moa_json(workspace, "domain", "list") == outside
        assert subprocesses._shared.server is not None
        facts, problem = moa_json(workspace, "gate", 1)
    assert facts == {} and problem and "\n" not in str(problem) and problem.error == "RegistryError"


def test_nothing_is_imported_for_other_commands(workspace: Workspace) -> None:
    with steps_forked():
        execute(workspace, "mine", ["/bin/sh", "-c", "echo mine"], lambda _: None)
        assert subprocesses._shared.server is None
    execute(workspace, "ours", ["/bin/sh", "-c", "moa --version"], lambda _: None)   # outside of the block
    assert subprocesses._shared.server is None


def test_an_interruption_while_libraries_are_imported(workspace: Workspace, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "steps_here").mkdir()
    began = tmp_path / "began"
    (tmp_path / "steps_here" / "never_imported.py").write_text(
        f"import pathlib, signal\npathlib.Path({str(began)!r}).touch()\nsignal.pause()\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'steps_here'}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.setattr(subprocesses, "LIBRARIES", ("never_imported",))
    errors: list[Exception] = []

    def step() -> None:
        try:
            execute(workspace, "one", ["/bin/sh", "-c", "moa --version"], lambda _: None)
        except PipelineError as error:
            errors.append(error)

    with steps_forked():
        thread = threading.Thread(target=step)
        thread.start()
        until(began.exists)
        assert subprocesses._shared.server is not None
        pid = subprocesses._shared.server._process.pid
        stop_all()
        thread.join()
    assert [str(error) for error in errors] == ["one was interrupted."] and gone(pid)
