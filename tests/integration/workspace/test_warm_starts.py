"""Starts in a workspace with real git and DVC: kept, versioned, and a reason for one training alone to run again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moa.base import pin
from moa.core import config, digests
from moa.core.config import Config
from moa.core.errors import ArtifactError, PipelineError
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.core.subprocesses import environment
from moa.data import prepare
from moa.experts import train
from moa.experts.peft_format import WEIGHTS
from moa.mixture.assemble import assemble
from moa.workspace import domains, warm_starts
from moa.workspace.data_versions import DataVersions
from moa.workspace.dvc_repository import initialise
from moa.workspace.warm_starts import InitialExpert
from tests import tiny

NAMES = ("alpha", "beta-2", "2024")   # a name may be all digits
TRAIN = {"rank": 2, "alpha": 4.0, "epochs": 2, "batch_tokens": 512}
RECORDED = ["base", *(f"{step}@{name}" for step in ("prepare", "train") for name in NAMES), "assemble"]
FOLLOWS = {"assemble", "evaluate"}


@pytest.fixture(autouse=True)
def environment_of_tests(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "site"))
    monkeypatch.setenv("MOA_DTYPE", "float32")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Three domains with recorded experts, and a mixture."""
    root = tmp_path_factory.mktemp("starts")
    workspace = tiny.workspace(root, NAMES, train=TRAIN)
    scaffold = tiny.REPOSITORY / "moa" / "workspace" / "scaffold"
    shutil.copyfile(scaffold / "gitignore", root / ".gitignore")
    shutil.copyfile(scaffold / "data" / "gitignore", workspace.data / ".gitignore")
    subprocess.run(["git", "init", "-q", root], check=True)
    settings = config.load(workspace.params)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("MOA_DTYPE", "float32")
        patch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "site"))
        initialise(root)
        pin.fetch(workspace, settings.base)
        for name in NAMES:
            prepare.prepare(workspace, settings, name)
        train.train(workspace, settings, NAMES)
        assemble(workspace, settings)
        versions = DataVersions(workspace)
        versions.snapshot()
        versions.record(RECORDED)
    return workspace


