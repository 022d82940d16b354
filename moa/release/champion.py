"""A release at work: ask the champion."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from moa.base.load import load, pick_device
from moa.core.config import Config
from moa.core.config import load as load_config
from moa.core.errors import NothingReleased, UsageError
from moa.core.paths import Workspace


def open_mixture(directory: Path, workspace: Workspace | None = None) -> Any:
    """The mixture in `directory` on the base of `workspace` (default: the one around the current folder)."""
    from moa.mixture.mixture import Mixture

    workspace = workspace or Workspace.find()
    config = load_config(workspace.params)
    base = load(workspace, config.base, pick_device(config.execution.devices))
    return Mixture.load(directory, base, config.execution.resident)


def champion(workspace: Workspace, config: Config) -> tuple[Any, Path]:
    """The champion's version and the folder of its content. Raises NothingReleased when there is none."""
    from moa.release.registry import Registry

    registry = Registry(workspace, config)
    version = _required(registry)
    return version, registry.download(version.version)


def other_version(workspace: Workspace, config: Config, version: int, against: int | None) -> int:
    """The release that `version` is compared with: `against`, or the champion.

    Raises NothingReleased when there is no champion, and UsageError when `version` would be compared with itself.
    """
    from moa.release.registry import Registry

    other = _required(Registry(workspace, config)).version if against is None else against
    if other == version:
        raise UsageError(f"Version {version} {'is the champion and ' if against is None else ''}cannot be compared "
                         "with itself: name another release with --against.")
    return other


def _required(registry: Any) -> Any:
    """The champion of a registry. Raises NothingReleased when there is none."""
    version = registry.champion()
    if version is None:
        raise NothingReleased("Nothing has been released yet, so there is no champion: run `moa run` first.")
    return version


def compare_versions(workspace: Workspace, config: Config, incumbent: int, challenger: int) -> dict[str, Any]:
    """Two releases on the same test rows: `moa.evaluation.comparison.compare` of what the registry holds of them."""
    from moa.evaluation.comparison import compare
    from moa.release.registry import Registry

    registry = Registry(workspace, config)
    compared = compare(workspace, config, registry.download(incumbent), registry.download(challenger))
    return {"incumbent": incumbent, "challenger": challenger, **compared}


def ask(workspace: Workspace, config: Config, question: str, *, domain: str | None = None, trace: bool = False,
        **options: Any) -> dict[str, Any]:
    """The champion's answer; `domain` overrules the router. `options` are those of `moa.mixture.generation.engine`.

    With `trace`, also what every level's head says of the question (`trace`) and what the rule makes of it
    (`decision`), also where `domain` overrules it.
    """
    version, folder = champion(workspace, config)
    mixture = open_mixture(folder, workspace)
    messages = [{"role": "user", "content": question}]
    reply = {**asdict(mixture.chat(messages, domain=domain, **options)), "release": version.version}
    return reply | routing_trace(mixture, messages) if trace else reply


def routing_trace(mixture: Any, messages: list[dict[str, str]]) -> dict[str, Any]:
    """The router at work on one conversation; `levels` are those that its rule reads."""
    choices, (decision,) = mixture.trace(messages), mixture.route([messages])
    router = mixture.router
    levels = [choice.level for choice in choices] if router.rule == "vote" else [router.reads]
    return {"trace": [asdict(choice) for choice in choices],
            "decision": {**asdict(decision), "threshold": router.threshold, "rule": router.rule, "levels": levels}}
