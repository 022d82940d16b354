"""Decides whether a registered model on a shared MLflow server belongs to this project, and claims it with a tag.

The tag `moa.project` holds the project's id. Older releases have no tag: their git commits and digests tell which
project made them. The workspace's own database belongs to it alone. Part of `moa.release.registry`.
"""

from typing import TYPE_CHECKING, Any, NoReturn

from moa.core import git, project
from moa.core.errors import RegistryError
from moa.core.files import read_json
from moa.core.paths import MANIFEST
from moa.core.project import Names
from moa.release import mlflow_client

if TYPE_CHECKING:
    from moa.release.registry import Registry

TAG = "moa.project"


def resolve(registry: "Registry") -> tuple[Names, bool]:
    """The names of this project's models on the server, and whether its mixture is registered there.

    A project with releases under the old names keeps the old names. Raises RegistryError when the mixture belongs to
    another project.
    """
    wanted = Names.of(registry.config)
    if own(registry, wanted.mixture) is not None:
        return wanted, True
    if wanted.project is not None:
        before = Names(None, wanted.release)
        model = _find(registry.client, before.mixture)
        if model is not None and (registry.private or _ours(registry, model)):
            return before, True
    return wanted, False


def own(registry: "Registry", name: str) -> Any:
    """MLflow's registered model `name`; None where there is none. Raises RegistryError when it is another project's."""
    with mlflow_client.mlflow_errors(registry.address):
        model = _find(registry.client, name)
        if model is not None and not registry.private and _ours(registry, model) is False:
            _refuse(registry, model)
    return model


def claim(registry: "Registry", name: str) -> None:
    """Tag the registered model `name` with this project, unless it has a project. The caller holds the registry's lock.

    Raises RegistryError when it is another project's.
    """
    model = own(registry, name)
    if model is not None and TAG not in model.tags:
        for key, value in tags(registry).items():
            registry.client.set_registered_model_tag(name, key, value)


def tags(registry: "Registry") -> dict[str, str]:
    """The tags that a new registered model of this project gets; empty for a project without an id."""
    owner = project.project_id(registry.workspace, registry.config)
    return {} if owner is None else {TAG: owner}


def _find(client: Any, name: str) -> Any:
    """MLflow's registered model `name`, or None."""
    try:
        return client.get_registered_model(name)
    except Exception as error:
        if mlflow_client.missing(error):
            return None
        raise


def _ours(registry: "Registry", model: Any) -> bool | None:
    """Whether the registered model belongs to this project; None where neither tag, commits nor digests tell."""
    workspace = registry.workspace
    if (tag := model.tags.get(TAG)) is not None:
        return tag in project.all_project_ids(workspace, registry.config)
    versions = registry.client.search_model_versions(f"name='{model.name}'", max_results=10_000)
    commits = [version.tags.get("moa.git.commit") for version in versions]
    if any(commit and git.has_commit(workspace.root, commit) for commit in commits):
        return True
    if commits and all(commits) and git.has_full_history(workspace.root) and git.has_commits(workspace.root):
        return False
    if {version.tags.get("moa.digest") for version in versions} & _local_digests(registry):
        return True
    return None


def _local_digests(registry: "Registry") -> set[str]:
    """Digests of the mixture and the experts that this workspace holds."""
    workspace = registry.workspace
    folders = [workspace.mixture, *(workspace.expert(domain) for domain in registry.config.domains)]
    return {read_json(folder / MANIFEST)["digest"] for folder in folders if (folder / MANIFEST).is_file()}


def _refuse(registry: "Registry", model: Any) -> NoReturn:
    """Raise RegistryError saying how to give the project names of its own, or to share the model's project id."""
    config, tag = registry.config, model.tags.get(TAG)
    new = project.new_project_id(registry.workspace.root.name)
    change = (f"write `project: {new}` into params.yaml, so that this one's names are its own" if config.project is None
              else f"give this one names of its own in params.yaml, with `project: {new}` or another release.name")
    same = (f"if both are one project, write `project: {tag}` there instead" if tag else
            f"if both are one project, write `project: {new}` there and give the model the tag {TAG}={new}")
    raise RegistryError(f"{model.name} at {mlflow_client.shown(registry.address)} is another project's"
                        f"{f' ({tag})' if tag else ''}: {change}; {same}.")
