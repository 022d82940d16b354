"""From built artifacts to a champion: register, gate, promote. Order and policy only, plain functions.

Whatever wraps them (a Prefect task, a command, a test) gets the same result, and may repeat any of them: what is
registered stays registered, what is champion stays champion.
"""

import getpass
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from moa.core import digests
from moa.core.config import Config
from moa.core.errors import PipelineError, RegistryError, UsageError
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.core.subprocesses import moa_json
from moa.evaluation import comparison, gate, power
from moa.evaluation.evaluate import read_rows
from moa.mixture import incumbent
from moa.release.champion_history import Entry, previous_champion
from moa.release.registry import CURRENT_CHAMPION, ExpertVersion, MixtureVersion, Registry
from moa.workspace.data_versions import DataVersions

ALREADY = "already champion"
RESTORED = "restored: the alias was missing"


def register_experts(workspace: Workspace, config: Config) -> dict[str, ExpertVersion]:
    """One version per domain; new ones only for new content."""
    registry = Registry(workspace, config)
    return {domain: registry.register_expert(domain) for domain in sorted(config.domains)}


def register_mixture(workspace: Workspace, config: Config, experts: dict[str, ExpertVersion]) -> MixtureVersion:
    return Registry(workspace, config).register_mixture(experts, partial(_report, workspace, config))


def _report(workspace: Workspace, config: Config) -> str:
    """The report page as HTML; empty where it cannot be made, since a fault of a chart must not hold up a release."""
    from moa.reports import facts, page

    try:
        return page.render(facts.gather(workspace, config))
    except Exception:
        logging.getLogger(__name__).exception("The report page of this release could not be made.")
        return ""


def decide(workspace: Workspace, config: Config, challenger: int) -> dict[str, Any]:
    """Whether version `challenger` should become champion, and why; kept with the version.

    Who was champion before does not come back by itself: a run after a rollback must not undo it.
    """
    registry = Registry(workspace, config)
    served = [entry for entry in registry.history() if entry.effective]
    wanted, incumbent = registry.get(challenger), _incumbent(registry, served)
    returning = any(entry.version == wanted.version for entry in served)
    if returning and not (incumbent is not None and incumbent.digest == wanted.digest):
        return {**_question(workspace, config, wanted, incumbent),
                **gate.Decision(False, f"version {wanted.version} was champion before and was replaced "
                                       f"({served[-1].reason}): it returns only by hand").as_dict()}
    return examine(workspace, config, challenger)


def examine(workspace: Workspace, config: Config, challenger: int, against: int | None = None, *,
            record: bool = True) -> dict[str, Any]:
    """The gate's own answer about version `challenger`, against the champion or another release.

    Kept with the version: the same question, down to the test rows, is not asked twice. An answer against another
    release than the champion decides nothing and is not kept. Neither is one without `record`; such an answer promotes
    nothing, so it counts as no look at the test rows.
    """
    registry = Registry(workspace, config)
    wanted = registry.get(challenger)
    incumbent = _incumbent(registry, [entry for entry in registry.history() if entry.effective])
    aside = against if against is not None and (incumbent is None or incumbent.version != against) else None
    other = registry.get(aside) if aside is not None else incumbent
    question = _question(workspace, config, wanted, other)
    if other is not None and other.digest == wanted.digest:
        same = ALREADY if aside is None else f"versions {other.version} and {wanted.version} are the same release"
        return {**question, **gate.Decision(False, same).as_dict()}
    known = wanted.gate if aside is None else None
    if known is not None and question.items() <= known.items():
        return known
    decision, anchors = (_first(config, registry, wanted) if other is None else
                         _compared(workspace, config, registry, other, wanted, aside is None))
    result = {**question, **decision.as_dict(), "anchors": anchors}
    if record and aside is None:
        registry.record_gate(wanted.version, result)
    return result


def promote(workspace: Workspace, config: Config, version: int, reason: str, by: str | None = None,
            instead_of: int | None = CURRENT_CHAMPION) -> dict[str, Any]:
    """Make `version` champion, if the champion is still `instead_of`, and let the stages know it (data/champion)."""
    registry = Registry(workspace, config)
    entry = registry.set_champion(version, reason, by or _user(), instead_of=instead_of)
    write_champion(workspace, registry)
    return asdict(entry)