@pytest.fixture
def workspace(template: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    shutil.copytree(template.root, tmp_path / "w", symlinks=True)
    monkeypatch.chdir(tmp_path / "w")
    return Workspace(tmp_path / "w")


@pytest.fixture
def settings(workspace: Workspace) -> Config:
    return config.load(workspace.params)


def stale(workspace: Workspace) -> dict[str, list[str]]:
    return {name: [reason.text for reason in reasons] for name,
            reasons in DataVersions(workspace).snapshot().stale.items()}


def expert_digest(workspace: Workspace, name: str) -> str:
    found: str = read_json(workspace.expert(name) / MANIFEST)["digest"]
    return found


def parents(workspace: Workspace) -> list[str]:
    return sorted(path.name for path in workspace.parents.iterdir()) if workspace.parents.exists() else []


def dvc(workspace: Workspace, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dvc", *words], cwd=workspace.root, env=environment(),
                          capture_output=True, text=True, check=False)


# What DVC sees.

def test_every_domain_has_a_key_whatever_comes_and_goes(workspace: Workspace, tmp_path: Path) -> None:
    assert set(stale(workspace)) == {"evaluate"}   # was never run
    assert read_json(workspace.projection) == dict.fromkeys(NAMES)
    written = workspace.projection.stat().st_mtime_ns
    DataVersions(workspace).snapshot()
    assert workspace.projection.stat().st_mtime_ns == written and not workspace.starts.exists()
    rows = tmp_path / "law.jsonl"
    rows.write_text("".join(json.dumps(tiny.row("law", number)) + "\n" for number in range(20)))
    domains.add(workspace, "law", [str(rows)], tmp_path, {})
    assert set(stale(workspace)) == {"prepare@law", "train@law", "assemble", "evaluate"}
    assert read_json(workspace.projection) == {"law": None, **dict.fromkeys(NAMES)}
    assert dvc(workspace, "status", "train@law", "train@2024").returncode == 0
    domains.remove(workspace, "law")
    assert set(stale(workspace)) == {"evaluate"} and read_json(workspace.projection) == dict.fromkeys(NAMES)
    domains.remove(workspace, "2024")
    assert set(stale(workspace)) == FOLLOWS and read_json(workspace.projection) == dict.fromkeys(NAMES[:2])


@pytest.mark.parametrize(("name", "parent"), [("beta-2", "alpha"), ("2024", "2024")])
def test_a_start_makes_one_training_stale(workspace: Workspace, name: str, parent: str) -> None:
    versions = DataVersions(workspace)
    start = warm_starts.use(versions, name, parent)
    assert start == InitialExpert(parent,
                                  expert_digest(workspace, parent)) and warm_starts.read(workspace) == {name: start}
    snapshot = versions.snapshot()
    assert set(snapshot.stale) == {f"train@{name}", "evaluate"}
    assert snapshot.affected == {f"train@{name}", *FOLLOWS}
    assert read_json(workspace.projection) == {**dict.fromkeys(NAMES), name: read_json(workspace.starts)[name]}
    warm_starts.forget(versions, [name, "law"])
    assert set(stale(workspace)) == {"evaluate"} and not workspace.starts.exists()


def test_another_start_is_a_change_and_the_same_start_is_none(workspace: Workspace, settings: Config) -> None:
    versions = DataVersions(workspace)
    warm_starts.use(versions, "beta-2", "alpha")
    first = train.fingerprint(workspace, settings, "beta-2")
    train.train(workspace, settings, ["beta-2"])
    versions.record(["train@beta-2"])
    assert set(stale(workspace)) == FOLLOWS
    warm_starts.use(versions, "beta-2", "alpha")
    assert set(stale(workspace)) == FOLLOWS
    warm_starts.use(versions, "beta-2", "2024")
    assert set(stale(workspace)) == {"train@beta-2", *FOLLOWS}
    assert train.fingerprint(workspace, settings, "beta-2") != first


def test_dvc_brings_back_an_expert_by_its_start(workspace: Workspace, settings: Config) -> None:
    versions = DataVersions(workspace)
    afresh = (workspace.expert("beta-2") / WEIGHTS).read_bytes()
    warm_starts.use(versions, "beta-2", "alpha")
    train.train(workspace, settings, ["beta-2"])
    versions.record(["train@beta-2"])
    warm, before = (workspace.expert("beta-2") / WEIGHTS).read_bytes(), warm_starts.read(workspace)
    assert warm != afresh
    warm_starts.forget(versions, ["beta-2"])
    for wanted in (afresh, warm):
        assert "train@beta-2" in stale(workspace) and versions.restorable(["train@beta-2"]) == {"train@beta-2"}
        lines: list[str] = []
        versions.reproduce("train@beta-2", lines.append)
        assert not lines   # nothing was trained
        assert (workspace.expert("beta-2") / WEIGHTS).read_bytes() == wanted
        assert train.finished(workspace, settings, "beta-2")
        warm_starts.restore(versions, before)


def test_params_that_cannot_be_read_change_nothing(workspace: Workspace) -> None:
    versions = DataVersions(workspace)
    start = warm_starts.use(versions, "beta-2", "alpha")
    shown = workspace.projection.read_bytes()
    for text in ("domains: [", "domains: 3\n", "3\n"):
        workspace.params.write_text(text)
        with pytest.raises(PipelineError):
            versions.snapshot()
        assert workspace.projection.read_bytes() == shown and warm_starts.read(workspace) == {"beta-2": start}


# What is kept.

def test_the_parent_is_kept_as_it_was_and_git_sees_what_it_needs(workspace: Workspace) -> None:
    versions = DataVersions(workspace)
    start = warm_starts.use(versions, "beta-2", "alpha")
    kept = workspace.parent(start.digest)
    assert kept.name == start.digest[:16] and digests.of_expert(kept) == start.digest
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == {
        path.name: path.read_bytes() for path in workspace.expert("alpha").iterdir()}
    assert read_json(workspace.starts) == {
        "beta-2": {"domain": "alpha", "digest": start.digest, "path": f"data/parents/{kept.name}"}}
    seen = subprocess.run(["git", "status", "--porcelain", "-uall", "data"], cwd=workspace.root, capture_output=True,
                          text=True, check=True).stdout.split()
    assert {path for path in seen if "parents" in path or "starts" in path} == {
        "data/starts.json", f"data/parents/{kept.name}.dvc", "data/parents/.gitignore"}
    written = (kept / WEIGHTS).stat().st_ino
    warm_starts.use(versions, "2024", "alpha")   # one copy for both
    assert parents(workspace) == [".gitignore", kept.name, f"{kept.name}.dvc"]
    assert (kept / WEIGHTS).stat().st_ino == written and set(warm_starts.read(workspace)) == {"beta-2", "2024"}


def test_the_sentence_about_missing_bytes_says_what_helps(workspace: Workspace, settings: Config) -> None:
    start = warm_starts.use(DataVersions(workspace), "beta-2", "alpha")
    kept = workspace.parent(start.digest)
    for damage, words in ((lambda: shutil.rmtree(kept), ("checkout",)),
                          (lambda: (kept / WEIGHTS).write_bytes(b"x"), ("checkout", "--force"))):
        damage()
        with pytest.raises(ArtifactError) as error:
            train.train(workspace, settings, ["beta-2"])
        command = [*words, f"data/parents/{kept.name}.dvc"]
        assert f"`dvc {' '.join(command)}`" in str(error.value)
        assert dvc(workspace, *command).returncode == 0 and digests.of_expert(kept) == start.digest
    train.train(workspace, settings, ["beta-2"])
    assert read_json(workspace.expert("beta-2") / MANIFEST)["parent"]["digest"] == start.digest


def test_an_expert_that_is_not_there_or_not_itself_is_no_parent(workspace: Workspace) -> None:
    versions = DataVersions(workspace)
    with pytest.raises(ArtifactError, match="Domain 'law' has no expert to begin at: run `moa train --domain law` fir"):
        warm_starts.use(versions, "beta-2", "law")
    with (workspace.expert("alpha") / WEIGHTS).open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match="'alpha' is not the one its manifest names: run `moa train --domain alpha"):
        warm_starts.use(versions, "beta-2", "alpha")
    (workspace.expert("alpha") / MANIFEST).write_text("[]")
    with pytest.raises(ArtifactError, match="The manifest of the expert of 'alpha' cannot be read: run"):
        warm_starts.use(versions, "beta-2", "alpha")
    assert not workspace.starts.exists() and not parents(workspace)


