"""32 domains, with the real dvc.yaml, git and DVC: whatever happens to one leaves the others' experts fresh.

What the steps would make is fabricated and recorded, as `moa run` records what it trained.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moa.core import config
from moa.core.errors import ArtifactError
from moa.core.files import write_json
from moa.core.paths import Workspace
from moa.workspace import domains
from moa.workspace.data_versions import DataVersions
from moa.workspace.init import init
from moa.workspace.pipeline import Pipeline

NAMES = [f"domain-{number:02}" for number in range(32)]


def rows(name: str, count: int = 3) -> str:
    return "".join(json.dumps({"instruction": f"{name} {number}?", "output": str(number)}) + "\n"
                   for number in range(count))


def fabricate(workspace: Workspace, name: str) -> list[str]:
    """Outputs of the domain's own steps; the names of these."""
    for folder in (workspace.corpus(name), workspace.expert(name)):
        folder.mkdir(parents=True)
        write_json(folder / "manifest.json", {"of": name, "rows": {"train": 3}})
    return [f"prepare@{name}", f"train@{name}"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    (folder / "base").mkdir()
    init(folder / "w", f"path:{folder / 'base'}", folder)
    workspace = Workspace(folder / "w")
    for name in NAMES:
        (folder / f"{name}.jsonl").write_text(rows(name))
        domains.add(workspace, name, [f"{name}.jsonl"], folder, {})
    write_json(workspace.base_manifest, {"kind": "base"})
    workspace.base.mkdir()
    made = ["base", *(stage for name in NAMES for stage in fabricate(workspace, name)), "assemble", "evaluate"]
    for output in (workspace.mixture, workspace.reports):
        output.mkdir()
        write_json(output / "manifest.json", {})
    Pipeline(workspace).record(made)
    return folder


@pytest.fixture
def workspace(template: Path, tmp_path: Path) -> Workspace:
    return Workspace(shutil.copytree(template / "w", tmp_path / "w", symlinks=True))


def moa(workspace: Workspace, *words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "moa", *words, "--workspace", str(workspace.root)],
                          cwd=workspace.root.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stale(workspace: Workspace) -> dict[str, str]:
    plan: dict[str, Any] = json.loads(moa(workspace, "plan", "--json"))
    return {step["name"]: step["state"] for step in plan["stale"]}


def test_add_change_and_remove(workspace: Workspace) -> None:
    assert stale(workspace) == {}
    new, old = workspace.root.parent / "new.jsonl", "domain-07"
    new.write_text(rows("new"))
    moa(workspace, "domain", "add", "new", "new.jsonl")
    assert stale(workspace) == {"prepare@new": "stale", "train@new": "stale", "assemble": "stale", "evaluate": "stale"}
    assert "32 other domains untouched" in moa(workspace, "domain", "remove", "new", "--yes")
    assert stale(workspace) == {}   # not even the mixture: everything is as it was
    moa(workspace, "domain", "add", old, "new.jsonl")
    assert stale(workspace) == {f"prepare@{old}": "stale", f"train@{old}": "maybe", "assemble": "maybe",
                                "evaluate": "maybe"}
    said = moa(workspace, "domain", "remove", old, "--yes")
    assert "31 other domains untouched: same files and digests, prepare and train as fresh as before." in said
    assert stale(workspace) == {"assemble": "stale", "evaluate": "stale"}
    listed = json.loads(moa(workspace, "domain", "list", "--json"))["domains"]
    assert [each["name"] for each in listed] == [name for name in NAMES if name != old]
    assert {state for each in listed for state in each["steps"].values()} == {"fresh"}


def test_nothing_is_left_of_a_removed_domain(workspace: Workspace) -> None:
    name = "domain-31"
    rejected = workspace.local / "rejected" / f"{name}.jsonl"
    rejected.parent.mkdir()
    rejected.write_text("{}\n")
    done = domains.remove(workspace, name)
    assert done["lock_entries"] == [f"prepare@{name}", f"train@{name}"] and done["others"] == 31
    assert not rejected.exists() and name not in config.load(workspace.params).domains
    left = [path for path in workspace.data.rglob("*") if name in path.name]
    assert not left and f"@{name}" not in (workspace.root / "dvc.lock").read_text()
    assert name not in "".join(path.read_text() for path in workspace.data.rglob(".gitignore"))


def test_purging_forgets_what_steps_once_made(workspace: Workspace) -> None:
    name, cache = "domain-30", workspace.root / ".dvc" / "cache"

    def holding(words: bytes) -> list[Path]:
        return [path for path in cache.rglob("*") if path.is_file() and words in path.read_bytes()]

    assert holding(name.encode()) and any("runs" in path.parts for path in holding(name.encode()))
    purged = domains.remove(workspace, name, purge=True)["purged"]
    assert purged["kept"] == 0 and purged["objects"] == 4   # rows, one manifest that both steps made, and the folders
    assert not holding(f"--domain {name}".encode()) and not holding(f'"of": "{name}"'.encode())
    assert holding(b'"of": "domain-29"') and holding(b"--domain domain-29") and stale(workspace).keys() == {
        "assemble", "evaluate"}


def test_another_domain_that_would_not_be_untouched(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    before = workspace.params.read_bytes()
    forget = DataVersions.forget

    def too_much(self: DataVersions, names: list[str], folders: list[Path]) -> None:
        forget(self, [*names, "train@domain-02"], folders)

    monkeypatch.setattr(DataVersions, "forget", too_much)
    with pytest.raises(ArtifactError, match="domain-02 would not be untouched"):
        domains.remove(workspace, "domain-01")
    assert workspace.params.read_bytes() == before and workspace.expert("domain-01").exists()
    assert stale(workspace) == {}
