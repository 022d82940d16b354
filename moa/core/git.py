"""git as a subprocess, in the repository of a given folder, with errors that carry git's own reason.

A folder without a repository is no error; a repository that git refuses to read raises GitError.
"""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from moa.core.errors import PipelineError
from moa.core.names import escaped


class GitError(PipelineError):
    """git could not be run, or refused; the message gives git's reason and what to do, in one sentence or two."""


def run(root: Path, *words: str) -> str:
    """Run `git WORDS` in the repository at `root` or above it and return its output. Raises GitError where it fails."""
    done = _run(root, *words)
    if done.returncode:
        raise GitError(_refusal(root, words[0], done.stderr or done.stdout))
    return done.stdout


def repository(root: Path) -> Path | None:
    """The top folder of the git repository that `root` belongs to; None where there is none.

    Raises GitError where git refuses to read the repository (another user owns it, or it is damaged) or is missing.
    """
    if (top := _find_repository(root)) is None:
        return None
    run(root, "rev-parse", "--git-dir")
    return top


def is_shallow(root: Path) -> bool:
    """Whether the repository of `root` is a shallow clone, whose history is cut off. Raises GitError if git fails."""
    return run(root, "rev-parse", "--is-shallow-repository").strip() == "true"


def has_full_history(root: Path) -> bool:
    """Whether the whole git history of `root` can be read.

    True also of a folder without a repository; false in a shallow clone, and where git refuses to read the repository.
    """
    try:
        return repository(root) is None or not is_shallow(root)
    except GitError:
        return False


def has_commits(root: Path) -> bool:
    """Whether `root` is in a repository that has a commit. Raises GitError where git refuses to read it."""
    return repository(root) is not None and bool(run(root, "rev-list", "--all", "--max-count=1"))


def has_commit(root: Path, commit: str) -> bool:
    """Whether the repository of `root` can be read and has this commit."""
    return _run(root, "cat-file", "-e", f"{commit}^{{commit}}").returncode == 0


def environment() -> dict[str, str]:
    """This process's environment without the variables that bind git to one repository, such as GIT_DIR in a hook."""
    if not any(name.startswith("GIT_") for name in os.environ):
        return dict(os.environ)
    return {name: value for name, value in os.environ.items() if name not in _repository_variables()}


def forget_ties() -> None:
    """Remove the variables that `environment` leaves out from this process: its libraries and children may use git."""
    for name in os.environ.keys() - environment().keys():
        del os.environ[name]


@cache
def _repository_variables() -> frozenset[str]:
    """The variables that git itself lists as local to a repository; empty where git is missing."""
    if shutil.which("git") is None:
        return frozenset()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "rev-parse", "--local-env-vars"]
    return frozenset(subprocess.run(command, env=clean, capture_output=True, text=True, check=False).stdout.split())


def _run(root: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(["git", *words], cwd=root, env=environment(), capture_output=True, text=True,
                              errors="replace", stdin=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        raise GitError("git is not installed, and a workspace's history is kept in it: install git first.") from None


def _refusal(root: Path, subcommand: str, output: str) -> str:
    """Why git failed, and what to do. A second run of git, not its wording, tells whether the owner is the reason."""
    lines = [escaped(line.strip().rstrip(".")) for line in output.splitlines() if line.strip()] or ["it said nothing"]
    top = _find_repository(root)
    if top and _run(root, "rev-parse", "--git-dir").returncode and not _run(
            root, "-c", "safe.directory=*", "rev-parse", "--git-dir").returncode:
        return (f"git refuses to read {top}, which another user owns ({lines[0]}): if you trust what is in it, run "
                f"`git config --global --add safe.directory '{top}'` and the command again.")
    return f"`git {subcommand}` failed: {lines[-1]}."


def _find_repository(root: Path) -> Path | None:
    """The nearest folder at or above `root`, on its file system, that has a repository of any owner; None without."""
    root = root.resolve()
    for folder in (root, *root.parents):
        try:
            if folder.stat().st_dev != root.stat().st_dev:
                return None
            git_dir = folder / ".git"   # a file in a worktree or submodule
            if git_dir.is_file() or (git_dir / "HEAD").exists():
                return folder
        except OSError:
            return folder   # the folder cannot be read: git reports the reason
    return None
