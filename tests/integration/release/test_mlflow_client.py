"""The registry against `mlflow server` on loopback: what is told by it is what a SQLite database tells."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flows.prefect_server import free_port
from flows.steps import release
from moa.core import digests
from moa.core.errors import RegistryError
from moa.core.files import write_json
from moa.core.paths import MANIFEST, Workspace
from moa.release import mlflow_client
from moa.release.registry import Registry
from tests.integration.release.test_registry import CONFIG, build, counts, register
from tests.waiting import until

MADE_BY_MLFLOW = ("mlflow.user", "mlflow.modelVersions")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """In git, its corpora known to DVC; nothing built."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("registries")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(root)
        workspace = Workspace(root / "workspace")
        workspace.root.mkdir()
        workspace.params.write_text("{}")
        (workspace.root / "dvc.yaml").write_text("{}")
        outputs = ""
        for domain in CONFIG.domains:
            write_json(workspace.corpus(domain) / MANIFEST, {"digest": domain[0] * 64})
            outputs += (f"  prepare@{domain}:\n    outs:\n    - path: data/corpora/{domain}\n"
                        f"      md5: {domain[0] * 32}.dir\n")
        (workspace.root / "dvc.lock").write_text(f"schema: '2.0'\nstages:\n{outputs}")
        subprocess.run("git init -q . && git add params.yaml && git -c user.name=t -c user.email=t@t commit -qm t",
                       shell=True, cwd=workspace.root, check=True)
        yield workspace


@contextmanager
def mlflow_server(home: Path) -> Iterator[str]:
    """The address of a server with a database and an artifact store of its own, and nothing in them."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}", "--serve-artifacts",
         "--artifacts-destination", str(home / "artifacts")],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, cwd=home, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: answers(address), process)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/health").close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as address:
        yield address


def live(workspace: Workspace, address: str | None) -> Registry:
    """Two releases, each registered twice, the second promoted and rolled back: what a registry is for."""
    with pytest.MonkeyPatch.context() as patch:
        if address:
            patch.setenv("MLFLOW_TRACKING_URI", address)
        shutil.rmtree(workspace.cache, ignore_errors=True)   # no file may come from the other registry
        registry = Registry(workspace, CONFIG)
        assert registry.champion() is None and registry.history() == [] and registry.versions() == []
        for number, content in enumerate(("first", "second"), start=1):
            build(workspace, content)
            version = register(registry)
            assert version.created and version.version == number
            before = counts(registry)
            again = register(Registry(workspace, CONFIG))
            assert not again.created and again.version == number and counts(registry) == before == (3 * number,) * 3
        registry.record_gate(2, {"promote": True, "reason": "No domain is worse; better: math.", "against": 1})
        release.promote(workspace, CONFIG, 1, "first release", "ann")
        release.promote(workspace, CONFIG, 2, "better", "ben", instead_of=1)
        back = release.roll_back(workspace, CONFIG, note="users complain")
        assert back["version"] == 1 and registry.get("champion").version == 1
        with pytest.raises(RegistryError, match="no version 9; its versions: 1, 2"):
            registry.get(9)
        return registry


def told(registry: Registry) -> dict[str, Any]:
    """Everything there is to read, but for times, places and random names: those are told by what they belong to."""
    client, experiment = registry.open()
    models = {model.model_id: (model.name, model.tags["moa.digest"])
              for model in client.search_logged_models([experiment])}
    runs = {run.info.run_id: client.get_run(run.info.run_id) for run in client.search_runs([experiment])}
    versions = sorted(client.search_model_versions(), key=lambda each: (each.name, int(each.version)))
    return {
        "runs": {run.data.tags["moa.digest"]: _run(client, run, models) for run in runs.values()},
        "models": sorted((model.name, str(model.status), model.model_type, runs[model.source_run_id].info.run_name,
                          sorted(_ours(model.tags).items()), model.tags["mlflow.modelVersions"])
                         for model in client.search_logged_models([experiment])),
        "versions": [(each.name, int(each.version), each.description, each.status, sorted(each.tags.items()),
                      runs[each.run_id].data.tags["moa.digest"], models[each.source.rpartition("/")[2]],
                      sorted(client.get_model_version(each.name, each.version).aliases)) for each in versions],
        "registered": {each.name: (each.description, {key: int(value) for key, value in each.aliases.items()},
                                   len(each.tags)) for each in client.search_registered_models()},
        "history": [(entry.n, entry.version, entry.previous, entry.by, entry.reason, entry.effective)
                    for entry in registry.history()],
        "corpora": [registry.corpora(version) for version in registry.versions()],
        "params": [registry.params(version) for version in registry.versions()],
        "experts": [version.experts for version in registry.versions()],
        "files": {(each.name, int(each.version)): _files(registry, each) for each in versions}}


def _run(client: Any, run: Any, models: dict[str, tuple[str, str]]) -> dict[str, Any]:
    return {
        "name": run.info.run_name, "status": run.info.status, "params": run.data.params, "tags": _ours(run.data.tags),
        "curves": {key: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]
                   for key in run.data.metrics},
        "datasets": sorted((each.dataset.name, each.dataset.digest, each.dataset.source_type, each.dataset.source,
                            sorted((tag.key, tag.value) for tag in each.tags)) for each in run.inputs.dataset_inputs),
        "used": sorted(models[each.model_id] for each in run.inputs.model_inputs),
        "made": sorted(models[each.model_id] for each in run.outputs.model_outputs),
        "artifacts": sorted(each.path for each in client.list_artifacts(run.info.run_id))}


def _ours(tags: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in tags.items() if key not in MADE_BY_MLFLOW}


def _files(registry: Registry, version: Any) -> dict[str, str]:
    """Digest by name of what comes back; of the mixture, of what moa put there."""
    if version.name == registry.mixture_name:
        return digests.by_name(registry.download(int(version.version)).parent)
    from mlflow.artifacts import download_artifacts

    with mlflow_client.default_uri(registry.address):
        return digests.by_name(Path(download_artifacts(artifact_uri=f"models:/{version.name}/{version.version}")))


@pytest.fixture(scope="module")
def both(workspace: Workspace, server: str) -> tuple[dict[str, Any], dict[str, Any]]:
    database = told(live(workspace, None))
    kept = workspace.mlflow.parent / "kept"
    workspace.mlflow.rename(kept)   # whatever the server tells comes from the server
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", server)
        told_by_server = told(live(workspace, server))
        assert os.environ["MLFLOW_TRACKING_URI"] == server
    assert {path.suffix for path in workspace.mlflow.iterdir()} == {".lock"}
    return database, told_by_server


@pytest.mark.parametrize("part", ["runs", "models", "versions", "registered", "history", "corpora", "params", "experts",
                                  "files"])
def test_a_server_tells_what_a_database_tells(both: tuple[dict[str, Any], dict[str, Any]], part: str) -> None:
    database, told_by_server = both
    assert database[part] and told_by_server[part] == database[part]


def test_the_lineage_is_all_there(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Word by word: run, parameters, curves, inputs with DVC's digests, commit and dirty flag, base, exact pins."""
    for facts in both:
        (name, number, _, _, tags, digest, _, _), = [each for each in facts["versions"] if each[:2] == (
            "moa-expert-math", 2)]
        run, tags = facts["runs"][digest], dict(tags)
        assert run["status"] == "FINISHED" and run["params"]["learning_rate"] == str(CONFIG.train.learning_rate)
        assert run["curves"]["validation_loss"] == [(10, 1.6), (20, 1.3)]
        (dataset, known, kind, _, inputs), = run["datasets"]
        assert (dataset, known, kind) == ("math", f"{'m' * 32}.dir", "dvc") and ("dvc.md5", known) in inputs
        assert len(tags["moa.git.commit"]) == 40 and tags["moa.git.dirty"] == "true" and tags["moa.base"] == "b" * 64
        mixture = [dict(each[4]) for each in facts["versions"] if each[0] == "moa-mixture"][1]
        assert json.loads(mixture["moa.experts"])["math"] == {"name": name, "version": number, "digest": digest}
        assert facts["runs"][mixture["moa.digest"]]["used"] == sorted(
            (f"moa-expert-{domain}", pin["digest"]) for domain, pin in json.loads(mixture["moa.experts"]).items())
        assert facts["history"] == [(1, 1, None, "ann", "first release", True), (2, 2, 1, "ben", "better", True),
                                    (3, 1, 2, facts["history"][2][3], "rollback from version 2: users complain", True)]


