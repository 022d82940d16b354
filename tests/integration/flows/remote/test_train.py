"""Training on real clusters of this machine: two workers with folders of their own, one of them killed in mid-training.

Ray and Dask run as a user starts them, in processes of their own. The base is tiny, everything else is real.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.remote import cluster as engines
from flows.remote import payload
from flows.remote import train as remote_training
from flows.remote.payload import Files
from flows.remote.worker import work
from flows.steps.runner import LocalRunner
from flows.steps.session import BuildOptions, open_session
from flows.steps.stage_order import _command, build
from moa.base import pin
from moa.core import config
from moa.core.config import ExecutionParams
from moa.core.errors import RECORD, ArtifactError, ConfigError, PipelineError
from moa.core.paths import MANIFEST, Workspace
from moa.core.progress import Screen
from moa.core.supervisor import SupervisedProcess
from moa.data import prepare
from moa.experts import train
from moa.workspace.dvc_repository import initialise
from moa.workspace.pipeline import Pipeline
from tests import tiny
from tests.waiting import Gate, until

NAMES = ("alpha", "beta")
TRAIN = {"rank": 2, "alpha": 4.0, "epochs": 3, "batch_rows": 4, "batch_tokens": 256}
# A training that goes wrong, as `moa train` says it to its parent.
SAYS = {"error": "TrainingError", "errno": None, "message": "The loss is not finite."}
FAILS = f"echo '{RECORD}{json.dumps(SAYS)}'; exit 1; :"


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOA_DTYPE", "float32")
        patch.setenv("RAY_AUTH_MODE", "token")   # the nodes of a Ray cluster listen on every interface
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "site"))
        patch.setenv("MOA_WORKER_CACHE", str(tmp_path_factory.mktemp("cache")))   # of workers in this process
        yield


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Base and corpora recorded, nothing trained; the pipeline ends with the trainings."""
    workspace = tiny.workspace(tmp_path_factory.mktemp("driver") / "w", NAMES, train=TRAIN)
    stages = (workspace.root / "dvc.yaml").read_text().partition("\n  assemble:\n")[0]
    (workspace.root / "dvc.yaml").write_text(stages)
    subprocess.run(["git", "init", "-q", workspace.root], check=True)
    settings = config.load(workspace.params)
    with contextlib.chdir(workspace.root):
        initialise(workspace.root)
        pin.fetch(workspace, settings.base)
        for name in NAMES:
            prepare.prepare(workspace, settings, name)
        pipeline = Pipeline(workspace)
        pipeline.snapshot()
        pipeline.record(["base", *(f"prepare@{name}" for name in NAMES)])
    return workspace