def write_champion(workspace: Workspace, registry: Registry) -> None:
    """Write the champion's calibration and losses to data/champion, and version them with DVC, if they changed.

    The stages read them there. Without a champion they stay as they are. Where DVC cannot version them there is a
    warning: another machine then makes its router afresh, and the promotion, which has happened, is none the worse.
    """
    champion = registry.champion()
    if champion is None:
        return
    local = workspace.mixture
    built = (local / MANIFEST).is_file() and read_json(local / MANIFEST)["digest"] == champion.digest
    changed = incumbent.write(workspace, local if built else registry.download(champion.version))
    if changed and (workspace.root / ".dvc").is_dir():
        try:
            DataVersions(workspace).add(workspace.champion)
        except PipelineError as error:
            logging.getLogger(__name__).warning("data/champion has no version for other machines: %s", error)


def approve(workspace: Workspace, config: Config, version: int, *, force: bool = False,
            note: str | None = None) -> dict[str, Any]:
    """Make `version` champion by hand: once the gate passes it, or by force and for the reason in `note`.

    Raises UsageError for force without a reason, RegistryError with the gate's reason when it does not pass.
    """
    note = (note or "").strip()
    if force and not note:
        raise UsageError("--force needs --reason TEXT: the history must say why the gate was overruled.")
    registry = Registry(workspace, config)
    wanted, champion = registry.get(version), registry.champion()
    if champion is not None and champion.version == wanted.version:
        return {"version": wanted.version, "previous": wanted.version, "changed": False, "reason": ALREADY}
    compared: int | None = CURRENT_CHAMPION
    if force:
        reason = f"forced: {note}"
    else:
        decision = examine(workspace, config, wanted.version)
        restored = champion is None and decision["reason"] == ALREADY
        if not (decision["promote"] or restored):
            raise RegistryError(f"The gate refuses version {wanted.version}: {decision['reason'].rstrip('.')}. See "
                                f"`moa gate {wanted.version}`; `--force --reason TEXT` overrules it.")
        reason = "; ".join(filter(None, [RESTORED if restored else decision["reason"].rstrip("."), note]))
        compared = decision["against"]
    entry = promote(workspace, config, wanted.version, reason, instead_of=compared)
    return {**entry, "previous": champion.version if champion else None, "changed": True}


def roll_back(workspace: Workspace, config: Config, to: int | None = None, note: str | None = None) -> dict[str, Any]:
    """Make the champion before the present one champion again, or version `to`, which must have been it once.

    Raises RegistryError when there is none. What it answers is what it answered: a release never changes.
    """
    registry = Registry(workspace, config)
    served = [entry for entry in registry.history() if entry.effective]
    if to is not None:
        target: int | None = registry.get(to).version
        if all(entry.version != target for entry in served):
            raise RegistryError(f"Version {to} was never champion, so there is nothing to go back to: `moa release "
                                f"promote {to}` asks the gate.")
    else:
        found = previous_champion(served)
        target = found.version if found else None
    current = _incumbent(registry, served)
    if current is None or target is None:
        raise RegistryError("No other champion came before: there is nothing to roll back to.")
    if current.version == target and registry.champion() is not None:
        raise RegistryError(f"Version {target} is champion already: there is nothing to roll back.")
    reason = f"rollback from version {current.version}" + (f": {note.strip()}" if note and note.strip() else "")
    return {**promote(workspace, config, target, reason), "previous": current.version, "changed": True}


def release(workspace: Workspace, config: Config, promote: bool = True) -> dict[str, Any]:
    """Register what is built, gate it, and promote it if it passes. Returns what happened.

    With `release.approval: manual`, or without `promote`, what passes is left `waiting` for `moa release promote`.
    """
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
        approved = decision["promote"] and config.release.approval == "auto"
        if may_promote and (approved or restored):
            promote(workspace, config, version, RESTORED if restored else decision["reason"],
                    instead_of=decision["against"])
        else:   # another machine may have promoted one
            write_champion(workspace, Registry(workspace, config))
        champion = Registry(workspace, config).champion()
        return {**_described(state["mixture"]),
                "experts": {domain: each.version for domain, each in state["experts"].items()},
                "decision": decision, "champion": champion.version if champion else None,
                "waiting": decision["promote"] and (champion is None or champion.version != version)}

    return [("register experts", experts), ("register mixture", mixture), ("gate", gated), ("promote", promoted)]