FIRST_USER = """
import sys
from pathlib import Path
from moa.core.config import Config
from moa.core.paths import Workspace
from moa.release.registry import Registry
config = Config.model_validate({"base": {"source": "path:toy"}, "domains": {"math": {"metric": "exact"}}})
registry = Registry(Workspace(Path(sys.argv[1])), config)
print(registry.champion(), len(registry.versions()), registry.open()[1])
"""


def test_a_new_database_survives_company(tmp_path: Path) -> None:
    """Three processes are its first users at the same time: MLflow's own migrations do not survive that."""
    users = [subprocess.Popen([sys.executable, "-c", FIRST_USER, str(tmp_path)], cwd=tmp_path, text=True,
                              env={key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"},
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    said = [user.communicate() for user in users]
    assert {user.returncode for user in users} == {0}, said
    assert len(set(said)) == 1 and said[0][1] == ""


def test_the_database_is_whole_before_its_pages_are_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server makes tables without our lock: a command that opens the database meanwhile would find half of them."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    workspace = Workspace(tmp_path)
    assert mlflow_client.pages(workspace, free_port())
    with sqlite3.connect(workspace.mlflow / "mlflow.db") as database:
        assert database.execute("SELECT count(*) FROM experiments WHERE name = 'Default'").fetchone() == (1,)


def test_what_no_server_answers_and_what_one_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told apart by the exception's class: a refusal may speak of connections."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    with pytest.raises(RegistryError, match="MLflow at http://here refused: 'Connection timed out' is no name"), \
            mlflow_client.mlflow_errors("http://here"):
        raise MlflowException("'Connection timed out' is no name. Max retries exceeded.",
                              error_code=INVALID_PARAMETER_VALUE)
    monkeypatch.setattr(mlflow_client, "PROBE_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:   # it accepts connections, and says nothing
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(RegistryError, match=f"No MLflow server answers at {address}"):
            mlflow_client.connect(Workspace(tmp_path))
