"""What the report page shows, gathered from manifests, reports and the registry into plain data. Writes nothing.

What does not exist yet is left out, so a workspace that was only prepared has a report, too.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from moa.core.config import Config
from moa.core.errors import ArtifactError, RegistryError
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.evaluation.statistics import group_means, interval, resampled

SYSTEMS = ("base", "forced", "routed")
RESAMPLES = 2_000   # of a bootstrap
TAIL = 0.025        # outside each end of a 95 % interval
Row = Mapping[str, Any]


def gather(workspace: Workspace, config: Config) -> dict[str, Any]:
    """Everything that `moa.reports.page` shows, as JSON values; an unreachable registry is `registry_trouble`."""
    mixture = _json(workspace.mixture / MANIFEST)
    release, own, trouble = _released(workspace, config, mixture.get("digest"))
    here = evaluation(workspace.reports)
    # Where the mixture of the workspace is the champion itself, it is shown once.
    challenger = here if here and mixture.get("digest") != (release or {}).get("digest") else None
    return {
        "name": workspace.root.name, "made_at": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "base": _base(_json(workspace.base_manifest)), "registry_trouble": trouble,
        "champion": release,
        "challenger": {"digest": mixture.get("digest"), **own, **challenger} if challenger else None,
        "domains": {name: _domain(workspace, name) for name in config.domains},
        "mixture": {"digest": mixture.get("digest"), "labels": mixture.get("labels", []),
                    "experts": {label: _digest(pin) for label, pin in mixture.get("experts", {}).items()},
                    "parents": {label: pin["parent"] for label, pin in mixture.get("experts", {}).items()
                                if isinstance(pin, Mapping) and pin.get("parent")},
                    "router": mixture.get("router", {})}}


def _released(workspace: Workspace, config: Config, digest: str | None) -> tuple[
        dict[str, Any] | None, dict[str, Any], str | None]:
    """The champion with its report; version and gate of the mixture with this `digest`; the error of the registry."""
    from moa.release.registry import Registry

    registry = Registry(workspace, config)
    if not registry.exists():
        return None, {}, None
    try:
        here = next((each for each in registry.versions() if each.digest == digest), None)
        own = {"version": here.version, "gate": here.gate} if here else {}
        if (version := registry.champion()) is None:
            return None, own, None
        folder = registry.download(version.version)
        last = next((entry for entry in reversed(registry.history()) if entry.version == version.version), None)
    except (RegistryError, ArtifactError) as error:   # a server that does not answer, or an altered artifact
        return None, {}, str(error)
    manifest = _json(folder / MANIFEST)
    return {"name": version.name, "version": version.version, "digest": version.digest, "gate": version.gate,
            "since": last.at if last else None, "reason": last.reason if last else None,
            "experts": {domain: pin["digest"] for domain, pin in version.experts.items()},
            "router": manifest.get("router", {}), **(evaluation(folder.parent / "reports") or {})}, own, None


def _domain(workspace: Workspace, name: str) -> dict[str, Any]:
    corpus, expert = _json(workspace.corpus(name) / MANIFEST), _json(workspace.expert(name) / MANIFEST)
    quality = _json(workspace.corpus(name) / "quality.json")
    return {"corpus": {"digest": corpus["digest"], "rows": corpus.get("rows", {})} if "digest" in corpus else None,
            "quality": {"rows": quality.get("rows", {}), "warnings": quality.get("warnings", [])} if quality else None,
            "expert": {"digest": expert["digest"], "corpus": expert.get("corpus"), "rank": expert.get("rank"),
                       "imported": expert.get("source") == "imported", "best_epoch": expert.get("best_epoch"),
                       "best_loss": expert.get("best_loss"), "parent": _parent(expert),
                       "curve": expert.get("curve", [])} if "digest" in expert else None}


def _parent(expert: Mapping[str, Any]) -> dict[str, str] | None:
    """Domain and digest of the expert that this one's training started from."""
    if not (parent := expert.get("parent")):
        return None
    return {"domain": str(parent.get("domain", "")) if isinstance(parent, Mapping) else "", "digest": _digest(parent)}


