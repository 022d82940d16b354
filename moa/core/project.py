"""A project's id, and its names on servers that several projects share, MLflow's and Prefect's.

The id is `project` in params.yaml: git keeps it, clones share it, and every name on a server begins with `moa-ID`. A
workspace from before there were ids has none there, and keeps the old names, which are the same in all of them. Its
identity is then derived from the first commit, which clones share, too (`owner`).
"""

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from moa.core import digests, git
from moa.core.config import Config
from moa.core.files import write_atomic
from moa.core.paths import Workspace


@dataclass(frozen=True)
class Names:
    """What a project's things are called; `project` None = as before there were ids."""

    project: str | None
    release: str   # release.name

    @classmethod
    def of(cls, config: Config) -> Self:
        """The names for new things. A registry may hold older ones: see `moa.release.ownership`."""
        return cls(config.project, config.release.name)

    @property
    def experiment(self) -> str:
        """Of MLflow."""
        return "moa" if self.project is None else f"moa-{self.project}"

    @property
    def mixture(self) -> str:
        """The registered model whose versions are the releases."""
        return self.release if self.project is None else f"{self.experiment}-{self.release.removeprefix('moa-')}"

    def expert(self, domain: str) -> str:
        """The registered model of one domain's expert."""
        return f"{self.experiment}-expert-{domain}"

    def artifact(self, key: str) -> str:
        """Key of a page that Prefect keeps: lower case, digits, dashes."""
        return f"{self.experiment}-{key}"

    def resource(self, kind: str, name: str) -> str:
        """What an event is about. The old pattern `moa.domain.*` matches no resource of a project with an id."""
        return f"moa.{kind}.{name}" if self.project is None else f"moa.project.{self.project}.{kind}.{name}"


def new_project_id(folder: str) -> str:
    """A new id that begins like a folder's name and that no other project has."""
    words = re.sub(r"[^a-z0-9]+", "-", folder.lower()).strip("-")[:24].strip("-")
    return f"{words or 'project'}-{secrets.token_hex(3)}"


def project_id(workspace: Workspace, config: Config) -> str | None:
    """The id that marks what belongs to this project: its own, else that of its first commit.

    Without commits it is a random one, kept in .moa. None where the first commit cannot be read: in a shallow clone,
    and where git refuses.
    """
    if config.project is not None:
        return config.project
    if (known := _first_commit(workspace) or _kept(workspace)) is not None:
        return known
    return _keep(workspace) if git.has_full_history(workspace.root) else None


def deployment_name(workspace: Workspace, config: Config) -> str:
    """What `moa up` calls what it serves. Deployments keep no history, so an old workspace's have an id, too."""
    return _deployment(project_id(workspace, config))


def former_deployment_names(workspace: Workspace, config: Config) -> set[str]:
    """What `deployment` was before params.yaml named an id, or before the first commit, or before there were ids."""
    known = {_deployment(None), *map(_deployment, all_project_ids(workspace, config))}
    return known - {deployment_name(workspace, config)}


def all_project_ids(workspace: Workspace, config: Config) -> set[str]:
    """Every id that this project has or had: from before params.yaml named one, and before the first commit."""
    return {each for each in (config.project, _kept(workspace), _first_commit(workspace)) if each is not None}


def _deployment(project: str | None) -> str:
    return "moa" if project is None else f"moa-{project}"


def _first_commit(workspace: Workspace) -> str | None:
    """From the repository's first commit and the folder in it, which are the same in every whole clone."""
    if not git.has_full_history(workspace.root) or not git.has_commits(workspace.root):
        return None
    commit = git.run(workspace.root, "rev-list", "--max-parents=0", "--first-parent", "HEAD").strip()
    folder = git.run(workspace.root, "rev-parse", "--show-prefix").strip()
    return f"git-{digests.of_bytes(f'{commit} {folder}'.encode())[:12]}"


def _kept(workspace: Workspace) -> str | None:
    try:
        return _path(workspace).read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None


def _keep(workspace: Workspace) -> str:
    from filelock import FileLock

    path = _path(workspace)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):   # two processes that need it first must agree
        if (kept := _kept(workspace)) is None:
            kept = new_project_id(workspace.root.name)
            write_atomic(path, f"{kept}\n".encode())
        return kept


def _path(workspace: Workspace) -> Path:
    return workspace.local / "project"
