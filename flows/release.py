"""From built artifacts to a champion: register, gate, promote. Order and policy only, plain functions.

Whatever wraps them (a Prefect task, a command, a test) gets the same result, and may repeat any of them: what is
registered stays registered, what is champion stays champion.
"""

import getpass
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from moa import digests, gate
from moa.commands import environment, last_error
from moa.config import Config
from moa.errors import PipelineError
from moa.history import Entry
from moa.registry import ExpertVersion, MixtureVersion, Registry
from moa.workspace import MANIFEST, Workspace, read_json

FIRST = "first release"
ALREADY = "already champion"


def register_experts(workspace: Workspace, config: Config) -> dict[str, ExpertVersion]:
    """One version per domain; new ones only for new content."""
    registry = Registry(workspace, config)
    return {domain: registry.register_expert(domain) for domain in sorted(config.domains)}


def register_mixture(workspace: Workspace, config: Config, experts: dict[str, ExpertVersion]) -> MixtureVersion:
    return Registry(workspace, config).register_mixture(experts)


def decide(workspace: Workspace, config: Config, challenger: int) -> dict[str, Any]:
    """Whether version `challenger` should become champion, and why; kept with the version.

    Who was champion before does not come back by itself: a run after a rollback must not undo it. The same question,
    down to the test rows, is not asked twice.
    """
    registry = Registry(workspace, config)
    served = [entry for entry in registry.history() if entry.effective]
    wanted, incumbent = registry.get(challenger), _incumbent(registry, served)
    question = _question(workspace, config, wanted, incumbent)
    if incumbent is not None and incumbent.digest == wanted.digest:
        return {**question, **gate.Decision(False, ALREADY).as_dict()}
    if any(entry.version == wanted.version for entry in served):
        return {**question, **gate.Decision(False, f"version {wanted.version} was champion before and was replaced "
                                                   f"({served[-1].reason}): it returns only by hand").as_dict()}
    if wanted.gate is not None and question.items() <= wanted.gate.items():
        return wanted.gate
    decision = gate.Decision(True, FIRST) if incumbent is None else _compared(workspace, config, incumbent, wanted)
    record = {**question, **decision.as_dict()}
    registry.record_gate(wanted.version, record)
    return record


def promote(workspace: Workspace, config: Config, version: int, reason: str, by: str | None = None) -> dict[str, Any]:
    """Make `version` champion."""
    return asdict(Registry(workspace, config).set_champion(version, reason, by or _user()))


def release(workspace: Workspace, config: Config, promote: bool = True) -> dict[str, Any]:
    """Register what is built, gate it, and promote it if it passes. Returns what happened."""
    result = None
    for _, work in hooks(workspace, config, promote):
        result = work()
    assert isinstance(result, dict)
    return result


def hooks(workspace: Workspace, config: Config, may_promote: bool = True) -> list[tuple[str, Callable[[], Any]]]:
    """The steps of `release`, each with its name; the last one's value is what happened."""
    state: dict[str, Any] = {}

    def experts() -> dict[str, int]:
        state["experts"] = register_experts(workspace, config)
        return {domain: each.version for domain, each in state["experts"].items()}

    def mixture() -> dict[str, Any]:
        state["mixture"] = register_mixture(workspace, config, state["experts"])
        return _described(state["mixture"])

    def gated() -> dict[str, Any]:
        state["decision"] = decide(workspace, config, state["mixture"].version)
        return state["decision"]

    def promoted() -> dict[str, Any]:
        decision, version = state["decision"], state["mixture"].version
        # An alias that was deleted is set again, though the gate has nothing to say about equal content.
        restored = decision["reason"] == ALREADY and Registry(workspace, config).champion() is None
        if may_promote and (decision["promote"] or restored):
            promote(workspace, config, version, "restored: the alias was missing" if restored else decision["reason"])
        champion = Registry(workspace, config).champion()
        return {**_described(state["mixture"]),
                "experts": {domain: each.version for domain, each in state["experts"].items()},
                "decision": decision, "champion": champion.version if champion else None}

    return [("register experts", experts), ("register mixture", mixture), ("gate", gated), ("promote", promoted)]


def compare(workspace: Workspace, incumbent: int, challenger: int) -> dict[str, Any]:
    """Per-row losses of two releases on the pinned test rows, answered by their exported artifacts in another process.

    Raises PipelineError with that process's own words.
    """
    command = [sys.executable, "-m", "moa", "compare", "--incumbent", str(incumbent), "--challenger", str(challenger),
               "--json"]
    done = subprocess.run(command, cwd=workspace.root, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        reason = last_error((done.stdout + done.stderr).splitlines(), done.returncode)
        raise PipelineError(f"Versions {incumbent} and {challenger} could not be compared: {reason}")
    try:
        compared: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise PipelineError(f"`{' '.join(command[1:])}` did not print JSON.") from None
    return compared


def _compared(workspace: Workspace, config: Config, incumbent: MixtureVersion,
              challenger: MixtureVersion) -> gate.Decision:
    compared = compare(workspace, incumbent.version, challenger.version)
    return gate.decide(map(_score, compared["rows"]), _rules(config), incumbent=incumbent.experts,
                       challenger=challenger.experts, routing=compared.get("routing"))


def _rules(config: Config) -> gate.Rules:
    params = config.release
    return gate.Rules(tolerance=params.tolerance, min_gain=params.min_gain, min_rows=params.min_rows,
                      confidence=params.confidence)


def _question(workspace: Workspace, config: Config, challenger: MixtureVersion,
              incumbent: MixtureVersion | None) -> dict[str, Any]:
    """Everything a decision depends on: both releases, the rules, the test rows."""
    corpora = {domain: read_json(path)["digest"] for domain in sorted(config.domains)
               if (path := workspace.corpus(domain) / MANIFEST).is_file()}
    return {"version": challenger.version, "against": incumbent.version if incumbent else None,
            "rules": asdict(_rules(config)), "corpora": digests.of_json(corpora)}


def _score(row: Mapping[str, Any]) -> gate.Score:
    return gate.Score(row["domain"], str(row["row"]), row.get("challenger_loss"), row.get("incumbent_loss"),
                      row.get("base_loss"))


def _incumbent(registry: Registry, served: Sequence[Entry]) -> MixtureVersion | None:
    """The champion; without its alias, the last that was one: deleting an alias must not open the gate."""
    champion = registry.champion()
    if champion is not None or not served:
        return champion
    return registry.get(served[-1].version)


def _described(version: MixtureVersion) -> dict[str, Any]:
    return {"name": version.name, "version": version.version, "digest": version.digest, "created": version.created}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):   # a container's user may have no name
        return "unknown"
