"""A workspace that an older version of moa left is gone on with, before and after `moa upgrade`: tests/data/README.md
says what is in it."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest
from ruamel.yaml import YAML

from flows.steps import event_log
from moa.core.paths import Workspace
from tests import tiny

ARCHIVE = Path(__file__).parents[2] / "data" / "workspace-0.1.tar.xz"
PLACE = "/tmp/moa-old-workspace"   # where it was made
LOCATIONS = {"runs": "artifact_uri", "logged_models": "artifact_location", "experiments": "artifact_location",
             "model_versions": "storage_location"}
QUESTION = tiny.row("alpha", 3)["instruction"]
PREDICT = """
import json, sys, mlflow
model = mlflow.pyfunc.load_model("models:/moa-mixture@champion")
print(json.dumps(model.predict({"messages": [{"role": "user", "content": sys.argv[1]}], "max_tokens": 4})))
"""
# As a worker of a work pool loads what prefect.yaml names.
FLOWS = """
import sys
from prefect.flows import load_flow_from_entrypoint
print(*(load_flow_from_entrypoint(name).name for name in sys.argv[1:]))
"""
REMOVED = {"assemble: {}\n": "assemble:\n  seed: 0   # ours\n", "  min_rows: 4\n": "  min_rows: 4\n  seed: 0\n"}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / Path(PLACE).name


@pytest.fixture
def old(unpacked: Path, tmp_path: Path) -> Workspace:
    """With two keys of params.yaml that moa read then and does not read any more."""
    root = tmp_path / "w"
    shutil.copytree(unpacked, root, symlinks=True)
    database = sqlite3.connect(root / ".moa" / "mlflow" / "mlflow.db")
    with database:
        for table, column in LOCATIONS.items():
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (PLACE, str(root)))
    database.close()
    text = (root / "params.yaml").read_text()
    for before, after in REMOVED.items():
        assert before in text
        text = text.replace(before, after)
    (root / "params.yaml").write_text(text)
    return Workspace(root)


@pytest.fixture(params=["as it was", "upgraded"])
def workspace(request: pytest.FixtureRequest, old: Workspace) -> Workspace:
    if request.param == "upgraded":
        moa(old, "upgrade")
    return old


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_TRACKING", "PREFECT_API"))}
    return {**kept, "OMP_NUM_THREADS": "1"}


def moa(workspace: Workspace, *words: str, status: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "moa", *words], cwd=workspace.root, env=environment(), text=True,
                          capture_output=True)
    assert done.returncode == status, f"{words}: {done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


def said(workspace: Workspace, *words: str, status: int = 0) -> dict[str, Any]:
    return dict(json.loads(moa(workspace, *words, "--json", status=status)))


def test_it_is_looked_at(workspace: Workspace, tmp_path: Path) -> None:
    facts = said(workspace, "status")
    assert facts["champion"] == "moa-mixture version 2" and facts["interrupted"] == ["alpha"]
    assert [entry["kind"] for entry in facts["ledger"]][-1] == "start-chosen"
    assert "poison" in moa(workspace, "log")
    listed = said(workspace, "release", "list")
    assert [(each["version"], each["state"]) for each in listed["releases"]] == [
        (3, "refused"), (2, "champion"), (1, "was champion")]
    stale = said(workspace, "plan")["stale"]
    assert {"train@alpha", "assemble", "evaluate"} <= {each["name"] for each in stale}
    page = tmp_path / "report.html"
    moa(workspace, "report", "--html", str(page))
    assert "beta" in page.read_text(encoding="utf-8")


def test_its_releases_answer_as_they_did(workspace: Workspace) -> None:
    answer = said(workspace, "ask", QUESTION, "--max-new-tokens", "4")
    assert answer["release"] == 2 and answer["domain"] in ("alpha", "base")
    assert said(workspace, "release", "rollback")["version"] == 1
    assert said(workspace, "ask", QUESTION, "--max-new-tokens", "4")["release"] == 1
    # The script that MLflow stored with a release imports its model from where it was then.
    found = subprocess.run([sys.executable, "-c", PREDICT, QUESTION], cwd=workspace.root, text=True, check=True,
                           capture_output=True, env={**environment(), "MOA_WORKSPACE": str(workspace.root),
                                                     "MLFLOW_TRACKING_URI": f"sqlite:///{workspace.mlflow}/mlflow.db"})
    assert json.loads(found.stdout)["choices"][0]["message"]["role"] == "assistant"


def test_it_is_served(workspace: Workspace) -> None:
    process = subprocess.Popen([sys.executable, "-m", "moa", "serve", "--port", "0"], cwd=workspace.root, text=True,
                               env=environment(), stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("moa-mixture/2 serves at "), line
        body = {"model": "moa/alpha", "max_tokens": 4, "messages": [{"role": "user", "content": QUESTION}]}
        reply = httpx.post(f"{line.split()[-1]}/chat/completions", json=body, timeout=None)
        assert reply.status_code == 200 and reply.headers["X-Moa-Release"] == "moa-mixture/2"
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 0


def test_what_was_interrupted_is_brought_to_an_end(workspace: Workspace) -> None:
    done = json.loads(subprocess.run([sys.executable, "-m", "moa", "adapt", "--local", "--json"], cwd=workspace.root,
                                     env=environment(), text=True, capture_output=True).stdout)
    assert done["state"] in ("released", "kept", "refused")
    assert event_log.read(workspace, last=1)[0]["kind"] == "finished" and not workspace.adaptation_state.exists()
    moa(workspace, "run", "--local")
    assert not said(workspace, "plan")["stale"]
    assert said(workspace, "status")["champion"].startswith("moa-mixture version ")   # the names it always had


def test_its_flows_are_where_its_prefect_file_says(old: Workspace) -> None:
    named = [each["entrypoint"] for each in YAML(typ="safe").load(old.root / "prefect.yaml")["deployments"]]
    done = subprocess.run([sys.executable, "-c", FLOWS, *named], cwd=old.root, env=environment(), text=True, check=True,
                          capture_output=True)
    assert done.stdout.split() == ["adapt", "retrain", "drift"]


def stale(workspace: Workspace) -> tuple[list[str], list[str]]:
    """What moa finds stale itself, without what may follow from it, and what DVC does."""
    found = [each["name"] for each in said(workspace, "plan")["stale"] if each["state"] == "stale"]
    words = [sys.executable, "-m", "dvc", "status", "--json"]
    status = json.loads(subprocess.run(words, cwd=workspace.root, env=environment(), text=True, check=True,
                                       capture_output=True).stdout)
    return sorted(found), sorted(name for name in status if not name.endswith(".dvc"))


def test_an_upgrade_makes_nothing_stale_and_changes_no_name(old: Workspace) -> None:
    def tracked() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in old.root.iterdir() if path.is_file()}

    facts, before, files = said(old, "status"), stale(old), tracked()
    assert before[0] == before[1]
    shown = said(old, "upgrade", "--dry-run")
    changed = {"params.yaml", "dvc.yaml", "prefect.yaml", "dvc.lock"}   # the last: that assemble extends nothing
    assert set(shown["files"]) == changed and tracked() == files
    assert said(old, "upgrade")["diff"] == shown["diff"]
    assert "assemble: {}\n" in (text := old.params.read_text()) and "seed" not in text and "format: 1 " in text
    assert {name for name, data in tracked().items() if data != files[name]} == changed
    assert said(old, "upgrade")["files"] == []
    assert stale(old) == before
    assert said(old, "status") == facts
