"""What a release has not forgotten: unchanged experts, their answers, scores by release, and where prompts go now.

An expert that did not change is the same bytes and answers the same words, so what a release forgets of an old domain
can only be a question of routing. Digests and answers are looked at here and now; scores and routes are those that each
release recorded when it was registered, routes of the rows that both were tested on. Decides nothing: the gate does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moa.base.load import load, pick_device
from moa.core.config import Config
from moa.core.errors import RegistryError, UsageError
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.core.text import NOTHING_RELEASED, SHORT_DIGEST, shorten, table
from moa.data.corpus import Row, read
from moa.evaluation.evaluate import read_rows
from moa.evaluation.scoring import generate_answers
from moa.evaluation.statistics import RoutingChanges, routing_changes
from moa.release.champion_history import previous_champion
from moa.release.registry import MixtureVersion, Registry

SYSTEMS = ("forced", "routed")
COLUMNS = 5   # releases in the text; the facts have all
WIDTH = 72    # characters of an answer in the text


def versions_to_compare(workspace: Workspace, config: Config, old: int | None, new: int | None) -> tuple[int, int]:
    """The versions to compare: by default the champion and the one before it; another release with the champion."""
    registry = Registry(workspace, config)
    champion = registry.champion() if registry.exists() else None
    if champion is None and (old is None or new is None):
        raise RegistryError(NOTHING_RELEASED if not registry.exists() or not registry.versions() else
                            "There is no champion: name two versions, `moa release forgetting VERSION --against "
                            "VERSION`.")
    if new is None:
        assert champion is not None
        new = champion.version
    if old is None and champion is not None and champion.version != new:
        old = champion.version
    if old is None:
        earlier = previous_champion([entry for entry in registry.history() if entry.effective])
        if earlier is None:
            raise RegistryError(f"No other champion came before version {new}, so nothing can have been forgotten: "
                                "name a release with --against.")
        old = earlier.version
    if old == new:
        raise UsageError(f"Version {new} cannot be compared with itself: name another release with --against.")
    return old, new


def forgetting(workspace: Workspace, config: Config, old: int, new: int) -> dict[str, Any]:
    """The proof, as facts. `equal` is whether every unchanged expert's golden answers are, word for word."""
    registry = Registry(workspace, config)
    releases = [registry.get(version) for version in (old, new)]
    folders = [registry.download(release.version) for release in releases]
    experts = expert_changes(*({domain: each["digest"] for domain,
                                each in read_json(folder / MANIFEST)["experts"].items()}
                               for folder in folders))
    asked = {domain: read(workspace.corpus(domain), "test")[:config.adapt.golden]
             for domain, each in experts.items() if each["change"] == "same" and domain in config.domains}
    golden = _golden(workspace, config, folders, {domain: rows for domain, rows in asked.items() if rows})
    old_rows, new_rows = map(_routed, folders)
    return {"old": old, "new": new, "equal": all(each["equal"] for each in golden.values()),
            "experts": experts, "golden": golden, "table": _table(registry, releases),
            "routing": {found.domain: asdict(found) for found in _paired_rows(old_rows, new_rows)
                        if experts.get(found.domain, {}).get("change") in ("same", "changed")}}


# Pure parts.

