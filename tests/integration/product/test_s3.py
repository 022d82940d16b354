"""A DVC remote and MLflow's artifacts on S3, against a real server on loopback, set up as a user sets them up."""

import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flows.steps import release
from flows.steps.runner import LocalRunner
from flows.steps.session import BuildOptions, open_session
from flows.steps.stage_order import build
from moa.core import config
from moa.core.paths import Workspace
from moa.release.champion import champion, open_mixture
from moa.workspace.data_versions import DataVersions
from moa.workspace.dvc_repository import initialise
from tests import tiny
from tests.waiting import until

NAMES = ("alpha", "beta")
QUESTION = [[{"role": "user", "content": "alpha: what is alpha 3?"}]]
RECORDED = ["base", *(f"{step}@{name}" for step in ("prepare", "train") for name in NAMES), "assemble", "evaluate"]
PARAMS: dict[str, dict[str, Any]] = {
    "train": {"rank": 2, "alpha": 4.0, "epochs": 2, "batch_tokens": 512},
    "evaluate": {"rows": 4, "generate_rows": 1, "max_new_tokens": 4}}


@dataclass
class Store:
    """One bucket of an S3 server."""

    endpoint: str

    def keys(self, prefix: str) -> str:
        return self.get(f"/moa?list-type=2&prefix={prefix}")

    def created(self) -> bool:
        """Make the bucket; whether the server was there to do it."""
        try:
            self.get("/moa", "PUT")
        except OSError:
            return False
        return True

    def get(self, path: str, method: str = "GET") -> str:
        request = urllib.request.Request(f"{self.endpoint}{path}", method=method)
        with urllib.request.urlopen(request) as reply:
            return str(reply.read().decode())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A server with an empty bucket; the environment says what a user's would: keys, and MLflow's endpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                               cwd=tmp_path_factory.mktemp("s3"), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    made = Store(f"http://127.0.0.1:{port}")
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": "a-secret",
                                "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
                                "MLFLOW_S3_ENDPOINT_URL": made.endpoint, "MOA_DTYPE": "float32",
                                "DVC_SITE_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "site")}.items():
                patch.setenv(name, value)
            until(made.created, process)
            yield made
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def workspace(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Built and recorded, its bytes pushed to S3, all else committed to git."""
    made = tiny.workspace(tmp_path_factory.mktemp("pushed") / "w", NAMES, **PARAMS)
    scaffold = tiny.REPOSITORY / "moa" / "workspace" / "scaffold"
    shutil.copyfile(scaffold / "gitignore", made.root / ".gitignore")
    shutil.copyfile(scaffold / "data" / "gitignore", made.data / ".gitignore")
    run(made, "git", "init", "-q")
    settings = config.load(made.params)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.root)
        initialise(made.root)
        versions = DataVersions(made)
        for name in NAMES:
            versions.add(made.raw(name))
        tiny.build(made, settings)
        versions.snapshot()
        versions.record(RECORDED)
    dvc(made, "remote", "add", "--default", "store", "s3://moa/experts")
    dvc(made, "remote", "modify", "store", "endpointurl", store.endpoint)
    dvc(made, "push", "--quiet")
    run(made, "git", "add", "--all")
    run(made, "git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "pushed")
    return made


@pytest.fixture(scope="module")
def fresh(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A clone on a machine that has nothing of it: what it gets, it gets from git and S3."""
    made = Workspace(tmp_path_factory.mktemp("pulled") / "w")
    run(workspace, "git", "clone", "--quiet", str(workspace.root), str(made.root))
    dvc(made, "pull", "--quiet")
    return made


def run(workspace: Workspace, *command: str) -> None:
    done = subprocess.run(command, cwd=workspace.root, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def dvc(workspace: Workspace, *words: str) -> None:
    run(workspace, sys.executable, "-m", "dvc", *words)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_clone_pulls_everything_and_trains_nothing(store: Store, workspace: Workspace, fresh: Workspace,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    assert "experts/files/md5/" in store.keys("experts/")
    for folder in ("raw", "corpora", "experts", "mixture", "reports"):
        assert contents(fresh.data / folder) == contents(workspace.data / folder), folder
    assert not fresh.base.exists()   # the base comes back from its source
    monkeypatch.chdir(fresh.root)
    with open_session(fresh, BuildOptions()) as session:
        session.hooks = ()
        result = build(session, LocalRunner(1))
    assert result.failure() is None
    assert result.named("done") == ["base"] and {"train@alpha", "train@beta", "assemble"} <= set(result.named("cached"))
    assert (fresh.root / "dvc.lock").read_bytes() == (workspace.root / "dvc.lock").read_bytes()


def test_a_release_on_s3_answers_in_a_fresh_folder(store: Store, workspace: Workspace, fresh: Workspace,
                                                   tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.cli import cli

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    cli(["experiments", "create", "--experiment-name", "moa", "--artifact-location", "s3://moa/mlflow"],
        standalone_mode=False)
    settings = config.load(workspace.params)
    monkeypatch.chdir(workspace.root)
    released = release.register_mixture(workspace, settings, release.register_experts(workspace, settings))
    release.promote(workspace, settings, released.version, "the first")
    assert "adapter_model.safetensors" in store.keys("mlflow/") and not (workspace.mlflow / "artifacts").exists()

    monkeypatch.chdir(fresh.root)
    version, folder = champion(fresh, settings)
    assert version.digest == released.digest and folder.is_relative_to(fresh.cache)
    assert contents(folder) == contents(workspace.mixture)
    ours, theirs = (open_mixture(place, workspace).generate(QUESTION, max_new_tokens=8)
                    for place in (workspace.mixture, folder))
    assert ours == theirs and ours[0].domain in (*NAMES, "base")
