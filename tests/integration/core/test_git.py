"""git that refuses, that was told of another repository, or that does not know everything: real git, real DVC."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moa.core import git
from moa.core.errors import PipelineError
from moa.core.paths import Workspace
from moa.core.subprocesses import environment
from moa.release import lineage
from moa.workspace.data_versions import commit
from moa.workspace.domains import add
from moa.workspace.init import init

COMMITTER = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER")
             for what, value in (("NAME", "somebody"), ("EMAIL", "somebody@example.org"))}


def jsonl(number: int) -> str:
    return json.dumps({"instruction": f"Ask {number}?", "output": f"Say {number}."}) + "\n"


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the settings that a test makes: this machine's might trust every folder."""
    (tmp_path / "gitconfig").touch()
    for name, value in {**COMMITTER, "GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig"),
                        "GIT_CONFIG_SYSTEM": os.devnull}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    for number in range(6):
        (tmp_path / f"{number}.jsonl").write_text(jsonl(number))
    return tmp_path


@pytest.fixture
def workspace(desk: Path) -> Workspace:
    """With the domain law: its first row is in a commit, its second in none."""
    init(desk / "w", f"path:{desk / 'base'}", desk)
    workspace = Workspace(desk / "w")
    add(workspace, "law", ["0.jsonl"], desk, {})
    committed(workspace, "first")
    replaced(workspace, 1)
    return workspace


def call(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def committed(workspace: Workspace, message: str, *words: str) -> None:
    call(workspace.root, "add", "-A")
    call(workspace.root, "commit", "-qm", message, *words)


def replaced(workspace: Workspace, number: int) -> None:
    """The rows of law are another one."""
    for file in workspace.raw("law").iterdir():
        file.unlink()
    add(workspace, "law", [f"{number}.jsonl"], workspace.root.parent, {})


def moa(workspace: Workspace, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "moa", *words], cwd=workspace.root, capture_output=True, text=True,
                          env={**os.environ, **more}, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def rows(workspace: Workspace) -> set[str]:
    """The rows that lie in DVC's cache."""
    cache = workspace.root / ".dvc" / "cache" / "files"
    texts = (path.read_text() for path in cache.rglob("*") if path.is_file() and path.suffix != ".dir")
    return {text for text in texts if text.startswith('{"instruction"')}


def files(workspace: Workspace) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in workspace.root.rglob("*")
            if path.is_file() and ".moa" not in path.parts and ".dvc/tmp" not in str(path)}


