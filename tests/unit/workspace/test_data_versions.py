"""What a release is made of becomes one commit, and nothing else does."""

import subprocess
from pathlib import Path

import pytest

from moa.core.errors import PipelineError
from moa.core.paths import Workspace
from moa.workspace.data_versions import commit, uncommitted


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=root, check=True,
                          capture_output=True, text=True).stdout.strip()


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "somebody@example.org")
    git(tmp_path, "init", "-q")
    (tmp_path / "params.yaml").write_text("domains: {}\n")
    (tmp_path / "notes.txt").write_text("mine\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return Workspace(tmp_path)


def test_what_is_not_committed_is_named_once_and_from_the_workspace(workspace: Workspace) -> None:
    assert uncommitted(workspace) == []
    (workspace.root / "params.yaml").write_text("domains: {law: {metric: exact}}\n")
    (workspace.root / "notes.txt").write_text("half a thought\n")
    for name in ("law", "tax"):
        workspace.tracked(name).parent.mkdir(parents=True, exist_ok=True)
        workspace.tracked(name).write_text("outs: []\n")
    git(workspace.root, "add", "data/raw/law.dvc")
    assert uncommitted(workspace) == ["params.yaml", "data/raw"]
    commit(workspace)
    assert uncommitted(workspace) == []
    inner = Workspace(workspace.root / "inner")   # a workspace in a folder of a repository
    inner.root.mkdir()
    (inner.root / "params.yaml").write_text("domains: {}\n")
    assert uncommitted(inner) == ["params.yaml"] and uncommitted(Workspace(Path("/"))) == []


def test_only_what_it_is_made_of(workspace: Workspace) -> None:
    (workspace.root / "params.yaml").write_text("domains: {law: {metric: exact}}\n")
    workspace.tracked("law").parent.mkdir(parents=True)
    workspace.tracked("law").write_text("outs: []\n")
    (workspace.root / "notes.txt").write_text("half a thought\n")
    git(workspace.root, "add", "notes.txt")
    made = commit(workspace, "law")
    assert made == git(workspace.root, "rev-parse", "HEAD")
    shown = git(workspace.root, "show", "--format=%s", "--name-only").split()
    assert shown == ["law", "data/raw/law.dvc", "params.yaml"]
    assert git(workspace.root, "diff", "--cached", "--name-only") == "notes.txt"
    assert commit(workspace) is None


def test_git_says_why_not(workspace: Workspace) -> None:
    (workspace.root / "params.yaml").write_text("domains: {law: {metric: exact}}\n")
    hook = workspace.root / ".git" / "hooks" / "pre-commit"
    hook.write_text("#!/bin/sh\necho we are closed >&2\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(PipelineError, match=r"^`git commit` failed: we are closed; mend that, or set adapt.commit"):
        commit(workspace)