class Killed(BaseException):
    """As sudden as a signal: nothing in moa catches it."""


@pytest.mark.parametrize("at", ["shutil.copyfile", "moa.workspace.data_versions.DataVersions.add",
                                "moa.workspace.warm_starts.write_json"])
def test_a_start_that_was_cut_off_is_none_and_is_made_the_next_time(workspace: Workspace, at: str,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    versions = DataVersions(workspace)

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(at, die)
        with pytest.raises(Killed):
            warm_starts.use(versions, "beta-2", "alpha")
    assert warm_starts.read(workspace) == {} and set(stale(workspace)) == {"evaluate"}
    start = warm_starts.use(versions, "beta-2", "alpha")
    assert warm_starts.read(workspace) == {"beta-2": start}
    assert digests.of_expert(workspace.parent(start.digest)) == start.digest
    assert len(parents(workspace)) == 3


def test_prune_keeps_what_a_start_names(workspace: Workspace) -> None:
    versions = DataVersions(workspace)
    before = warm_starts.read(workspace)
    one = warm_starts.use(versions, "beta-2", "alpha")
    two = warm_starts.use(versions, "2024", "2024")
    assert warm_starts.prune(versions) == []
    both = warm_starts.read(workspace)
    assert warm_starts.forget(versions, ["beta-2"]) == ["beta-2"]
    assert warm_starts.prune(versions) == [f"data/parents/{one.digest[:16]}"]
    assert parents(workspace) == [".gitignore", two.digest[:16], f"{two.digest[:16]}.dvc"]
    assert (workspace.parents / ".gitignore").read_text() == f"/{two.digest[:16]}\n"
    with pytest.raises(ArtifactError, match=rf"The start of beta-2 cannot be put back: data/parents/{one.digest[:16]}"):
        warm_starts.restore(versions, both)
    warm_starts.restore(versions, before)
    (workspace.parents / f"{two.digest[:16]}.dvc").unlink()   # a prune was cut off here
    assert warm_starts.prune(versions) == [f"data/parents/{two.digest[:16]}"] and not workspace.parents.exists()
    assert set(stale(workspace)) == {"evaluate"}


@pytest.mark.parametrize("purge", [False, True])
def test_a_domain_that_goes_takes_its_start_along(workspace: Workspace, settings: Config, purge: bool) -> None:
    versions = DataVersions(workspace)
    other = warm_starts.use(versions, "beta-2", "alpha")
    own = warm_starts.use(versions, "alpha", "alpha")
    assert own.digest == other.digest
    warm_starts.use(versions, "2024", "2024")
    cached = {path for path in (workspace.root / ".dvc" / "cache").rglob("*") if path.is_file()}
    domains.remove(workspace, "2024", purge=purge)
    assert set(warm_starts.read(workspace)) == {"alpha", "beta-2"}
    assert parents(workspace) == [".gitignore", own.digest[:16], f"{own.digest[:16]}.dvc"]
    kept = {path for path in cached if path.exists()}
    assert (kept == cached) != purge
    domains.remove(workspace, "alpha")
    assert warm_starts.read(workspace) == {"beta-2": other}   # beta-2 still begins at alpha's expert
    train.train(workspace, config.load(workspace.params), ["beta-2"])
    assert read_json(workspace.expert("beta-2") / MANIFEST)["parent"] == {"domain": "alpha", "digest": own.digest}


def test_what_ends_a_removal_puts_the_start_back(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = DataVersions(workspace)
    start = warm_starts.use(versions, "2024", "2024")
    with monkeypatch.context() as patch:
        patch.setattr("moa.workspace.domains.write_json",
                      lambda *_: (_ for _ in ()).throw(OSError(28, os.strerror(28), "x")))
        with pytest.raises(ArtifactError, match="nothing was changed"):
            domains.remove(workspace, "2024")
    assert warm_starts.read(workspace) == {"2024": start} and len(parents(workspace)) == 3
    assert set(stale(workspace)) == {"train@2024", "evaluate"}