def compare(workspace: Workspace, incumbent: int, challenger: int) -> dict[str, Any]:
    """Per-row losses and scores of two releases on the pinned test rows, answered by their exported artifacts.

    In another process. Raises PipelineError with that process's own words.
    """
    compared, problem = moa_json(workspace, "compare", challenger, "--against", incumbent)
    if problem:
        raise PipelineError(f"Versions {incumbent} and {challenger} could not be compared: {problem}", cause=problem)
    return compared


def forgetting(workspace: Workspace, old: int, new: int) -> dict[str, Any]:
    """What version `new` has not forgotten of version `old`: the facts of `moa release forgetting`.

    In another process. Where an unchanged expert answers otherwise, `equal` is False: that is for the caller to judge.
    Raises PipelineError when there are no facts, with that process's own words.
    """
    facts, problem = moa_json(workspace, "release", "forgetting", new, "--against", old)
    if not facts:
        raise PipelineError(f"What version {new} forgot of version {old} could not be told: {problem}", cause=problem)
    return facts


def _first(config: Config, registry: Registry, challenger: MixtureVersion) -> tuple[gate.Decision, dict[str, int]]:
    """The decision on a release that none came before, against the base, from the evaluation it was registered with."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in read_rows(registry.download(challenger.version)):
        kept = rows.setdefault((row["domain"], row["row"]), {key: row[key] for key in ("domain", "row", "group",
                                                                                       "tokens")})
        if row["system"] == "forced":
            kept |= {"own_loss": row["loss"], "swapped_loss": row.get("swapped_loss")}
        else:
            name = {"base": "base", "routed": "challenger"}[row["system"]]
            kept |= {f"{name}_loss": row["loss"], f"{name}_score": row["score"]}
    return gate.decide(map(_score, rows.values()), config.release, incumbent=(), challenger=challenger.experts,
                       first=True), {}


def _compared(workspace: Workspace, config: Config, registry: Registry, incumbent: MixtureVersion,
              challenger: MixtureVersion, decides: bool) -> tuple[gate.Decision, dict[str, int]]:
    """The decision, and by domain the version of the best champion so far. One that decides nothing has no anchor."""
    compared = compare(workspace, incumbent.version, challenger.version)
    scores = [_score(row) for row in compared["rows"]]
    anchors: dict[str, int] = {}
    looks: dict[str, int] = {}
    if decides:
        looks = _looks(registry.versions(), scores)
        anchors, losses = _anchors(registry, incumbent, scores)
        scores = [replace(one, anchor=losses.get((one.domain, one.row))) for one in scores]
    return gate.decide(scores, config.release, incumbent=incumbent.experts, challenger=challenger.experts, looks=looks,
                       tested_by=f"version {incumbent.version}", causes=_causes(compared)), anchors


def _looks(versions: Sequence[MixtureVersion], scores: Sequence[gate.Score]) -> dict[str, int]:
    """By domain, which look at its test rows the coming one is: one more than the last that counts.

    Test rows only grow, but for rows that are taken out by hand. So an earlier look counts as long as the rows that it
    saw make at least half of the present groups: arrivals refresh the test rows. The first release was compared with no
    other, which is no look.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for one in scores:
        groups[one.domain].add(one.unit)
    looks = dict.fromkeys(groups, 1)
    decisions = [decision for version in versions if (decision := version.gate) and decision.get("against") is not None]
    for decision in decisions:
        for domain, verdict in (decision.get("domains") or {}).items():
            if domain in groups and 2 * (verdict["loss"].get("groups") or 0) >= len(groups[domain]):
                looks[domain] = max(looks[domain], verdict.get("look", 1) + 1)
    return looks


