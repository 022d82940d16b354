"""Releases as facts (JSON values) and as text for a terminal. Reads the registry and changes nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from moa.core.config import Config
from moa.core.paths import Workspace
from moa.core.project import Names
from moa.core.text import NOTHING_RELEASED, SHORT_DIGEST, indented_table, shorten, table
from moa.evaluation.gate import verdict_of
from moa.release.champion_history import Entry
from moa.release.registry import MixtureVersion, Registry
from moa.reports import changed_hands
from moa.reports.facts import wear

# Facts.

def listed(workspace: Workspace, config: Config) -> dict[str, Any]:
    """All releases, for `listed_text`.

    Returns:
        `name` of the registered model, `champion` (its version, or None), and `releases`, newest first.
    """
    registry = Registry(workspace, config)
    if not registry.exists():
        return {"name": Names.of(config).mixture, "champion": None, "releases": []}
    champion, served = registry.champion(), _served(registry.history())
    return {"name": registry.mixture_name, "champion": champion.version if champion else None,
            "releases": [_facts(each, champion, served) for each in reversed(registry.versions())]}


def _facts(version: MixtureVersion, champion: MixtureVersion | None, served: Sequence[Entry]) -> dict[str, Any]:
    gate = version.gate
    return {"version": version.version, "digest": version.digest, "created": _time(version.created_at),
            "state": _state(version, champion, served), "domains": sorted(version.experts),
            "gate": gate and {key: gate.get(key) for key in ("promote", "reason", "against")}}


def _state(version: MixtureVersion, champion: MixtureVersion | None, served: Sequence[Entry]) -> str:
    """The state of a release in words: champion, was champion, not gated, waiting, or what the gate said.

    `waiting` = the gate passed it, but it was not promoted.
    """
    if champion is not None and champion.version == version.version:
        return "champion"
    if any(entry.version == version.version for entry in served):
        return "was champion"
    if version.gate is None:
        return "not gated"
    verdict = verdict_of(version.gate)
    return "waiting" if verdict == "pass" else verdict


def _served(entries: Sequence[Entry]) -> list[Entry]:
    """The changes of champion that took effect."""
    return [entry for entry in entries if entry.effective]


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def shown(workspace: Workspace, config: Config, version: int | str) -> dict[str, Any]:
    """All facts of one release, for `shown_text`: what it pins, its lineage, metrics, gate, and when it was champion.

    `version` is a number, or "champion". Raises RegistryError where there is no such release.
    """
    registry = Registry(workspace, config)
    release, history = registry.get(version), registry.history()
    return {**_facts(release, registry.champion(), _served(history)), "name": release.name,
            "base": {"digest": release.tags.get("moa.base"), "source": release.tags.get("moa.base.source")},
            "router": release.tags.get("moa.router"), "experts": release.experts, "corpora": registry.corpora(release),
            "code": {key.removeprefix("moa."): value for key, value in sorted(release.tags.items())
                     if key.startswith(("moa.git.", "moa.dvc."))},
            "run": release.run_id, "metrics": registry.metrics(release), "gate": release.gate,
            "champion": [asdict(entry) for entry in _served(history) if entry.version == release.version]}


def history(workspace: Workspace, config: Config) -> dict[str, Any]:
    """Every change of champion, oldest first, under `history`. For `history_text`."""
    registry = Registry(workspace, config)
    if not registry.exists():
        return {"name": Names.of(config).mixture, "history": []}
    return {"name": registry.mixture_name, "history": [asdict(entry) for entry in registry.history()]}


def diff(workspace: Workspace, config: Config, old: int, new: int) -> dict[str, Any]:
    """The differences of two releases, for `diff_text`: experts, router, base, corpora, parameters, metrics, gates, and
    the known prompts that changed hands (`moa.reports.changed_hands`).

    Parts are compared by digest. Raises RegistryError where one of the versions does not exist.
    """
    registry = Registry(workspace, config)
    old_release, new_release = registry.get(old), registry.get(new)
    # `expert.DOMAIN` parameters are left out: `experts` lists the experts' versions.
    params = [{key: value for key, value in registry.params(release).items() if not key.startswith("expert.")}
              for release in (old_release, new_release)]
    return {"old": old_release.version, "new": new_release.version,
            "experts": {domain: _pins(old_release.experts.get(domain), new_release.experts.get(domain))
                        for domain in sorted(old_release.experts.keys() | new_release.experts.keys())},
            "router": _router(old_release, new_release, _changed(*params)),
            "base": _pair(old_release.tags.get("moa.base"), new_release.tags.get("moa.base")),
            "corpora": _changed(*({domain: tags.get("moa.digest") for domain, tags in registry.corpora(release).items()}
                                  for release in (old_release, new_release))),
            "parameters": _changed(*params),
            "metrics": _changed(registry.metrics(old_release), registry.metrics(new_release)),
            "gate": {"old": old_release.gate, "new": new_release.gate},
            "changed_hands": changed_hands.of_releases(workspace, config, old_release.version, new_release.version)}


def _pins(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> dict[str, Any]:
    """How the pin of one domain's expert changed between two releases."""
    change = ("added" if old is None else "removed" if new is None
              else "same" if old["digest"] == new["digest"] else "changed")
    return {"change": change, "old": old, "new": new}