def anothers(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on git takes the repository for another user's; as root it really is."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    if os.geteuid() == 0:
        for path in (workspace.root, *workspace.root.rglob("*")):
            os.chown(path, 12345, 12345, follow_symlinks=False)


# git refuses.

def test_a_purge_where_git_refuses_changes_nothing(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows(workspace) == {jsonl(0), jsonl(1)}
    anothers(workspace, monkeypatch)
    before = files(workspace)
    done = moa(workspace, "domain", "remove", "law", "--purge", "--yes")
    advice = f"git config --global --add safe.directory '{workspace.root}'"
    assert done.returncode == 1 and done.stderr.startswith(f"moa: git refuses to read {workspace.root}, which another")
    assert "dubious ownership" in done.stderr and f"run `{advice}`" in done.stderr and done.stderr.count("\n") == 1
    assert files(workspace) == before
    subprocess.run(advice, shell=True, check=True)
    done = moa(workspace, "domain", "remove", "law", "--purge", "--yes")
    assert done.returncode == 0 and rows(workspace) == set(), done.stderr


def test_without_a_purge_it_goes_on_and_a_later_one_finds_all(workspace: Workspace, monkeypatch: pytest.MonkeyPatch
                                                              ) -> None:
    anothers(workspace, monkeypatch)
    assert moa(workspace, "domain", "remove", "law", "--yes").returncode == 0
    call(workspace.root, "config", "--global", "--add", "safe.directory", str(workspace.root))
    assert moa(workspace, "domain", "remove", "law", "--purge", "--yes").returncode == 0
    assert rows(workspace) == set()


def test_a_damaged_repository_is_not_another_users(workspace: Workspace) -> None:
    shutil.rmtree(workspace.root / ".git" / "objects")
    done = moa(workspace, "domain", "remove", "law", "--purge", "--yes")
    assert done.returncode == 1 and "failed: " in done.stderr and "safe.directory" not in done.stderr
    assert rows(workspace) == {jsonl(0), jsonl(1)}


def test_no_repository_is_no_refusal(workspace: Workspace) -> None:
    shutil.rmtree(workspace.root / ".git")
    (workspace.root / ".dvc" / "config").write_text("[core]\n    no_scm = true\n")
    done = moa(workspace, "domain", "remove", "law", "--purge", "--yes")
    assert done.returncode == 0 and rows(workspace) == {jsonl(0)}, done.stderr   # no commit says that it was law's
    assert git.repository(workspace.root) is None and lineage.of_workspace(workspace).keys() <= {"moa.dvc.lock"}


def test_who_else_asks_git(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(lineage.of_workspace(workspace)["moa.git.commit"]) == 40
    anothers(workspace, monkeypatch)
    tags = lineage.of_workspace(workspace)
    assert "moa.git.commit" not in tags and "dubious ownership" in tags["moa.git.refused"]
    with pytest.raises(PipelineError, match=r"^git refuses to read .*; mend that, or set adapt.commit: false\.$"):
        commit(workspace)
    (workspace.root / "inner").mkdir()
    done = moa(workspace, "init", "inner")
    assert done.returncode == 1 and done.stderr.startswith("moa: git refuses to read"), done.stderr
    assert list((workspace.root / "inner").iterdir()) == []


# git knows more than the files of now, or less.

def test_a_purge_finds_every_version_that_git_knows(workspace: Workspace) -> None:
    """On a branch that came to nothing, in a merge, amended away, and where git shows no differences of such files."""
    root = workspace.root
    (root / ".gitattributes").write_text("*.dvc -diff\n")
    committed(workspace, "second")
    call(root, "switch", "-qc", "side")
    replaced(workspace, 2)
    committed(workspace, "amended away")
    replaced(workspace, 3)
    committed(workspace, "side")
    call(root, "revert", "--no-edit", "HEAD")
    call(root, "commit", "-q", "--amend", "-m", "undone")
    call(root, "switch", "-q", "-")
    (root / "other.txt").write_text("x")
    committed(workspace, "main goes on")
    call(root, "merge", "-q", "--no-commit", "--no-ff", "side")
    replaced(workspace, 4)
    committed(workspace, "merged, and something else")
    call(root, "branch", "-qD", "side")
    replaced(workspace, 5)
    assert rows(workspace) == {jsonl(number) for number in range(6)}
    done = moa(workspace, "domain", "remove", "law", "--purge", "--yes", "--json")
    assert done.returncode == 0 and rows(workspace) == set(), done.stderr
    assert json.loads(done.stdout)["purged"]["shallow"] is False


def test_a_shallow_clone_says_what_it_cannot_know(workspace: Workspace, desk: Path) -> None:
    committed(workspace, "second")
    call(desk, "clone", "-q", "--depth", "1", f"file://{workspace.root}", "clone")
    shutil.copytree(workspace.root / ".dvc" / "cache", desk / "clone" / ".dvc" / "cache")
    shutil.copytree(workspace.raw("law"), desk / "clone" / "data" / "raw" / "law")
    cloned = Workspace(desk / "clone")
    done = moa(cloned, "domain", "remove", "law", "--purge", "--yes")
    assert done.returncode == 0 and rows(cloned) == {jsonl(0)}, done.stderr
    assert "This clone of the repository is shallow" in done.stdout and "git fetch --unshallow" in done.stdout
    call(cloned.root, "fetch", "-q", "--unshallow")
    assert "shallow" not in moa(cloned, "domain", "remove", "law", "--purge", "--yes").stdout
    assert rows(cloned) == set()


# git was told of another repository: by a hook of git, or by hand.

@pytest.fixture
def other(tmp_path: Path) -> Path:
    root = tmp_path / "other"
    root.mkdir()
    call(root, "init", "-q")
    (root / "params.yaml").write_text("theirs\n")
    call(root, "add", ".")
    call(root, "commit", "-qm", "theirs")
    return root


def ties(other: Path) -> dict[str, str]:
    return {"GIT_DIR": str(other / ".git"), "GIT_WORK_TREE": str(other),
            "GIT_INDEX_FILE": str(other / ".git" / "index"),
            "GIT_OBJECT_DIRECTORY": str(other / ".git" / "objects"), "GIT_PREFIX": "elsewhere/"}


def test_a_commit_goes_to_the_workspaces_repository(workspace: Workspace, other: Path, monkeypatch: pytest.MonkeyPatch
                                                    ) -> None:
    theirs, index = call(other, "rev-parse", "HEAD"), (other / ".git" / "index").read_bytes()
    before = call(workspace.root, "rev-parse", "HEAD")
    for name, value in ties(other).items():
        monkeypatch.setenv(name, value)
    made = commit(workspace)
    assert lineage.of_workspace(workspace)["moa.git.commit"] == made
    for name in ties(other):
        monkeypatch.delenv(name)
    assert made == call(workspace.root, "rev-parse", "HEAD") != before
    assert call(other, "rev-parse", "HEAD") == theirs and (other / ".git" / "index").read_bytes() == index
    assert call(other, "status", "--porcelain") == ""


def test_every_command_works_in_the_workspaces_repository(workspace: Workspace, other: Path, desk: Path) -> None:
    objects = sorted((other / ".git").rglob("*"))
    done = moa(workspace, "domain", "add", "tax", str(desk / "2.jsonl"), **ties(other))
    assert done.returncode == 0, done.stderr
    done = moa(workspace, "domain", "remove", "law", "--purge", "--yes", **ties(other))
    assert done.returncode == 0 and rows(workspace) == {jsonl(2)}, done.stderr
    done = moa(workspace, "init", str(desk / "new"), "--base", f"path:{desk / 'base'}", **ties(other))
    assert done.returncode == 0 and (desk / "new" / ".git" / "HEAD").exists(), done.stderr
    assert sorted((other / ".git").rglob("*")) == objects and (other / "params.yaml").read_text() == "theirs\n"


def test_what_a_child_is_told(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that git calls local to a repository is left out, and nothing else of git's."""
    local = subprocess.run(["git", "rev-parse", "--local-env-vars"], check=True, capture_output=True, text=True).stdout
    for name in local.split():
        monkeypatch.setenv(name, "x")
    for known in (git.environment(), environment()):
        assert not known.keys() & set(local.split()) and known["GIT_AUTHOR_NAME"] == "somebody"
    git.forget_ties()
    assert not os.environ.keys() & set(local.split()) and os.environ["GIT_AUTHOR_NAME"] == "somebody"
