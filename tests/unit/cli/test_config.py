"""`moa config`: the values of a workspace, and a schema for editors anywhere."""

import json
import subprocess
import sys
from pathlib import Path

from moa.core import config_reference

PARAMS = "base: {source: 'path:x'}\ndomains: {math: {metric: exact}}\nrelease: {approval: manual}\n"


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moa", "config", *words], cwd=cwd, capture_output=True, text=True)


def test_show(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    shown = run("show", cwd=tmp_path).stdout
    assert [line.split()[:3] for line in shown.splitlines()[:-1] if line.startswith("*")] == [
        ["*", "approval", "manual"]]
    groups = {group["name"]: group for group in json.loads(run("show", "--json", cwd=tmp_path).stdout)["groups"]}
    approval = next(each for each in groups["release"]["parameters"] if each["name"] == "release.approval")
    assert (approval["value"], approval["default"], approval["differs"]) == ("manual", "auto", True)
    assert approval["description"] and groups["release"]["description"]


def test_a_mistake_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS + "train: {rank: 0}\n")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    done = run("show", cwd=tmp_path)
    assert done.returncode == 1 and not done.stdout and "train.rank" in done.stderr and "Traceback" not in done.stderr


def test_schema_needs_no_workspace(tmp_path: Path) -> None:
    done = run("schema", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout) == config_reference.schema()