def expert_changes(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Each domain's expert, by its digest in either release: same, changed, new or removed."""
    def change(domain: str) -> str:
        if domain not in old:
            return "new"
        if domain not in new:
            return "removed"
        return "same" if old[domain] == new[domain] else "changed"

    return {domain: {"change": change(domain), "old": old.get(domain), "new": new.get(domain)}
            for domain in sorted(old.keys() | new.keys())}


def word_for_word(rows: Sequence[Row], old: Sequence[str], new: Sequence[str]) -> dict[str, Any]:
    """Whether one expert's answers to the same prompts are equal in two releases, and those that are not."""
    differing = [{"row": row.id, "prompt": row.question, "old": one, "new": other}
                 for row, one, other in zip(rows, old, new, strict=True) if one != other]
    return {"prompts": len(rows), "equal": not differing, "differing": differing}


def figures(metrics: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Of a release's recorded metrics (`math/routed/loss`), each domain's test rows and, by system, loss and score."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in sorted(metrics.items()):
        domain, _, rest = key.partition("/")
        system, _, measure = rest.partition("/")
        if system in SYSTEMS and measure in ("loss", "score"):
            found.setdefault(domain, {}).setdefault(system, {})[measure] = value
        elif (system, measure) == ("forced", "rows"):
            found.setdefault(domain, {})["rows"] = int(value)
    return found


def paired(old: Mapping[tuple[str, str], str], new: Mapping[tuple[str, str], str],
           groups: Mapping[tuple[str, str], str] | None = None) -> list[RoutingChanges]:
    """By domain, where the prompts went that both releases were tested on; keys are (domain, row).

    Args:
        old, new: the router's best guess for each row.
        groups: each row's group, where it shares one with other rows.
    """
    both = sorted(old.keys() & new.keys())
    return [routing_changes(domain, [((groups or {}).get(key, key[1]), old[key], new[key])
                                     for key in both if key[0] == domain])
            for domain in sorted({domain for domain, _ in both})]


def _paired_rows(old: Mapping[tuple[str, str], Mapping[str, Any]],
                 new: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[RoutingChanges]:
    """`paired` of the rows that two releases recorded; the newer record names the groups."""
    before, after = ({key: row["routed_to"] for key, row in rows.items()} for rows in (old, new))
    return paired(before, after, {key: row["group"] for key, row in new.items() if row["group"] is not None})


# What the releases themselves say.

def _golden(workspace: Workspace, config: Config, folders: Sequence[Path],
            asked: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Any]]:
    """Label-forced greedy answers of both releases, compared; the same batches, so that rounding is the same too."""
    from moa.mixture.mixture import Mixture

    if not asked:
        return {}
    base = load(workspace, config.base, pick_device(config.execution.devices))
    content = [(domain, row) for domain, rows in asked.items() for row in rows]
    pairs = [(index, domain) for index, (domain, _) in enumerate(content)]
    answers: list[dict[str, list[str]]] = []
    for folder in folders:
        mixture = Mixture.load(folder, base, config.execution.resident)
        generated = generate_answers(mixture, workspace, config, content, pairs)
        answers.append({domain: [generated[pair] for pair in pairs if pair[1] == domain] for domain in asked})
        mixture.unload()
    return {domain: word_for_word(rows, *(each[domain] for each in answers)) for domain, rows in asked.items()}


def _routed(release: Path) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Every test row that a downloaded release recorded, as it was routed; none where it recorded none."""
    return {(row["domain"], row["row"]): row for row in read_rows(release) if row["system"] == "routed"}


def _table(registry: Registry, releases: Sequence[MixtureVersion]) -> list[dict[str, Any]]:
    """What every release that was ever champion recorded, and these two, oldest first."""
    served = {entry.version for entry in registry.history() if entry.effective}
    wanted = {each.version: each for each in releases} | {
        version: registry.get(version) for version in served - {each.version for each in releases}}
    return [{"version": version, "champion": version in served, "domains": figures(registry.metrics(wanted[version]))}
            for version in sorted(wanted)]


# Text.

def complaint(facts: Mapping[str, Any]) -> str:
    """What is wrong where `equal` is False."""
    names = ", ".join(domain for domain, each in facts["golden"].items() if not each["equal"])
    return (f"Between versions {facts['old']} and {facts['new']} an expert that is the same bytes answers otherwise: "
            f"{names}. See the answers above; `moa release rollback` goes back if version {facts['new']} serves.")


def text(facts: Mapping[str, Any]) -> str:
    """The proof as tables."""
    return "\n".join([f"version {facts['old']} -> version {facts['new']}", "", *_expert_lines(facts), "",
                      *_score_lines(facts["table"][-COLUMNS:]), *_route_lines(facts["routing"])])


def _expert_lines(facts: Mapping[str, Any]) -> list[str]:
    lines = [("expert", "change", "digest", "golden answers")]
    for domain, each in facts["experts"].items():
        sides = [digest[:SHORT_DIGEST] if digest else "none" for digest in (each["old"], each["new"])]
        found = facts["golden"].get(domain)
        said = "-" if found is None else f"{found['prompts'] - len(found['differing'])} of {found['prompts']} equal"
        lines.append((domain, each["change"], sides[0] if each["change"] == "same" else " -> ".join(sides), said))
    shown = [table(lines)]
    for domain, found in facts["golden"].items():
        for one in found["differing"]:
            shown += [f"{domain} answers otherwise: {shorten(one['prompt'], WIDTH)}",
                      f"  old: {shorten(one['old'], WIDTH)}", f"  new: {shorten(one['new'], WIDTH)}"]
    return shown


def _score_lines(releases: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [("domain", "answered by", *(f"version {each['version']}" for each in releases))]
    for domain in sorted({domain for each in releases for domain in each["domains"]}):
        for system, name in zip(SYSTEMS, ("its own expert", "the router's choice"), strict=True):
            lines.append((domain, name, *(_cell(each["domains"].get(domain, {}).get(system)) for each in releases)))
    return ["loss in nats and score, on the test rows that each release had", table(lines)]


def _cell(values: Mapping[str, float] | None) -> str:
    if not values:
        return "-"
    return "  ".join(f"{values[measure]:.{digits}f}" if measure in values else "-"
                     for measure, digits in (("loss", 4), ("score", 3)))


def _route_lines(routing: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not routing:
        return ["", "routing: the releases recorded no test row that both were tested on"]
    lines = [("domain", "rows", "routing accuracy, on the rows that both were tested on")]
    lines += [(domain, str(each["rows"]), RoutingChanges(**each).text) for domain, each in routing.items()]
    return ["", table(lines)]
