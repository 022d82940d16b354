"""Writes the inputs of stages that are not files to .moa/, where DVC reads them: code digests, initial experts, and the
calibration that is extended.

dvc.yaml names the keys of these files as parameters of its stages, so a changed value makes only its own stages stale.
"""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from moa.core import code_version
from moa.core.config import load
from moa.core.errors import ConfigError
from moa.core.files import write_json_if_changed
from moa.core.paths import Workspace
from moa.experts.warm_start import InitialExpert, read
from moa.mixture import incumbent


def write_stage_inputs(workspace: Workspace) -> None:
    """Bring these files up to date. Call this before DVC reads the pipeline."""
    code_version.write(workspace)
    write_initial_experts(workspace)
    with suppress(ConfigError):   # a params.yaml that cannot be read is reported later
        incumbent.write_extended(workspace, load(workspace.params))


def write_initial_experts(workspace: Workspace, domains: Iterable[str] | None = None) -> None:
    """Bring .moa/starts.json up to date: the expert at which each domain's training begins, null = a new one.

    `domains` defaults to those of params.yaml. Where params.yaml cannot be read, nothing is written: DVC will report
    the error.
    """
    names = _domains(workspace) if domains is None else list(domains)
    if names is None:
        return
    starts = read(workspace)
    write_json_if_changed(workspace.projection, {name: entry(workspace, starts[name]) if name in starts else None
                                                 for name in names})


def entry(workspace: Workspace, start: InitialExpert) -> dict[str, str]:
    """An initial expert as JSON: its domain, its digest, and the folder of its files relative to the workspace."""
    return {"domain": start.domain, "digest": start.digest, "path": workspace.relative(workspace.parent(start.digest))}


def _domains(workspace: Workspace) -> list[str] | None:
    """The keys under `domains` in params.yaml, unvalidated: DVC makes stages of them before moa validates the file."""
    from ruamel.yaml import YAML, YAMLError

    try:
        content: Any = YAML(typ="safe").load(workspace.params)
        return [str(name) for name in content.get("domains") or ()]
    except (OSError, YAMLError, ValueError, TypeError, AttributeError):
        return None
