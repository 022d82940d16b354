"""`moa release forgetting`: shows that a newer release still answers the domains of an older one.

An expert that did not change has the same bytes and gives the same answers, so a release can forget an old domain only
by routing its prompts elsewhere. The proof compares the experts' digests and generates golden answers anew. Scores and
routes are those that each release recorded when it was registered; routes are compared on the rows that both releases
were tested on. The proof decides nothing: the gate decides on promotion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moa.base.device import pick_device
from moa.base.load import load
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
COLUMNS = 5   # newest releases that the text shows; the facts have all
WIDTH = 72    # characters of an answer in the text


def versions_to_compare(workspace: Workspace, config: Config, old: int | None, new: int | None) -> tuple[int, int]:
    """Versions (old, new) to compare: by default the previous champion and the champion.

    Where only `new` is given, the old one is the champion, or its predecessor if `new` is the champion itself. Raises
    RegistryError when there is no champion or predecessor to take, and UsageError when both are the same version.
    """
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
    """Compare two releases, as facts (JSON values) for `text` and `complaint`.

    Returns:
        `equal`: whether the golden answers of all unchanged experts are equal word for word; `experts`, `golden` and
        `routing`: the comparison by domain; `table`: the recorded scores of both releases and of all champions.
    """
    registry = Registry(workspace, config)
    releases = [registry.get(version) for version in (old, new)]
    folders = [registry.download(release.version) for release in releases]
    experts = expert_changes(*({domain: pin["digest"]
                                for domain, pin in read_json(folder / MANIFEST)["experts"].items()}
                               for folder in folders))
    asked = {domain: read(workspace.corpus(domain), "test")[:config.adapt.golden]
             for domain, expert in experts.items() if expert["change"] == "same" and domain in config.domains}
    golden = _golden(workspace, config, folders, {domain: rows for domain, rows in asked.items() if rows})
    old_rows, new_rows = map(_routed, folders)
    return {"old": old, "new": new, "equal": all(answers["equal"] for answers in golden.values()),
            "experts": experts, "golden": golden, "table": _table(registry, releases),
            "routing": {changes.domain: asdict(changes) for changes in _paired_rows(old_rows, new_rows)
                        if experts.get(changes.domain, {}).get("change") in ("same", "changed")}}


# Pure parts.

def expert_changes(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """How each domain's expert changed between two releases: `same`, `changed`, `new` or `removed`, with both digests.

    `old` and `new` are the experts' digests by domain.
    """
    def change(domain: str) -> str:
        if domain not in old:
            return "new"
        if domain not in new:
            return "removed"
        return "same" if old[domain] == new[domain] else "changed"

    return {domain: {"change": change(domain), "old": old.get(domain), "new": new.get(domain)}
            for domain in sorted(old.keys() | new.keys())}


def word_for_word(rows: Sequence[Row], old: Sequence[str], new: Sequence[str]) -> dict[str, Any]:
    """Compare one expert's answers to the same prompts in two releases: `prompts` (count), `equal`, `differing`."""
    differing = [{"row": row.id, "prompt": row.question, "old": old_answer, "new": new_answer}
                 for row, old_answer, new_answer in zip(rows, old, new, strict=True) if old_answer != new_answer]
    return {"prompts": len(rows), "equal": not differing, "differing": differing}


