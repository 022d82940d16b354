"""`moa doctor` as typed, in a workspace with real git and DVC, sound and with one thing broken each."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from filelock import FileLock

from moa.base import pin
from moa.cli import operate
from moa.cli.app import place
from moa.core import config
from moa.core.files import read_json, write_json
from moa.core.paths import Workspace
from moa.workspace.lock import LockHolder
from tests import tiny

SERVERS = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY", "MLFLOW_TRACKING_URI")
NOBODY = "http://127.0.0.1:9"   # where no server listens


@pytest.fixture(autouse=True)
def without_servers(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in (*SERVERS, "MOA_DTYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path_factory.getbasetemp() / "no-profiles"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose base is fetched. To be copied."""
    made = tiny.workspace(tmp_path_factory.mktemp("doctor") / "w")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"], ["git", "add", "params.yaml"],
                    ["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "t"]):
        subprocess.run(command, cwd=made.root, check=True)
    pin.fetch(made, config.load(made.params).base)
    return made


@pytest.fixture
def workspace(sound: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    shutil.copytree(sound.root, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.setattr(place, "directory", None)
    return Workspace(tmp_path / "w")


def moa(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moa", *words], cwd=folder, capture_output=True, text=True,
                          check=False)


def wrong(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The problems but those of the machine that the tests run on."""
    return [(each["check"], each["message"]) for each in facts["problems"] if each["check"] not in ("disk", "memory")]


def test_a_sound_workspace(workspace: Workspace) -> None:
    before = sorted(path for path in workspace.root.rglob("*") if ".git" not in path.parts)
    done = moa(workspace.root, "doctor", "--json")
    facts = json.loads(done.stdout)
    assert wrong(facts) == [] and done.returncode == bool(facts["problems"]) and "Traceback" not in done.stderr
    assert facts["workspace"] == str(workspace.root) and facts["lock"]["state"] == "free"
    assert facts["device"]["device"] == "cpu" and facts["cores"]["count"] > 0
    assert facts["threads"] == int(os.environ["OMP_NUM_THREADS"])
    assert facts["base"]["source"] == "path:tiny-base" and facts["mlflow"]["champion"] is None
    assert set(facts["compiler"]["libraries"]) == {"lora", "pieces", "step"} or facts["compiler"]["reason"]
    experts = facts["experts"]
    assert experts["serving"]["fit"] > experts["training"]["fit"] > 0
    assert experts["training"]["bytes"] == 8 * experts["serving"]["bytes"]   # all layers, as in serving
    # Nothing is left behind but a cache of digests.
    after = sorted(path for path in workspace.root.rglob("*") if ".git" not in path.parts)
    assert {path.name for path in set(after) - set(before)} <= {"weights.json"}


def test_as_text_with_a_base_that_is_not_fetched(workspace: Workspace) -> None:
    shutil.rmtree(workspace.base.parent)
    done = moa(workspace.root.parent, "doctor", "--workspace", "w")
    assert "not fetched yet: `moa base`" in done.stdout and done.stdout.startswith("moa "), done.stderr
    assert (done.stdout.splitlines()[-1] == "Nothing is wrong.") is (done.returncode == 0)


def test_outside_of_a_workspace_it_is_about_the_machine(tmp_path: Path) -> None:
    done = moa(tmp_path, "doctor", "--json")
    facts = json.loads(done.stdout)
    assert wrong(facts) == [] and "workspace" not in facts and facts["memory"]["free"] > 0
    assert facts["disks"][0]["holds"][0] == "current folder"
    named = moa(tmp_path.parent, "doctor", "--workspace", tmp_path.name)
    assert named.returncode == 2 and named.stderr.startswith("moa: No workspace at ") and not named.stdout


def examined(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The facts that the command prints in this process, which must end with 1."""
    with pytest.raises(typer.Exit) as end:
        operate.doctor(as_json=True)
    assert end.value.exit_code == 1
    return dict(json.loads(capsys.readouterr().out))


def killed_up(workspace: Workspace) -> None:
    write_json(workspace.up, {"pid": 1, "api": f"{NOBODY}/api", "since": "2026-01-01T00:00:00+00:00"})


def future_commit(workspace: Workspace) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "t", "--allow-empty"],
                   cwd=workspace.root, check=True, env={**os.environ, "GIT_COMMITTER_DATE": "2090-01-01T00:00:00Z"})


def future_event(workspace: Workspace) -> None:
    workspace.event_log.parent.mkdir(parents=True, exist_ok=True)
    workspace.event_log.write_text('{"n": 1, "at": "2090-01-01T00:00:00+00:00", "kind": "finished"}\n')


def other_tokenizer(workspace: Workspace) -> None:
    path = workspace.base / "tokenizer.json"
    path.write_text(f"{path.read_text()} ")


def lost_weights(workspace: Workspace) -> None:
    (workspace.root / "tiny-base" / "model.safetensors").unlink()


def wrong_parameter(workspace: Workspace) -> None:
    workspace.params.write_text(f"{workspace.params.read_text()}tain: {{}}\n")


def wrong_target(workspace: Workspace) -> None:
    workspace.params.write_text(workspace.params.read_text().replace("train:\n", "train:\n  targets: [nowhere]\n"))


def no_dvc(workspace: Workspace) -> None:
    shutil.rmtree(workspace.root / ".dvc")


def broken_repository(workspace: Workspace) -> None:
    (workspace.root / ".git" / "config").write_text("[core\n")


@pytest.mark.parametrize(("break_it", "check", "said"), [
    (killed_up, "services", "moa up was killed: start it again."),
    (future_commit, "clock", "The newest commit is from 2090-01-01T00:00:00+00:00, and this machine's clock says "),
    (future_event, "clock", "The last entry of the event log is from 2090-01-01T00:00:00+00:00, and this machine's"),
    (other_tokenizer, "base", "The base's tokenizer changed since it was fetched from path:tiny-base: run `moa base`"),
    (lost_weights, "base", "The base's weights changed since it was fetched from path:tiny-base: run `moa base`"),
    (wrong_parameter, "parameters", "params.yaml: unknown key 'tain'"),
    (wrong_target, "base", "No linear layer of the base is called 'nowhere'; it has "),
    (no_dvc, "dvc", "is not set up for DVC: run `dvc init` there first."),
    (broken_repository, "git", "`git rev-parse` failed: ")])
def test_one_thing_is_wrong(workspace: Workspace, capsys: pytest.CaptureFixture[str],
                            break_it: Callable[[Workspace], None], check: str, said: str) -> None:
    break_it(workspace)
    [(found, message)] = wrong(examined(capsys))
    assert found == check and said in message


@pytest.mark.parametrize(("variable", "value", "check", "said"), [
    ("PREFECT_API_URL", f"{NOBODY}/api", "services", f"The Prefect server at {NOBODY}/api, which your settings name, "),
    ("MLFLOW_TRACKING_URI", NOBODY, "mlflow", f"No MLflow server answers at {NOBODY}: start it, or unset "),
    ("MOA_DTYPE", "int3", "device", "MOA_DTYPE is 'int3'; allowed: bfloat16, ")])
def test_a_variable_is_wrong(workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                             variable: str, value: str, check: str, said: str) -> None:
    monkeypatch.setenv(variable, value)
    facts = examined(capsys)
    [(found, message)] = wrong(facts)
    assert found == check and message.startswith(said)
    assert facts["base"] is not None   # the other checks go on


def test_a_lock_whose_holder_gives_no_sign(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    holder = LockHolder.of(workspace)
    workspace.local.mkdir(exist_ok=True)
    with FileLock(workspace.lock), holder.seen():
        write_json(holder.path, {**read_json(holder.path), "until": time.time() - 1})
        facts = examined(capsys)
    [(check, message)] = wrong(facts)
    assert check == "lock" and message.startswith(f"The process {os.getpid()} has held the workspace's lock since ")
    assert facts["lock"]["state"] == "silent"


def test_a_run_at_work_is_shown_and_is_not_wrong(workspace: Workspace) -> None:
    workspace.local.mkdir(exist_ok=True)
    with FileLock(workspace.lock), LockHolder.of(workspace).seen():
        facts = json.loads(moa(workspace.root, "doctor", "--json").stdout)
    assert wrong(facts) == [] and facts["lock"]["state"] == "at work" and facts["lock"]["pid"] == os.getpid()
