"""Inputs of stages that are no files of their own, written to .moa/ for DVC: code digests, and where training begins.

dvc.yaml names the keys of these files as parameters of its stages, so a changed value makes just its stages stale.
"""

from collections.abc import Iterable
from typing import Any

from moa.core import code_version
from moa.core.files import write_json_if_changed
from moa.core.paths import Workspace
from moa.experts.warm_start import InitialExpert, read


def write_stage_inputs(workspace: Workspace) -> None:
    """Bring both files up to date. DVC must be asked after this, never before."""
    code_version.write(workspace)
    write_initial_experts(workspace)


def write_initial_experts(workspace: Workspace, domains: Iterable[str] | None = None) -> None:
    """Bring .moa/starts.json up to date, where DVC looks: a key for each domain, null = afresh.

    `domains` are those of params.yaml. Where that cannot be read nothing is written: DVC, too, needs it before.
    """
    names = _domains(workspace) if domains is None else list(domains)
    if names is None:
        return
    starts = read(workspace)
    write_json_if_changed(workspace.projection, {name: entry(workspace, starts[name]) if name in starts else None
                                                 for name in names})


def entry(workspace: Workspace, start: InitialExpert) -> dict[str, str]:
    return {"domain": start.domain, "digest": start.digest, "path": workspace.relative(workspace.parent(start.digest))}


def _domains(workspace: Workspace) -> list[str] | None:
    """Keys under `domains`, whatever else params.yaml says: DVC makes a training of each before moa checks the file."""
    from ruamel.yaml import YAML, YAMLError

    try:
        content: Any = YAML(typ="safe").load(workspace.params)
        return [str(name) for name in content.get("domains") or ()]
    except (OSError, YAMLError, ValueError, TypeError, AttributeError):
        return None