def figures(metrics: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Each domain's number of test rows and, by system, loss and score, from metrics named like `math/routed/loss`."""
    by_domain: dict[str, dict[str, Any]] = {}
    for key, value in sorted(metrics.items()):
        domain, _, rest = key.partition("/")
        system, _, measure = rest.partition("/")
        if system in SYSTEMS and measure in ("loss", "score"):
            by_domain.setdefault(domain, {}).setdefault(system, {})[measure] = value
        elif (system, measure) == ("forced", "rows"):
            by_domain.setdefault(domain, {})["rows"] = int(value)
    return by_domain


def paired(old: Mapping[tuple[str, str], str], new: Mapping[tuple[str, str], str],
           groups: Mapping[tuple[str, str], str] | None = None) -> list[RoutingChanges]:
    """How routing changed, by domain, on the rows that both releases were tested on.

    Args:
        old, new: the router's best guess by (domain, id of the row).
        groups: the group of each row that shares one with other rows.
    """
    common = sorted(old.keys() & new.keys())
    return [routing_changes(domain, [((groups or {}).get(key, key[1]), old[key], new[key])
                                     for key in common if key[0] == domain])
            for domain in sorted({domain for domain, _ in common})]


def _paired_rows(old: Mapping[tuple[str, str], Mapping[str, Any]],
                 new: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[RoutingChanges]:
    """`paired` of the rows that two releases recorded; the newer record names the groups."""
    before, after = ({key: row["routed_to"] for key, row in rows.items()} for rows in (old, new))
    return paired(before, after, {key: row["group"] for key, row in new.items() if row["group"] is not None})


# Facts from the releases themselves.


def _golden(workspace: Workspace, config: Config, folders: Sequence[Path],
            asked: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Any]]:
    """Compare greedy answers of both releases, each prompt forced to its own expert.

    Both releases get the same batches, because batch composition changes rounding.
    """
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
    return {domain: word_for_word(rows, *(by_domain[domain] for by_domain in answers))
            for domain, rows in asked.items()}


def _routed(release: Path) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The record of every test row as it was routed, by (domain, id of the row); empty where there is none."""
    return {(row["domain"], row["row"]): row for row in read_rows(release) if row["system"] == "routed"}


def _table(registry: Registry, releases: Sequence[MixtureVersion]) -> list[dict[str, Any]]:
    """The recorded scores of `releases` and of every release that was champion, oldest first."""
    served = {entry.version for entry in registry.history() if entry.effective}
    wanted = {release.version: release for release in releases} | {
        version: registry.get(version) for version in served - {release.version for release in releases}}
    return [{"version": version, "champion": version in served, "domains": figures(registry.metrics(wanted[version]))}
            for version in sorted(wanted)]


# Text.

def complaint(facts: Mapping[str, Any]) -> str:
    """The error message for facts whose `equal` is False."""
    names = ", ".join(domain for domain, answers in facts["golden"].items() if not answers["equal"])
    return (f"Between versions {facts['old']} and {facts['new']} an expert that is the same bytes answers otherwise: "
            f"{names}. See the answers above; `moa release rollback` goes back if version {facts['new']} serves.")


def text(facts: Mapping[str, Any]) -> str:
    """The facts of `forgetting` as tables for a terminal."""
    return "\n".join([f"version {facts['old']} -> version {facts['new']}", "", *_expert_lines(facts), "",
                      *_score_lines(facts["table"][-COLUMNS:]), *_route_lines(facts["routing"])])


def _expert_lines(facts: Mapping[str, Any]) -> list[str]:
    lines = [("expert", "change", "digest", "golden answers")]
    for domain, expert in facts["experts"].items():
        sides = [digest[:SHORT_DIGEST] if digest else "none" for digest in (expert["old"], expert["new"])]
        golden = facts["golden"].get(domain)
        equal = ("-" if golden is None else
                 f"{golden['prompts'] - len(golden['differing'])} of {golden['prompts']} equal")
        change = expert["change"]
        lines.append((domain, change, sides[0] if change == "same" else " -> ".join(sides), equal))
    blocks = [table(lines)]
    for domain, golden in facts["golden"].items():
        for answer in golden["differing"]:
            blocks += [f"{domain} answers otherwise: {shorten(answer['prompt'], WIDTH)}",
                       f"  old: {shorten(answer['old'], WIDTH)}", f"  new: {shorten(answer['new'], WIDTH)}"]
    return blocks


def _score_lines(releases: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [("domain", "answered by", *(f"version {release['version']}" for release in releases))]
    for domain in sorted({domain for release in releases for domain in release["domains"]}):
        for system, name in zip(SYSTEMS, ("its own expert", "the router's choice"), strict=True):
            lines.append((domain, name, *(_cell(release["domains"].get(domain, {}).get(system))
                                          for release in releases)))
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
    lines += [(domain, str(changes["rows"]), RoutingChanges(**changes).text) for domain, changes in routing.items()]
    return ["", table(lines)]