def _anchors(registry: Registry, incumbent: MixtureVersion, scores: Sequence[gate.Score]) -> tuple[
        dict[str, int], dict[tuple[str, str], float]]:
    """By domain, the version of the best champion so far, and its losses by (domain, row) if it is not the incumbent.

    The incumbent's own decision named the best one before it, so only these two are compared, on the rows that both
    recorded: the better one stays, and where too few groups are left, the incumbent is the anchor. An incumbent that
    the gate did not judge, since it was promoted by force, is compared with the champion before it.
    """
    former = dict((incumbent.gate or {}).get("anchors") or {})
    if not former and (entry := previous_champion([each for each in registry.history() if each.effective])):
        former = dict.fromkeys(registry.get(entry.version).experts, entry.version)
    folder = registry.download(incumbent.version)
    mine, base = _routed_losses(folder) if former else {}, read_json(folder / MANIFEST)["base"]
    folders = {version: registry.download(version) for version in set(former.values())}
    # Losses under another base are of other tokens.
    theirs = {version: _routed_losses(former_folder) if read_json(former_folder / MANIFEST)["base"] == base else {}
              for version, former_folder in folders.items()}
    anchors = dict.fromkeys(incumbent.experts, incumbent.version)
    losses: dict[tuple[str, str], float] = {}
    for domain, version in former.items():
        pairs = [(one, theirs[version][key], mine[key]) for one in scores if one.domain == domain
                 and (key := (one.domain, one.row)) in theirs[version] and key in mine]
        if domain in anchors and gate.is_better(pairs, registry.config.release.min_rows):
            anchors[domain] = version
            losses |= {(domain, row): loss for (of, row), loss in theirs[version].items() if of == domain}
    return anchors, losses


def _routed_losses(release: Path) -> dict[tuple[str, str], float]:
    return {(row["domain"], row["row"]): row["loss"] for row in read_rows(release) if row["system"] == "routed"}


def _causes(compared: Mapping[str, Any]) -> dict[str, str]:
    parts = compared.get("parts")
    return comparison.attribute_regressions(compared["rows"], parts["incumbent"], parts["challenger"]) if parts else {}


def lacking_rows(workspace: Workspace, config: Config, decision: Mapping[str, Any]) -> dict[str, int]:
    """By domain that the gate cannot judge yet, about how many more rows of data it takes, from its prepared corpus."""
    return {domain: power.rows_for(groups, read_json(path), config.prepare.test)
            for domain, verdict in (decision.get("domains") or {}).items()
            if verdict["verdict"] == "not enough data" and (groups := verdict.get("more_groups"))
            and (path := workspace.corpus(domain) / MANIFEST).is_file()}


def _question(workspace: Workspace, config: Config, challenger: MixtureVersion,
              incumbent: MixtureVersion | None) -> dict[str, Any]:
    """Everything a decision depends on: both releases, the rules, the test rows and how they are answered."""
    corpora = {domain: read_json(path)["digest"] for domain in sorted(config.domains)
               if (path := workspace.corpus(domain) / MANIFEST).is_file()}
    asked = {"corpora": corpora, "rows": config.evaluate.rows, "max_new_tokens": config.evaluate.max_new_tokens,
             "metric_rows": config.release.metric_rows,
             "metrics": {domain: each.metric for domain, each in config.domains.items()}}
    return {"version": challenger.version, "against": incumbent.version if incumbent else None,
            "rules": gate.rules_of(config.release), "corpora": digests.of_json(asked)}


def _score(row: Mapping[str, Any]) -> gate.Score:
    names = ("challenger", "incumbent", "base")
    values: dict[str, Any] = {name: row.get(f"{name}_loss") for name in names}
    values |= {key: row[key] for name in names for part in ("score", "routed", "abstained")
               if (key := f"{name}_{part}") in row}
    return gate.Score(domain=row["domain"], row=str(row["row"]), known=row.get("known", True), group=row.get("group"),
                      own=row.get("own_loss"), swapped=row.get("swapped_loss"),
                      tokens=row.get("tokens", 1), same_expert=row.get("same_expert", False),
                      same_answer=row.get("same_answer", False), **values)


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
