"""A workspace that an older version of moa left is gone on with: tests/data/README.md says what is in it."""

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


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / Path(PLACE).name


@pytest.fixture
def workspace(unpacked: Path, tmp_path: Path) -> Workspace:
    root = tmp_path / "w"
    shutil.copytree(unpacked, root, symlinks=True)
    database = sqlite3.connect(root / ".moa" / "mlflow" / "mlflow.db")
    with database:
        for table, column in LOCATIONS.items():
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (PLACE, str(root)))
    database.close()
    return Workspace(root)


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