def _pair(old: Any, new: Any) -> dict[str, Any]:
    """Two values, and whether they are the same."""
    return {"change": "same" if old == new else "changed", "old": old, "new": new}


def _router(old: MixtureVersion, new: MixtureVersion, params: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the router changed: its digest covers the heads' tensors; its labels and thresholds are parameters."""
    pair = _pair(old.tags.get("moa.router"), new.tags.get("moa.router"))
    return pair | ({"change": "changed"} if any(key == "labels" or key.startswith("router.") for key in params) else {})


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Old and new value of every key whose values differ; None for a key that one side lacks."""
    return {key: {"old": old.get(key), "new": new.get(key)} for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)}


# Text.

def listed_text(facts: Mapping[str, Any]) -> str:
    """The output of `moa release list`: a table of all releases."""
    if not facts["releases"]:
        return NOTHING_RELEASED
    lines = [("version", "created", "state", "gate")]
    for release in facts["releases"]:
        gate = release["gate"]
        against = f"against {gate['against']}: " if gate and gate["against"] else ""
        lines.append((str(release["version"]), release["created"], release["state"],
                      f"{against}{shorten(gate['reason'], 100) if gate else '-'}"))
    return table(lines, right=[0])


def shown_text(facts: Mapping[str, Any]) -> str:
    """The output of `moa release show`: all facts of one release."""
    about = [("created", facts["created"]), ("digest", facts["digest"]),
             ("base", f"{facts['base']['source']} ({_cut(facts['base']['digest'])})"),
             ("router", _cut(facts["router"])), ("run", f"{facts['run']}"),
             *((key, f"{value}") for key, value in facts["code"].items() if key.startswith("git."))]
    experts = [("expert", "version", "digest", "corpus"), *(
        (domain, f"{pin['version']}", _cut(pin["digest"]), _cut(facts["corpora"].get(domain, {}).get("moa.digest")))
        for domain, pin in facts["experts"].items())]
    lines = [f"{facts['name']} version {facts['version']}: {facts['state']}", "", indented_table(about), "",
             indented_table(experts, right=[1])]
    if facts["champion"]:
        lines += ["", *(f"  champion since {entry['at']} by {entry['by']}: {entry['reason']}"
                        for entry in facts["champion"])]
    if facts["gate"]:
        lines += ["", gate_text(facts["gate"])]
    return "\n".join(lines)


def history_text(facts: Mapping[str, Any]) -> str:
    """The output of `moa release history`: a table of the changes of champion."""
    if not facts["history"]:
        return NOTHING_RELEASED
    lines = [("n", "at", "version", "instead of", "by", "reason")]
    for entry in facts["history"]:
        undone = "" if entry["effective"] else "  (interrupted: the alias did not move)"
        lines.append((str(entry["n"]), entry["at"], str(entry["version"]), str(entry["previous"] or "-"), entry["by"],
                      f"{entry['reason']}{undone}"))
    return table(lines, right=[0, 2, 3])


def diff_text(facts: Mapping[str, Any]) -> str:
    """The output of `moa release diff`: what differs between two releases."""
    parts = []
    for domain, pin in facts["experts"].items():
        sides = [f"{_cut(side['digest'])} (version {side['version']})" if side else "none"
                 for side in (pin["old"], pin["new"])]
        parts.append((domain, pin["change"], _arrow(pin["change"], *sides)))
    for part in ("router", "base"):
        pair = facts[part]
        parts.append((part, pair["change"], _arrow(pair["change"], _cut(pair["old"]), _cut(pair["new"]))))
    lines = [f"version {facts['old']} -> {facts['new']}", "", indented_table(parts)]
    for title in ("corpora", "parameters", "metrics"):
        if changed := facts[title]:
            lines += ["", title, indented_table([(key, f"{_value(pair['old'])} -> {_value(pair['new'])}")
                                                 for key, pair in changed.items()])]
    if moved := changed_hands.text(facts["changed_hands"]):
        lines += ["", moved]
    for side in ("old", "new"):
        if decision := facts["gate"][side]:
            lines += ["", gate_text(decision)]
    return "\n".join(lines)


def gate_text(decision: Mapping[str, Any]) -> str:
    """A decision of the gate as text: a line for each domain and measure, then routing, then the reason."""
    against = decision.get("against")
    lines = [f"gate: version {decision['version']} against {f'version {against}' if against else 'no incumbent'}: "
             f"{verdict_of(decision)}"]
    if domains := decision.get("domains"):
        cells: list[tuple[str, ...]] = [("domain", "measure", "verdict", "difference", "interval", "rows", "")]
        for domain, verdict in domains.items():
            known = verdict.get("known") or {}   # the same on the rows that the incumbent was tested on
            measures = [("loss", verdict.get("loss", verdict)), ("loss, known", known.get("loss")),
                        ("metric", verdict.get("metric")), ("metric, known", known.get("metric")),
                        ("loss, best", verdict.get("anchor"))]
            cells += [(domain, *_measure(name, each)) for name, each in measures if each]
        lines.append(indented_table(cells, right=[3, 4, 5]))
    if (before := decision.get("routing", {}).get("incumbent")) and (after := decision["routing"].get("challenger")):
        lines.append(f"  routing accuracy {before['accuracy']:.1%} -> {after['accuracy']:.1%}, "
                     f"abstention {before['abstention']:.1%} -> {after['abstention']:.1%}")
    if looks := wear(decision):
        lines.append(f"  {looks}")
    return "\n".join([*lines, f"  {decision['reason']}"])


def _measure(name: str, comparison: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of one comparison of the gate."""
    measured = comparison["interval"] is not None
    point = f"{comparison['point']:+.4f}" if measured else "-"
    interval = f"{comparison['interval'][0]:+.4f} to {comparison['interval'][1]:+.4f}" if measured else "-"
    remark = ("better" if comparison["improved"] else
              comparison["reason"] if comparison["verdict"] == "not enough data" else "")
    return name, comparison["verdict"], point, interval, f"{comparison['rows']}", remark


def _arrow(change: str, old: str, new: str) -> str:
    """`old -> new`, or one of them where they are the same."""
    return old if change == "same" else f"{old} -> {new}"


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.4f}" if isinstance(value, float) else _cut(str(value)) if len(str(value)) == 64 else str(value)


def _cut(digest: str | None) -> str:
    """The beginning of a digest; "-" for None."""
    return digest[:SHORT_DIGEST] if digest else "-"
