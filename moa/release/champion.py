"""Loads released mixtures: opens the champion, asks it a question, and compares releases on the same test rows."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from moa.base.device import pick_device
from moa.base.load import load
from moa.core.config import Config
from moa.core.config import load as load_config
from moa.core.errors import NothingReleased, UsageError
from moa.core.paths import Workspace
from moa.core.text import NOTHING_RELEASED


def open_mixture(directory: Path, workspace: Workspace | None = None) -> Any:
    """Load the mixture in `directory` on the base of `workspace` (default: the workspace around the current folder).

    The result is a `moa.mixture.mixture.Mixture` on the device that params.yaml names.
    """
    from moa.mixture.mixture import Mixture

    workspace = workspace or Workspace.find()
    config = load_config(workspace.params)
    base = load(workspace, config.base, pick_device(config.execution.devices))
    return Mixture.load(directory, base, config.execution.resident)


def champion(workspace: Workspace, config: Config) -> tuple[Any, Path]:
    """The champion's `MixtureVersion` and the folder that its mixture was downloaded to, for `open_mixture`.

    Raises NothingReleased when there is no champion, and ArtifactError when its files were altered.
    """
    from moa.release.registry import Registry

    registry = Registry(workspace, config)
    version = _require_champion(registry)
    return version, registry.download(version.version)


def other_version(workspace: Workspace, config: Config, version: int, against: int | None) -> int:
    """The number of the release that `version` is compared with: `against`, or the champion.

    Raises NothingReleased when there is no champion, and UsageError when `version` would be compared with itself.
    """
    from moa.release.registry import Registry

    other = _require_champion(Registry(workspace, config)).version if against is None else against
    if other == version:
        raise UsageError(f"Version {version} {'is the champion and ' if against is None else ''}cannot be compared "
                         "with itself: name another release with --against.")
    return other


def _require_champion(registry: Any) -> Any:
    """The champion of a registry. Raises NothingReleased when there is none."""
    version = registry.champion() if registry.exists() else None   # asking would make a database
    if version is None:
        raise NothingReleased(NOTHING_RELEASED)
    return version


def compare_versions(workspace: Workspace, config: Config, incumbent: int, challenger: int) -> dict[str, Any]:
    """Score two releases on the same test rows, with the mixtures as the registry holds them.

    Returns what `moa.evaluation.comparison.compare` returns, with the version numbers `incumbent` and `challenger`.
    """
    from moa.evaluation.comparison import compare
    from moa.release.registry import Registry

    registry = Registry(workspace, config)
    compared = compare(workspace, config, registry.download(incumbent), registry.download(challenger))
    return {"incumbent": incumbent, "challenger": challenger, **compared}


def ask(workspace: Workspace, config: Config, question: str, *, domain: str | None = None, trace: bool = False,
        **options: Any) -> dict[str, Any]:
    """Answer `question` with the champion.

    Args:
        domain: the expert that answers, or "base"; None = the router decides.
        trace: adds the keys of `routing_trace`, even where `domain` overrules the router.
        options: fields of `moa.mixture.generation.engine.GenerationConfig`, such as `max_new_tokens`.

    Returns:
        The fields of `moa.mixture.mixture.Answer`; `answered_by`, the expert's name or "base"; and `release`, the
        champion's version number.
    """
    version, folder = champion(workspace, config)
    mixture = open_mixture(folder, workspace)
    messages = [{"role": "user", "content": question}]
    answer = mixture.chat(messages, domain=domain, **options)
    reply = {**asdict(answer), "answered_by": "base" if answer.abstained else answer.domain, "release": version.version}
    return reply | routing_trace(mixture, messages) if trace else reply


def routing_trace(mixture: Any, messages: list[dict[str, str]]) -> dict[str, Any]:
    """How the router decides on one conversation.

    Returns:
        `trace`: the choice of every level's head; `decision`: the fields of `moa.mixture.router.Decision`, the router's
        rule and the `levels` that it reads.
    """
    choices, (decision,) = mixture.trace(messages), mixture.route([messages])
    router = mixture.router
    levels = [choice.level for choice in choices] if router.rule == "vote" else [router.reads]
    return {"trace": [asdict(choice) for choice in choices],
            "decision": {**asdict(decision), "rule": router.rule, "levels": levels}}
