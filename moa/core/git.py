"""git as a subprocess, in the repository of a given folder, with errors that carry git's own reason.

A missing repository is a result; a repository that git refuses to read is a GitError.
"""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from moa.core.errors import PipelineError
from moa.core.names import escaped


class GitError(PipelineError):
    """git could not be run, or refused; the message is its reason and what to do, in one sentence or two."""


def run(root: Path, *words: str) -> str:
    """What git prints in the repository at `root` or above it. Raises GitError where its exit code is not 0."""
    done = _run(root, *words)
    if done.returncode:
        raise GitError(_refusal(root, words[0], done.stderr or done.stdout))
    return done.stdout


def repository(root: Path) -> Path | None:
    """The folder of the repository that `root` belongs to; None where there is none.

    Raises GitError when there is one and git refuses to read it: it is another user's, damaged, or git is missing.
    """
    if (found := _above(root)) is None:
        return None
    run(root, "rev-parse", "--git-dir")
    return found


def is_shallow(root: Path) -> bool:
    """Whether the repository's history was cut off when it was cloned. Raises GitError."""
    return run(root, "rev-parse", "--is-shallow-repository").strip() == "true"


def has_full_history(root: Path) -> bool:
    """Whether all history there is can be read: so of a folder without a repository, not of a shallow clone, nor where
    git refuses."""
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
    return {name: value for name, value in os.environ.items() if name not in _ties()}


def forget_ties() -> None:
    """Remove these variables from this process, for libraries that use git in it and for its children."""
    kept = environment()
    for name in os.environ.keys() - kept.keys():
        del os.environ[name]


@cache
def _ties() -> frozenset[str]:
    """The variables that git itself calls local to a repository."""
    if shutil.which("git") is None:
        return frozenset()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    words = ["git", "rev-parse", "--local-env-vars"]
    return frozenset(subprocess.run(words, env=clean, capture_output=True, text=True, check=False).stdout.split())


def _run(root: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(["git", *words], cwd=root, env=environment(), capture_output=True, text=True,
                              errors="replace", stdin=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        raise GitError("git is not installed, and a workspace's history is kept in it: install git first.") from None


def _refusal(root: Path, what: str, said: str) -> str:
    """git's reason, and what to do. Whether the owner is the reason is asked of git, not read out of its words."""
    lines = [escaped(line.strip().rstrip(".")) for line in said.splitlines() if line.strip()] or ["it said nothing"]
    found = _above(root)
    if found and _run(root, "rev-parse", "--git-dir").returncode and not _run(
            root, "-c", "safe.directory=*", "rev-parse", "--git-dir").returncode:
        return (f"git refuses to read {found}, which another user owns ({lines[0]}): if you trust what is in it, run "
                f"`git config --global --add safe.directory '{found}'` and the command again.")
    return f"`git {what}` failed: {lines[-1]}."


def _above(root: Path) -> Path | None:
    """The nearest folder upwards, on one file system, that has a repository; its owner does not matter."""
    root = root.resolve()
    for folder in (root, *root.parents):
        try:
            if folder.stat().st_dev != root.stat().st_dev:
                return None
            place = folder / ".git"
            if place.is_file() or (place / "HEAD").exists():
                return folder
        except OSError:
            return folder   # it cannot be looked into: git will say why
    return None