def _base(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    if "digest" not in manifest:
        return None
    return {key: manifest.get(key) for key in ("source", "digest", "architecture", "parameters")}


# Scores.

def evaluation(reports: Path) -> dict[str, Any] | None:
    """Figures with intervals, routing tax and confusion of one evaluation; None where `reports` holds none.

    Args:
        reports: a folder with `summary.json` and `rows.parquet`, as stage `evaluate` writes them.
    """
    summary = _json(reports / "summary.json")
    if "domains" not in summary:
        return None
    by_domain: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in _rows(reports / "rows.parquet"):
        by_domain[row["domain"]][row["system"]].append(row)
    return {"scores": {domain: {system: _figures(systems[system], by_domain[domain][system])
                                for system in SYSTEMS if system in systems}
                       for domain, systems in summary["domains"].items()},
            "tax": {domain: tax(systems["forced"], systems["routed"]) for domain, systems in by_domain.items()
                    if systems["forced"] and systems["routed"]},
            "routing": summary.get("routing", {})}


def _rows(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    import pyarrow.parquet as pq

    rows: list[Row] = pq.read_table(path).select(
        [name for name in ("domain", "row", "system", "loss", "tokens", "score", "group")
         if name in pq.read_schema(path).names]).to_pylist()
    return rows


def _figures(summary: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Figures of one domain under one system. `loss` is per token, so its interval weighs rows by their tokens."""
    answered = [row for row in rows if row["score"] is not None]
    return {"loss": summary.get("loss"), "score": summary.get("score"), "rows": summary.get("rows"),
            "answered": summary.get("answered"),
            "loss_interval": weighted_interval([(row["loss"], row["tokens"]) for row in rows], _groups(rows)),
            "score_interval": weighted_interval([(row["score"], 1.0) for row in answered], _groups(answered))}


def _groups(rows: Sequence[Row]) -> list[str]:
    """Each row's group; the row's own id where none was recorded."""
    return [row.get("group") or row["row"] for row in rows]


def tax(forced: Sequence[Row], routed: Sequence[Row]) -> dict[str, Any]:
    """What routing costs against the true label, from the pairs of rows under both systems.

    Args:
        forced: rows of one domain, answered by the domain's own expert.
        routed: the same rows, answered by the router's choice.

    Returns:
        `loss` is routed minus forced in nats per token, `score` forced minus routed, each with its interval: positive
        values are a cost of routing. `rows` and `answered` count the pairs.
    """
    others = {row["row"]: row for row in routed}
    pairs = [(row, others[row["row"]]) for row in forced if row["row"] in others]
    losses = [(mine["loss"] - own["loss"], own["tokens"]) for own, mine in pairs]
    scored = [(own, mine) for own, mine in pairs if own["score"] is not None and mine["score"] is not None]
    scores = [(own["score"] - mine["score"], 1.0) for own, mine in scored]
    groups, scored_groups = (_groups([own for own, _ in some]) for some in (pairs, scored))
    return {"loss": _mean(losses), "loss_interval": weighted_interval(losses, groups),
            "score": _mean(scores), "score_interval": weighted_interval(scores, scored_groups),
            "rows": len(pairs), "answered": len(scores)}


def _mean(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Mean of (value, weight); None without any weight."""
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None


def weighted_interval(pairs: Sequence[tuple[float, float]], groups: Sequence[str]) -> tuple[float, float] | None:
    """95 % bootstrap interval of a weighted mean, as the gate computes its own: a sample draws groups of rows.

    Args:
        pairs: (value, weight) of each row.
        groups: each row's group; rows of one depend on each other.

    Returns:
        None for fewer than two groups, or values that are not finite.
    """
    if len(set(groups)) < 2 or not all(math.isfinite(value) for value, _ in pairs):
        return None
    values, weights = group_means(np.array([value for value, _ in pairs], float), groups,
                                  np.array([weight for _, weight in pairs], float))
    return interval(values, *resampled(values, RESAMPLES, [0], weights), TAIL, weights)


def verdicts(decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the gate compared, a line for each domain and measure; empty for a release that had no incumbent.

    Known rows are those that the incumbent was tested on; they have lines of their own where a domain has others, too.
    The best champion so far has a line where it is not the incumbent.
    """
    lines = []
    for domain, verdict in decision.get("domains", {}).items():
        known = verdict.get("known") or {}
        for measure, each in (("loss", verdict.get("loss", verdict)), ("metric", verdict.get("metric")),
                              ("loss, known rows", known.get("loss")), ("metric, known rows", known.get("metric")),
                              ("loss, best champion", verdict.get("anchor"))):
            if each:
                lines.append({"domain": domain, "measure": measure, "verdict": each["verdict"],
                              "difference": each.get("point"), "interval": each.get("interval"),
                              "rows": each.get("rows"), "better": bool(each.get("improved")),
                              "reason": each.get("reason", "")})
    return lines


# Reading.

def _digest(pin: Any) -> str:
    return str(pin.get("digest", "")) if isinstance(pin, Mapping) else str(pin)


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    with suppress(OSError, ValueError):
        content = read_json(path)
        if isinstance(content, dict):
            return content
    return {}