@pytest.fixture(scope="module")
def here(template: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Every file of every expert as it is trained on this machine, each alone."""
    workspace = Workspace(shutil.copytree(template.root, tmp_path_factory.mktemp("here") / "w", symlinks=True))
    for name in NAMES:
        train.train(workspace, config.load(workspace.params), [name])
    return contents(workspace)


def contents(workspace: Workspace) -> dict[str, dict[str, bytes]]:
    return {name: {path.name: path.read_bytes() for path in workspace.expert(name).iterdir()} for name in NAMES}


@pytest.fixture
def workspace(template: Workspace, tmp_path: Path) -> Workspace:
    return Workspace(shutil.copytree(template.root, tmp_path / "w", symlinks=True))


def configured(workspace: Workspace, **execution: Any) -> config.Config:
    text = workspace.params.read_text().partition("execution:")[0]
    workspace.params.write_text(f"{text}execution: {json.dumps({'devices': ['cpu'], **execution})}\n")
    return config.load(workspace.params)


# Clusters.

PLACES = """
import sys
from flows.remote.train import connect
from moa.core.config import ExecutionParams
engine = connect(ExecutionParams(runner=sys.argv[1], address=sys.argv[2]), None)
print(engine.places())
engine.close()
"""


class Cluster:
    """A head and two workers, each with a home and a temporary folder of its own."""

    def __init__(self, engine: str, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.gate = Gate(folder, "moa.experts.train:Checkpoint.save_now_and_then")   # after a training's first step
        self.gate.open()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"{'tcp://' if engine == 'dask' else ''}127.0.0.1:{self.port}"
        self.processes = [self.start(0)]   # the head, without which workers give up
        until(self.listens, self.processes[0])
        self.processes += [self.start(1), self.start(2)]

    def start(self, number: int) -> subprocess.Popen[bytes]:
        home = self.folder / str(number)
        home.mkdir(exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key != "MOA_WORKER_CACHE"}
        environment |= {"HOME": str(home), "TMPDIR": str(home), "RAY_USAGE_STATS_ENABLED": "0",
                        "RAY_raylet_start_wait_time_s": "3600", **self.gate.environment}
        log = (home / "log").open("wb")
        return subprocess.Popen(self.command(number, home), cwd=home, env=environment, stdin=subprocess.DEVNULL,
                                stdout=log, stderr=log, start_new_session=True)

    def command(self, number: int, home: Path) -> list[str]:
        if self.engine == "dask":
            words = ["worker", self.address, "--nthreads", "1", "--no-nanny", "--local-directory", str(home)]
            if not number:
                words = ["scheduler", "--port", str(self.port)]
            return [sys.executable, "-m", "dask", *words, "--host", "127.0.0.1", "--no-dashboard"]
        quick = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000,
                 "health_check_failure_threshold": 2}
        place = ["--address", self.address, "--num-cpus", "1"] if number else [
            "--head", "--port", self.port, "--num-cpus", "0", "--include-dashboard", "false",
            "--system-config", json.dumps(quick)]
        return [sys.executable, "-m", "ray.scripts.scripts", "start", *map(str, place), "--block",
                "--temp-dir", self.short(number), "--object-store-memory", "100000000", "--disable-usage-stats"]

    def short(self, number: int) -> str:
        """Of a Ray node's own: its sockets' names have an end."""
        return f"/tmp/moa-ray-{self.port}-{number}"

    def listens(self) -> bool:
        with socket.socket() as door:
            return door.connect_ex(("127.0.0.1", self.port)) == 0

    def mend(self) -> None:
        """Start the workers anew that were killed, and wait until the head counts both."""
        for number, process in enumerate(self.processes):
            if process.poll() is not None:
                self.processes[number] = self.start(number)
        command = [sys.executable, "-c", PLACES, self.engine, self.address]
        until(lambda: subprocess.run(command, cwd=self.folder, text=True, capture_output=True).stdout.strip() == "2")

    def kill(self, domain: str) -> list[psutil.Process]:
        """End, with -9 and all at once, the worker that trains `domain`; the training that nobody ended."""
        training, = trainings(domain)
        owner = next(each for each in training.parents() if each.pid in {one.pid for one in self.processes})
        left = [each for each in (training, *training.parents()) if "supervisor.py" in " ".join(each.cmdline())]
        left = [training, *left]
        for each in [owner, *owner.children(recursive=True)]:
            if each not in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        return left

    def stop(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
                os.killpg(process.pid, signal.SIGKILL)
                for each in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
            process.wait()
        for number in range(3):
            shutil.rmtree(self.short(number), ignore_errors=True)


def trainings(word: str) -> list[psutil.Process]:
    """Processes that a worker's process started for a command with this word."""
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if word in each.cmdline() and "moa-worker-" in each.cwd() and each.name() not in ("sh", "python -I"):
                found.append(each)
    return [each for each in found if "supervisor.py" not in " ".join(each.cmdline())]


@pytest.fixture(scope="module", params=["dask", "ray"])
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(request.param, tmp_path_factory.mktemp(request.param))
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def cluster(started: Cluster) -> Cluster:
    """With both workers, whatever the test before did to them."""
    started.mend()
    return started


def test_an_interrupted_run_ends_its_work_on_the_workers(cluster: Cluster, workspace: Workspace) -> None:
    configured(workspace, runner=cluster.engine, address=cluster.address, group=1)
    seconds = str(100_000 + cluster.port)
    command = [sys.executable, "-P", "-m", "flows.remote.train", "--command", f"sleep {seconds}; :",
               "--domain", "alpha", "--domain", "beta"]
    process = SupervisedProcess(command, cwd=workspace.root, env=os.environ, stdout=subprocess.DEVNULL)
    try:
        until(lambda: len(trainings(seconds)) == 2)
    finally:
        process.stop()
    until(lambda: not trainings(seconds))   # the workers stopped them


class Killing(Screen):
    """Kills the worker that trains `alpha` when it has learned a step, at which both trainings are held until then."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()
        self.cluster = cluster
        self.left: list[psutil.Process] = []
        cluster.gate.close()

    def line(self, name: str, line: str) -> None:
        if line.endswith(": moa train --domain alpha") and not self.left:
            until(lambda: self.cluster.gate.reached() & {each.pid for each in trainings("alpha")})
            self.left = self.cluster.kill("alpha")
            self.cluster.gate.open()


def test_a_lost_workers_group_is_trained_elsewhere(cluster: Cluster, workspace: Workspace,
                                                   here: dict[str, dict[str, bytes]]) -> None:
    configured(workspace, runner=cluster.engine, address=cluster.address, group=1)
    with contextlib.chdir(workspace.root), open_session(workspace, BuildOptions()) as session:
        session.hooks, session.screen = (), Killing(cluster)
        result = build(session, LocalRunner(2))
    assert result.failure() is None and result.named("done") == ["train@alpha", "train@beta"]
    killed = session.screen.left
    assert killed
    psutil.wait_procs(killed)   # no training outlives its worker
    assert contents(workspace) == here
    assert not Pipeline(workspace).snapshot().stale

    said = (workspace.logs / "train@alpha,beta.log").read_text()
    assert "The worker that trained alpha was lost" in said
    begun = re.findall(r"in (\S+)/moa-worker-\S+: moa train --domain (\w+)$", said, re.MULTILINE)
    homes = {name: [home for home, domain in begun if domain == name] for name in NAMES}
    assert {Path(home).parent for home, _ in begun} == {cluster.folder}
    assert len(set(homes["alpha"])) == 2 and homes["beta"] == homes["alpha"][1:], "the other worker took it over"


@pytest.mark.parametrize("engine", ["dask", "ray"])
def test_a_cluster_of_this_machine_comes_and_goes_with_the_run(engine: str, workspace: Workspace) -> None:
    settings = configured(workspace, runner=engine, workers=1)
    command = [sys.executable, "-P", "-m", "flows.remote.train", "--command", FAILS, "--domain", "alpha"]
    mark = f"MOA_TEST_{workspace.root.parent.name}"   # every process of the cluster inherits it
    done = subprocess.run(command, cwd=workspace.root, capture_output=True, text=True,
                          env={**os.environ, mark: "1"})
    assert done.returncode == 1 and settings.execution.address is None
    assert done.stderr.splitlines()[-1] == "moa: No expert from a worker (alpha: The loss is not finite)."

    until(lambda: not [each for each in psutil.process_iter(["environ"]) if mark in (each.info["environ"] or ())])


# Order and policy, with workers in this process.

class Here:
    """An engine without a cluster: one place, which loses the first `losses` payloads."""

    def __init__(self, losses: int = 0, files: Files | None = None) -> None:
        self.losses, self.base = losses, files
        self.sent: list[list[str]] = []

    def places(self) -> int:
        return 1

    def submit(self, files: Files) -> int:
        self.sent.append(payload.header(files)["domains"])
        self.answer = (lambda: work(files, self.base, lambda _: None)) if len(self.sent) > self.losses else None
        return len(self.sent)

    def ready(self, tickets: Sequence[int], seconds: float) -> Sequence[int]:
        return tickets

    def result(self, ticket: int) -> Files:
        if self.answer is None:
            raise engines.WorkerLost("it is gone.")
        return self.answer()

    def close(self) -> None:
        pass


def test_an_error_of_the_training_is_one_sentence_and_not_tried_again(workspace: Workspace) -> None:
    settings = config.load(workspace.params)
    engine = Here(1, payload.pack_base(workspace, settings))
    with pytest.raises(PipelineError, match=r"^No expert from a worker \(alpha, beta: The loss is not finite\)\.$"
                       ) as failed:
        remote_training.train(workspace, settings, NAMES, FAILS, engine, lambda _: None)
    assert engine.sent == [["alpha", "beta"]] * 2   # once lost, once failed
    assert failed.value.cause is not None and failed.value.cause.error == "TrainingError"


def test_losses_have_a_bound(workspace: Workspace) -> None:
    engine, said = Here(99), list[str]()
    with pytest.raises(PipelineError, match="alpha: 3 workers were lost with it, the last one because: it is gone"):
        remote_training.train(workspace, config.load(workspace.params), ["alpha"], FAILS, engine, said.append)
    assert len(engine.sent) == remote_training.TRIES and len(said) == 2


def test_groups() -> None:
    def shared(count: int, places: int, most: int | None) -> list[int]:
        groups = engines.split_evenly([str(number) for number in range(count)], places, most)
        assert sorted(int(name) for group in groups for name in group) == list(range(count))
        return [len(group) for group in groups]

    assert shared(5, 2, None) == [3, 2] and shared(2, 8, None) == [1, 1]
    assert shared(1000, 8, 32) == [32] * 8 + [31] * 24 and shared(10, 1, None) == [10]


def test_groups_of_one_device_follow_each_other_whatever_becomes_of_them() -> None:
    says = "sh -c 'echo \"$@\"; test \"$2\" != alpha' moa"
    command, extra = _command(ExecutionParams(group=2), "cuda:1", says, ["alpha", "beta", "gamma"])
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "--domain alpha --domain gamma\n--domain beta\n")
    assert extra == {"MOA_DEVICE": "cuda:1"}
    assert _command(ExecutionParams(), "auto", "moa train", ["alpha"]) == ("moa train --domain alpha", {})


# Parcels.

def test_a_parcel_holds_what_training_reads_and_nothing_of_this_machine(workspace: Workspace) -> None:
    settings = configured(workspace, runner="ray", address="127.0.0.1:6379")
    files = payload.pack(workspace, settings, ["alpha"], "moa train")
    assert files.keys() == {"parcel.json", "params.yaml", "dvc.yaml", "data/base/manifest.json", *(
        f"data/corpora/alpha/{name}" for name in ("train.parquet", "validation.parquet", "manifest.json"))}
    assert not [name for name, data in files.items() if str(workspace.root).encode() in data]
    assert b"127.0.0.1" not in files["params.yaml"]


def test_a_parcel_that_was_altered_on_its_way_is_refused(workspace: Workspace) -> None:
    files = payload.pack(workspace, config.load(workspace.params), ["alpha"], "moa train")
    with pytest.raises(ArtifactError, match="arrived otherwise"):
        payload.header({**files, "params.yaml": b"{}"})
    with pytest.raises(ArtifactError, match=r"'\.\./up'"):
        payload.write({"../up": b""}, workspace.root)


def test_an_expert_is_only_taken_as_its_manifest_and_our_inputs_say(
        workspace: Workspace, here: dict[str, dict[str, bytes]]) -> None:
    settings = config.load(workspace.params)
    for name, data in here["alpha"].items():
        payload.write({f"data/experts/alpha/{name}": data}, workspace.root)
    good = payload.pack_answer(workspace, ["alpha"], None, "afar")
    shutil.rmtree(workspace.expert("alpha"))
    with (workspace.expert("alpha").parent / "nothing").open("w") as file:
        file.write("yet")
    bad = {**good, "data/experts/alpha/adapter_model.safetensors": b"other weights"}
    header = {**json.loads(bad.pop("parcel.json")), "files": {}}
    sealed = payload._sealed(bad, header)
    with pytest.raises(ArtifactError, match="'alpha' that afar sent is not what its manifest says"):
        payload.install_answer(workspace, settings, sealed)
    other = settings.model_copy(update={"train": settings.train.model_copy(update={"seed": 7})})
    with pytest.raises(ArtifactError, match="trained from other inputs"):
        payload.install_answer(workspace, other, good)
    assert not workspace.expert("alpha").exists()
    assert payload.install_answer(workspace, settings, good) is None
    assert (workspace.expert("alpha") / MANIFEST).read_bytes() == here["alpha"][MANIFEST]


@pytest.mark.parametrize(("fact", "value", "message"), [
    ("code", "0" * 32, "has another version of moa than the one that sent the work"),
    ("base", "0" * 64, "is not the one that was pinned: its content differs"),
])
def test_a_worker_refuses_what_it_cannot_do_as_here(workspace: Workspace, fact: str, value: str, message: str) -> None:
    settings = config.load(workspace.params)
    files = payload.pack(workspace, settings, ["alpha"], "moa train")
    header = {**json.loads(files.pop("parcel.json")), fact: value}
    answer = work(payload._sealed(files, header), payload.pack_base(workspace, settings), lambda _: None)
    assert message in payload.header(answer)["error"]["message"] and answer.keys() == {"parcel.json"}


# What a user may get wrong.

def test_an_engine_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound:   # nobody listens
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        for runner, address in (("ray", f"127.0.0.1:{port}"), ("dask", f"tcp://127.0.0.1:{port}")):
            with pytest.raises(ConfigError, match=f"No {runner.capitalize()} cluster answers at .*{port}.*start one"):
                remote_training.connect(ExecutionParams(runner=runner, address=address), None)
    with pytest.raises(ConfigError, match="'somewhere' has no host and port: write tcp://HOST:8786"):
        remote_training.connect(ExecutionParams(runner="dask", address="somewhere"), None)
    monkeypatch.setattr(engines, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="ray is not installed: run `pip install"):
        engines.require_engine(ExecutionParams(runner="ray"))
    engines.require_engine(ExecutionParams())


def test_an_address_without_a_cluster_is_refused(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"execution: address has no effect without a cluster"):
        configured(workspace, address="127.0.0.1:6379")
