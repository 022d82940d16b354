"""`moa upgrade` on real git and DVC: files in the new layout, comments kept, nothing stale for it, all or nothing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from moa.core import config, files, layout, transaction
from moa.core.errors import ArtifactError, ConfigError
from moa.core.paths import Workspace
from moa.workspace import init, upgrade
from moa.workspace.pipeline import Pipeline

REMOVED = {"assemble": "  seed: 3   # of joint training\n", "release": "  seed: 0\n  resamples: 500\n",
           "drift": "  psi: 0.5\n"}
STARTS = ', {.moa/starts.json: ["${key}"]}'
OURS = """
  # ours alone
  page:
    cmd: python page.py
    deps: [data/reports]
    params: [assemble, release]   # whole groups
    outs: [page.html]
"""


def built(root: Path, *, pipeline: str | None = None, extra: str = "") -> Workspace:
    """A workspace of an older version in which every stage is recorded as it stands, with files made up."""
    init.init(root, None, root.parent)
    (root / ".moa" / "format").unlink()
    workspace = Workspace(root)
    text = workspace.params.read_text().replace("domains: {}", "domains:\n  math: {metric: exact}   # sums")
    text = re.sub(r"\nformat: .*\n", "", text)
    for group, lines in REMOVED.items():
        text = text.replace(f"\n{group}:\n", f"\n{group}:\n{lines}")
    workspace.params.write_text(text)
    dvc = root / "dvc.yaml"
    dvc.write_text((pipeline or dvc.read_text()) + extra)
    for path in (workspace.raw("math"), workspace.base, workspace.corpus("math"), workspace.expert("math"),
                 workspace.mixture, workspace.reports):
        path.mkdir(parents=True)
        (path / "file").write_text(path.name)
    workspace.base_manifest.write_text("{}")
    (root / "page.html").write_text("page")
    pipeline_ = Pipeline(workspace)
    stages = pipeline_.snapshot().graph.stages
    pipeline_.record([name for name, stage in stages.items() if stage.command])
    assert not pipeline_.snapshot().stale and not dvc_status(workspace)
    return workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return built(tmp_path / "w", extra=OURS)


def dvc_status(workspace: Workspace) -> Any:
    done = subprocess.run([sys.executable, "-m", "dvc", "status", "--json"], cwd=workspace.root, check=True, text=True,
                          capture_output=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"})
    return json.loads(done.stdout)


def contents(workspace: Workspace) -> dict[str, bytes]:
    return {name: path.read_bytes() for name in upgrade.FILES if (path := workspace.root / name).exists()}


def moa(workspace: Workspace, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "moa", *words], cwd=workspace.root, text=True, capture_output=True)
    assert done.returncode == status and "Traceback" not in done.stderr, f"{done.stdout}\n{done.stderr}"
    return done


def test_keys_without_effect_go_and_nothing_gets_stale(workspace: Workspace) -> None:
    before = workspace.params.read_text()
    made = upgrade.upgrade(workspace)
    assert made.changed() == ["params.yaml", "dvc.lock"] and not made.left
    after = workspace.params.read_text()
    without = before
    for lines in REMOVED.values():
        without = without.replace(lines, "")
    assert after == f"{without}\nformat: 1   # {upgrade.FORMAT_COMMENT}\n"
    assert layout.tracked_layout(workspace.root) == layout.local_layout(workspace.root) == layout.LAYOUT
    recorded = Pipeline(workspace).recorded()
    assert recorded["page"]["params"]["params.yaml"]["release"] == YAML(typ="safe").load(after)["release"]
    assert not Pipeline(workspace).snapshot().stale and not dvc_status(workspace)


def test_without_the_lock_two_stages_would_get_stale(workspace: Workspace) -> None:
    lock = (workspace.root / "dvc.lock").read_bytes()
    upgrade.upgrade(workspace)
    (workspace.root / "dvc.lock").write_bytes(lock)
    assert Pipeline(workspace).snapshot().stale.keys() == dvc_status(workspace).keys() == {"assemble", "page"}


def test_what_was_stale_stays_stale_for_its_own_reason(workspace: Workspace) -> None:
    text = workspace.params.read_text()
    workspace.params.write_text(text.replace("joint_epochs: 0", "joint_epochs: 1").replace("seed: 3 ", "seed: 4 "))
    upgrade.upgrade(workspace)
    stale = Pipeline(workspace).snapshot().stale
    assert stale.keys() == {"assemble", "page"} and "parameter assemble changed" in stale["assemble"][0].text


def test_a_dry_run_shows_a_patch_and_changes_nothing(workspace: Workspace, tmp_path: Path) -> None:
    before = contents(workspace)
    shown = json.loads(moa(workspace, "upgrade", "--dry-run", "--json").stdout)
    assert shown["dry_run"] and shown["files"] == ["params.yaml", "dvc.lock"] and shown["layout"] == 1
    text = moa(workspace, "upgrade", "--dry-run").stdout
    assert text.startswith(shown["diff"]) and "-  psi: 0.5\n" in text and "Nothing was changed" in text
    assert contents(workspace) == before and not (workspace.root / ".moa" / "format").exists()
    patch = tmp_path / "patch"
    patch.write_text(shown["diff"])
    subprocess.run(["git", "apply", patch], cwd=workspace.root, check=True)
    patched = contents(workspace)
    for name, data in before.items():
        (workspace.root / name).write_bytes(data)
    moa(workspace, "upgrade")
    assert contents(workspace) == patched


def test_the_second_time_there_is_nothing_to_do(workspace: Workspace) -> None:
    named = "assemble.seed, release.resamples, release.seed, drift.psi"
    assert moa(workspace, "plan").stderr == (f"params.yaml: {named} have no effect any more; `moa upgrade` removes "
                                             "them.\n")
    done = moa(workspace, "upgrade")
    assert "Commit params.yaml, dvc.lock to git." in done.stdout and not done.stderr
    after = contents(workspace)
    assert moa(workspace, "upgrade").stdout == "Nothing to do: the workspace has layout 1.\n"
    again = json.loads(moa(workspace, "upgrade", "--json").stdout)
    assert again == {"layout": 1, "dry_run": False, "files": [], "done": [], "left": [], "diff": ""}
    assert contents(workspace) == after and not moa(workspace, "plan").stderr
    assert moa(workspace, "plan").stdout.startswith("Nothing to do")


def test_a_key_that_a_stage_names_itself_stays(tmp_path: Path) -> None:
    workspace = built(tmp_path / "w", extra=OURS.replace("[assemble, release]", "[assemble.seed]"))
    made = upgrade.upgrade(workspace)
    assert made.left == ["assemble.seed in params.yaml, which dvc.yaml names and moa reads no more"]
    assert made.changed() == ["params.yaml"]
    assert "seed: 3" in workspace.params.read_text() and "resamples" not in workspace.params.read_text()
    assert not Pipeline(workspace).snapshot().stale and not dvc_status(workspace)


def test_a_pipeline_from_before_trainings_had_starts(tmp_path: Path) -> None:
    today = (init.SCAFFOLD / "pipeline.yaml").read_text()
    old = today.replace(STARTS, "") + OURS
    workspace = built(tmp_path / "w", pipeline=old)
    assert ".moa/starts.json" not in (workspace.root / "dvc.lock").read_text()
    made = upgrade.upgrade(workspace)
    assert made.changed() == ["params.yaml", "dvc.yaml", "dvc.lock"]
    assert (workspace.root / "dvc.yaml").read_text() == today + OURS
    assert not Pipeline(workspace).snapshot().stale and not dvc_status(workspace)


def test_a_pipeline_from_before_code_was_a_parameter(tmp_path: Path) -> None:
    """It names modules that are elsewhere now, so DVC finds all of it stale before as after."""
    workspace = built(tmp_path / "w")
    dvc, today = workspace.root / "dvc.yaml", (init.SCAFFOLD / "pipeline.yaml").read_text()
    old = re.sub(r", \{\.moa/code\.json: \[\w+\]\}", "", today)
    old = old.replace("manifest.json]", "manifest.json, moa/base.py]")
    assert old.count("moa/base.py") == 4 and "code.json: [base]" not in old
    dvc.write_text(old)
    made = upgrade.upgrade(workspace)
    assert dvc.read_text() == today
    assert "dvc.yaml: train depends no more on moa/base.py, which is not there" in made.done


def test_stages_with_commands_of_their_own_are_left_alone(tmp_path: Path) -> None:
    changed = (init.SCAFFOLD / "pipeline.yaml").read_text().replace(STARTS, "").replace(
        "cmd: moa train --domain ${key}", "cmd: nice moa train --domain ${key}")
    workspace = built(tmp_path / "w", pipeline=changed)
    assert "dvc.yaml" not in upgrade.upgrade(workspace).changed()
    assert (workspace.root / "dvc.yaml").read_text() == changed


@pytest.mark.parametrize("old", [None, "moa.domain.*"])
def test_the_trigger_of_a_project_with_an_id_matches_its_events(workspace: Workspace, old: str | None) -> None:
    prefect, project = workspace.root / "prefect.yaml", config.load(workspace.params).project
    today = prefect.read_text()
    if old:
        prefect.write_text(today.replace(f"moa.project.{project}.domain.*", old))
    assert ("prefect.yaml" in upgrade.upgrade(workspace).changed()) == bool(old)
    assert prefect.read_text() == today


def test_a_flow_that_moved_is_named_where_it_lies(workspace: Workspace) -> None:
    prefect = workspace.root / "prefect.yaml"
    today = prefect.read_text()
    prefect.write_text(today.replace("flows.retrain.retrain", "flows.adapt.retrain"))
    assert "prefect.yaml" in upgrade.upgrade(workspace).changed()
    assert prefect.read_text() == today



def test_without_an_id_names_on_servers_stay(workspace: Workspace) -> None:
    workspace.params.write_text(re.sub(r"(?m)^project: .*\n", "", workspace.params.read_text()))
    prefect = workspace.root / "prefect.yaml"
    prefect.write_text("deployments: [{triggers: [{match: {prefect.resource.id: moa.domain.*}}]}]\n")
    assert "prefect.yaml" not in upgrade.upgrade(workspace).changed()
    assert config.load(workspace.params).project is None


@pytest.mark.parametrize(("name", "text", "sentence"), [
    ("params.yaml", "base: [", "params.yaml is not valid YAML"), ("params.yaml", "trian: {}\n", "base: Field required"),
    ("dvc.yaml", "stages: [", "dvc.yaml is not valid YAML"), ("dvc.lock", "stages: [", "dvc.lock is not valid YAML"),
    ("dvc.yaml", b"\xff", "dvc.yaml cannot be read"),
])
def test_what_cannot_be_read_is_one_sentence(workspace: Workspace, name: str, text: str | bytes, sentence: str) -> None:
    (workspace.root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = contents(workspace)
    for how in ([["--dry-run"]] if name == "dvc.lock" else [["--dry-run"], []]):   # a lock that was cut off is healed
        done = moa(workspace, "upgrade", *how, status=1)
        assert sentence in done.stderr and done.stderr.startswith("moa: ") and contents(workspace) == before


def test_a_file_that_must_be_edited_by_hand_leaves_all_as_it_was(workspace: Workspace) -> None:
    text = workspace.params.read_text()
    workspace.params.write_text(text.replace("\ndrift:\n", "\ndrift: &mine\n"))
    before = contents(workspace)
    with pytest.raises(ConfigError, match="`drift` must be written out"):
        upgrade.upgrade(workspace)
    assert contents(workspace) == before


@pytest.mark.parametrize("broken", ["params.yaml", "dvc.lock"])
def test_a_failure_between_two_files_leaves_all_as_it_was(workspace: Workspace, broken: str,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(workspace)

    def fail(path: Path, data: bytes) -> None:
        if path.name == broken:
            raise OSError(28, "No space left on device", str(path))
        files.write_atomic(path, data)

    monkeypatch.setattr(transaction, "write_atomic", fail)
    with pytest.raises(ArtifactError, match=r"`moa upgrade` failed .*nothing was changed"):
        upgrade.upgrade(workspace)
    assert contents(workspace) == before and not workspace.journal.exists()
    monkeypatch.undo()
    assert upgrade.upgrade(workspace).changed()
