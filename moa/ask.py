"""Releases at work: ask the champion, let two releases answer the same rows. Knows nothing of how either was made."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from moa.base import load, pick_device
from moa.config import Config
from moa.config import load as load_config
from moa.errors import RegistryError
from moa.workspace import Workspace


def open_mixture(directory: Path, workspace: Workspace | None = None) -> Any:
    """The mixture in `directory` on the base of `workspace` (default: the one around the current folder)."""
    from moa.mixture import Mixture

    workspace = workspace or Workspace.find()
    config = load_config(workspace.params)
    return Mixture.load(directory, load(workspace, config.base, pick_device(config.execution.devices)))


def champion(workspace: Workspace, config: Config) -> tuple[Any, Path]:
    """The champion's version and the folder of its content. Raises RegistryError when nothing was released."""
    from moa.registry import Registry

    registry = Registry(workspace, config)
    version = registry.champion()
    if version is None:
        raise RegistryError("Nothing has been released yet, so there is no champion: run `moa run` first.")
    return version, registry.download(version.version)


def ask(workspace: Workspace, config: Config, question: str, *, domain: str | None = None, trace: bool = False,
        **options: Any) -> dict[str, Any]:
    """The champion's answer; `domain` overrules the router. `options` are those of `moa.generation`.

    With `trace`, also what every level's head says of the question (`trace`) and what the rule makes of it
    (`decision`), whoever answers.
    """
    version, folder = champion(workspace, config)
    mixture = open_mixture(folder, workspace)
    messages = [{"role": "user", "content": question}]
    reply = {**asdict(mixture.chat(messages, domain=domain, **options)), "release": version.version}
    return reply | traced(mixture, messages) if trace else reply


def traced(mixture: Any, messages: list[dict[str, str]]) -> dict[str, Any]:
    """The router at work on one conversation; `levels` are those that its rule reads."""
    choices, (decision,) = mixture.trace(messages), mixture.route([messages])
    router = mixture.router
    levels = [choice.level for choice in choices] if router.rule == "vote" else [router.reads]
    return {"trace": [asdict(choice) for choice in choices],
            "decision": {**asdict(decision), "threshold": router.threshold, "rule": router.rule, "levels": levels}}


def compare(workspace: Workspace, config: Config, incumbent: int, challenger: int) -> dict[str, Any]:
    """Loss of every test row under both releases, routed as each would route it; in nats per completion token.

    A domain that only one of them knows counts for that one, and one that the incumbent does not know is answered by
    the base too. What a row gets from an expert depends on that row and the expert's weights alone, so where both
    releases give a row to an expert of the same digest, it is computed once.
    """
    from moa.evaluate import test_rows
    from moa.mixture import BASE, Mixture, answering
    from moa.registry import Registry

    registry = Registry(workspace, config)
    base = load(workspace, config.base, pick_device(config.execution.devices))
    content = test_rows(workspace, config, sorted(config.domains))
    rows: list[dict[str, Any]] = [{"domain": domain, "row": row.id} for domain, row in content]
    routing: dict[str, dict[str, float]] = {}
    computed: dict[tuple[int, str, str], float] = {}   # (row, expert's digest, encoding) -> loss

    def lose(mixture: Mixture, asked: list[tuple[int, str]], column: str) -> None:
        keys = [(index, mixture.experts[by], f"{mixture.encoder.system!r}") for index, by in asked]
        missing = [(key, by) for key, (_, by) in zip(keys, asked, strict=True) if key not in computed]
        losses = mixture.losses([content[key[0]][1].messages for key, _ in missing], [by for _, by in missing])
        computed.update((key, loss) for (key, _), (loss, _) in zip(missing, losses, strict=True))
        for key in keys:
            rows[key[0]][column] = computed[key]

    incumbents: list[str] = []
    for name, version in (("incumbent", incumbent), ("challenger", challenger)):
        mixture = Mixture.load(registry.download(version), base)
        known = [index for index, (domain, _) in enumerate(content) if domain in mixture.labels]
        decisions = mixture.route([content[index][1].prompt for index in known])
        lose(mixture, [(index, answering(one)) for index, one in zip(known, decisions, strict=True)], f"{name}_loss")
        right = [content[index][0] == one.domain for index, one in zip(known, decisions, strict=True)]
        routing[name] = {"accuracy": sum(right) / max(len(right), 1),
                         "abstention": sum(one.abstained for one in decisions) / max(len(right), 1)}
        if name == "incumbent":
            incumbents = mixture.labels
        else:
            lose(mixture, [(index, BASE) for index in known if content[index][0] not in incumbents], "base_loss")
        mixture.unload()
    return {"incumbent": incumbent, "challenger": challenger, "rows": rows, "routing": routing}
