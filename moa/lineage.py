"""What a version came from: git commit, dirty flag, `dvc.lock`. Knows nothing of MLflow."""

import subprocess
from pathlib import Path
from typing import Any

from moa import digests
from moa.workspace import Workspace


def of_workspace(workspace: Workspace) -> dict[str, str]:
    """Tags that pin code and data; what does not exist (no git, nothing built by DVC) has none."""
    tags = _git(workspace.root)
    lock = workspace.root / "dvc.lock"
    if lock.is_file():
        tags["moa.dvc.lock"] = digests.of_file(lock)
    return tags


def dvc_outputs(workspace: Workspace) -> dict[str, str]:
    """MD5 by path of every output `dvc.lock` records; directories end in `.dir`, as DVC writes them."""
    from ruamel.yaml import YAML

    lock = workspace.root / "dvc.lock"
    if not lock.is_file():
        return {}
    recorded: dict[str, Any] = YAML(typ="safe").load(lock.read_text(encoding="utf-8")) or {}
    return {out["path"]: out["md5"] for stage in recorded.get("stages", {}).values()
            for out in stage.get("outs", []) if "md5" in out}


def _git(root: Path) -> dict[str, str]:
    commit = _run(root, "rev-parse", "HEAD")
    if commit is None:
        return {}
    # dvc.lock differs after every build and has a digest of its own: it does not make a commit dirty.
    changes = _run(root, "status", "--porcelain", "--", ".", ":(exclude)dvc.lock")
    return {"moa.git.commit": commit, "moa.git.dirty": "false" if changes == "" else "true"}


def _run(root: Path, *words: str) -> str | None:
    """Output of a git command, or None where git is missing or this is no repository."""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
