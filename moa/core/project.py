"""A project's id, and its names on the MLflow and Prefect servers, which several projects may share.

The id is `project` in params.yaml: git keeps it, clones share it, and every name on a server begins with `moa-ID`. A
workspace that is older than project ids has no such key. It keeps its old names, which all such workspaces share, and
its id is derived from the first commit, which its clones share (`project_id`).
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
    """Names of a project's experiment, models, artifacts and events on the servers."""

    project: str | None   # None = an old workspace without an id in params.yaml
    release: str          # `release.name` of params.yaml

    @classmethod
    def of(cls, config: Config) -> Self:
        """The names that new objects get. A registry may hold objects with older ones: see `moa.release.ownership`."""
        return cls(config.project, config.release.name)

    @property
    def experiment(self) -> str:
        """The MLflow experiment, whose name begins all other names."""
        return "moa" if self.project is None else f"moa-{self.project}"

    @property
    def mixture(self) -> str:
        """The registered model whose versions are the releases."""
        return self.release if self.project is None else f"{self.experiment}-{self.release.removeprefix('moa-')}"

    def expert(self, domain: str) -> str:
        """The registered model of one domain's expert."""
        return f"{self.experiment}-expert-{domain}"

    def artifact(self, key: str) -> str:
        """Key of a Prefect artifact: lower case, digits, dashes."""
        return f"{self.experiment}-{key}"

    def resource(self, kind: str, name: str) -> str:
        """Id of a Prefect event's resource. The old pattern `moa.domain.*` matches none of a project with an id."""
        return f"moa.{kind}.{name}" if self.project is None else f"moa.project.{self.project}.{kind}.{name}"


def new_project_id(folder: str) -> str:
    """A new random id that begins like the name of folder `folder`."""
    words = re.sub(r"[^a-z0-9]+", "-", folder.lower()).strip("-")[:24].strip("-")
    return f"{words or 'project'}-{secrets.token_hex(3)}"


def project_id(workspace: Workspace, config: Config) -> str | None:
    """The id that marks the objects of this project: `project` of params.yaml, else one derived from the first commit.

    Without commits it is a random id, stored in .moa. None where the first commit cannot be read: in a shallow clone,
    and where git refuses to read the repository.
    """
    if config.project is not None:
        return config.project
    if (known := _first_commit_id(workspace) or _stored_id(workspace)) is not None:
        return known
    return _store_new_id(workspace) if git.has_full_history(workspace.root) else None


def deployment_name(workspace: Workspace, config: Config) -> str:
    """Name of the Prefect deployments of `moa up`. They keep no history, so an old workspace's also contain an id."""
    return _deployment(project_id(workspace, config))


def former_deployment_names(workspace: Workspace, config: Config) -> set[str]:
    """Deployment names from before params.yaml named an id, before the first commit, or before there were ids."""
    known = {_deployment(None), *map(_deployment, all_project_ids(workspace, config))}
    return known - {deployment_name(workspace, config)}


def all_project_ids(workspace: Workspace, config: Config) -> set[str]:
    """Every id that this project has or had: in params.yaml, stored in .moa, and derived from the first commit."""
    ids = (config.project, _stored_id(workspace), _first_commit_id(workspace))
    return {project for project in ids if project is not None}


def _deployment(project: str | None) -> str:
    return "moa" if project is None else f"moa-{project}"


def _first_commit_id(workspace: Workspace) -> str | None:
    """An id from the first commit and the workspace's folder in the repository, which all full clones share."""
    if not git.has_full_history(workspace.root) or not git.has_commits(workspace.root):
        return None
    commit = git.run(workspace.root, "rev-list", "--max-parents=0", "--first-parent", "HEAD").strip()
    folder = git.run(workspace.root, "rev-parse", "--show-prefix").strip()
    return f"git-{digests.of_bytes(f'{commit} {folder}'.encode())[:12]}"


def _stored_id(workspace: Workspace) -> str | None:
    try:
        return _path(workspace).read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None


def _store_new_id(workspace: Workspace) -> str:
    from filelock import FileLock

    path = _path(workspace)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):   # two processes that need an id at the same time must get the same one
        if (stored := _stored_id(workspace)) is None:
            stored = new_project_id(workspace.root.name)
            write_atomic(path, f"{stored}\n".encode())
        return stored


def _path(workspace: Workspace) -> Path:
    return workspace.local / "project"
