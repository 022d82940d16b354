"""Gathers the facts of the report page from manifests, reports and the registry, as JSON values. Writes nothing.

What does not exist yet is left out, so the report also works in a workspace that was only prepared.
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
from moa.evaluation import promises, routing
from moa.evaluation.statistics import group_means, interval, resampled
from moa.reports import changed_hands

SYSTEMS = ("base", "forced", "routed")
RESAMPLES = 2_000   # of the bootstrap
TAIL = 0.025        # share of samples outside each end of a 95 % interval
Row = Mapping[str, Any]


def gather(workspace: Workspace, config: Config) -> dict[str, Any]:
    """Gather everything that `moa.reports.page` shows, as JSON values.

    `registry_trouble` is the error of a registry that cannot be read, or None.
    """
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
        "changed_hands": changed_hands.since_champion(workspace),
        "promises": _promises(workspace, config, mixture.get("router", {})),
        "domains": {name: _domain(workspace, name) for name in config.domains},
        "mixture": {"digest": mixture.get("digest"), "labels": mixture.get("labels", []),
                    "experts": {label: _digest(pin) for label, pin in mixture.get("experts", {}).items()},
                    "parents": {label: pin["parent"] for label, pin in mixture.get("experts", {}).items()
                                if isinstance(pin, Mapping) and pin.get("parent")},
                    "router": mixture.get("router", {})}}


def _released(workspace: Workspace, config: Config, digest: str | None) -> tuple[
        dict[str, Any] | None, dict[str, Any], str | None]:
    """The champion with its evaluation; version and gate of the release with this `digest`; the registry's error.

    Each is None, or empty, where it does not exist.
    """
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
    except (RegistryError, ArtifactError) as error:   # the server does not answer, or a file was altered
        return None, {}, str(error)
    manifest = _json(folder / MANIFEST)
    return {"name": version.name, "version": version.version, "digest": version.digest, "gate": version.gate,
            "since": last.at if last else None, "reason": last.reason if last else None,
            "experts": {domain: pin["digest"] for domain, pin in version.experts.items()},
            "router": manifest.get("router", {}), **(evaluation(folder.parent / "reports") or {})}, own, None


def _promises(workspace: Workspace, config: Config, router: Mapping[str, Any]) -> list[str]:
    """What the mixture's router promises about abstention, in words; without a router, what the corpora will allow."""
    if router:
        return promises.recorded(router.get("promises"))
    corpora = {name: _json(workspace.corpus(name) / MANIFEST) for name in config.domains}
    return promises.expected(corpora, config.assemble) if any(corpora.values()) else []


def _domain(workspace: Workspace, name: str) -> dict[str, Any]:
    """The facts of one domain: its corpus, its quality and its expert, each None where it does not exist."""
    corpus, expert = _json(workspace.corpus(name) / MANIFEST), _json(workspace.expert(name) / MANIFEST)
    quality = _json(workspace.corpus(name) / "quality.json")
    return {"corpus": {"digest": corpus["digest"], "rows": corpus.get("rows", {})} if "digest" in corpus else None,
            "quality": {"rows": quality.get("rows", {}), "warnings": quality.get("warnings", [])} if quality else None,
            "expert": {"digest": expert["digest"], "corpus": expert.get("corpus"), "rank": expert.get("rank"),
                       "imported": expert.get("source") == "imported", "best_epoch": expert.get("best_epoch"),
                       "best_loss": expert.get("best_loss"), "parent": _parent(expert),
                       "curve": expert.get("curve", [])} if "digest" in expert else None}


def _parent(expert: Mapping[str, Any]) -> dict[str, str] | None:
    """Domain and digest of the expert at which an expert's training began; None for a new one."""
    if not (parent := expert.get("parent")):
        return None
    return {"domain": str(parent.get("domain", "")) if isinstance(parent, Mapping) else "", "digest": _digest(parent)}


def _base(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    if "digest" not in manifest:
        return None
    return {key: manifest.get(key) for key in ("source", "digest", "architecture", "parameters")}


# Scores.

def evaluation(reports: Path) -> dict[str, Any] | None:
    """Read one evaluation: figures with intervals, routing tax, and routing; None where `reports` holds none.

    Evaluations used to record neither `by_domain` nor `reliability`: both are computed from their rows.

    Args:
        reports: a folder with `summary.json` and `rows.parquet`, as stage `evaluate` writes them.
    """
    summary = _json(reports / "summary.json")
    if "domains" not in summary:
        return None
    by_domain: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    rows = _rows(reports / "rows.parquet")
    for row in rows:
        by_domain[row["domain"]][row["system"]].append(row)
    return {"scores": {domain: {system: _figures(systems[system], by_domain[domain][system])
                                for system in SYSTEMS if system in systems}
                       for domain, systems in summary["domains"].items()},
            "tax": {domain: tax(systems["forced"], systems["routed"]) for domain, systems in by_domain.items()
                    if systems["forced"] and systems["routed"]},
            "routing": {**_routing(rows), **summary.get("routing", {})}}


def _routing(rows: Sequence[Row]) -> dict[str, Any]:
    """Abstention by domain and reliability; empty for rows without the router's decisions."""
    if not rows or not {"routed_to", "confidence", "abstained"} <= rows[0].keys():
        return {}
    return {"by_domain": routing.abstentions(rows), "reliability": routing.reliability(rows)}


def _rows(path: Path) -> list[Row]:
    """The rows of an evaluation's rows.parquet, one for each test row and system."""
    if not path.is_file():
        return []
    import pyarrow.parquet as pq

    rows: list[Row] = pq.read_table(path).select(
        [name for name in ("domain", "row", "system", "loss", "tokens", "score", "group", "routed_to", "confidence",
                             "abstained")
         if name in pq.read_schema(path).names]).to_pylist()
    return rows


def _figures(summary: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of one domain under one system.

    `loss` is a mean over tokens, so the bootstrap of its interval weights rows by their tokens.
    """
    answered = [row for row in rows if row["score"] is not None]
    return {"loss": summary.get("loss"), "score": summary.get("score"), "rows": summary.get("rows"),
            "answered": summary.get("answered"),
            "loss_interval": weighted_interval([(row["loss"], row["tokens"]) for row in rows], _groups(rows)),
            "score_interval": score_interval([row["score"] for row in answered], _groups(answered))}


def _groups(rows: Sequence[Row]) -> list[str]:
    """Each row's group; the row's own id where none was recorded."""
    return [row.get("group") or row["row"] for row in rows]


def tax(forced: Sequence[Row], routed: Sequence[Row]) -> dict[str, Any]:
    """Compute the routing tax, what routing costs against the true label, from pairs of rows under both systems.

    Args:
        forced: rows of one domain, answered by the domain's own expert.
        routed: the same rows, answered by the router's choice.

    Returns:
        `loss` is routed minus forced in nats per token, `score` forced minus routed, each with its interval: positive
        values are a cost of routing. `rows` and `answered` count the pairs.
    """
    routed_by_id = {row["row"]: row for row in routed}
    pairs = [(row, routed_by_id[row["row"]]) for row in forced if row["row"] in routed_by_id]
    losses = [(by_router["loss"] - by_label["loss"], by_label["tokens"]) for by_label, by_router in pairs]
    answered = [(by_label, by_router) for by_label, by_router in pairs
                if by_label["score"] is not None and by_router["score"] is not None]
    scores = [(by_label["score"] - by_router["score"], 1.0) for by_label, by_router in answered]
    groups, answered_groups = (_groups([by_label for by_label, _ in part]) for part in (pairs, answered))
    return {"loss": _mean(losses), "loss_interval": weighted_interval(losses, groups),
            "score": _mean(scores), "score_interval": weighted_interval(scores, answered_groups),
            "rows": len(pairs), "answered": len(scores)}


def _mean(pairs: Sequence[tuple[float, float]]) -> float | None:
    """The weighted mean of (value, weight) pairs; None where the weights sum to zero."""
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None


def weighted_interval(pairs: Sequence[tuple[float, float]], groups: Sequence[str]) -> tuple[float, float] | None:
    """95 % bootstrap interval of a weighted mean, computed as the gate computes its intervals.

    A bootstrap sample draws groups of rows together with their weights.

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
    return interval(values, *resampled(values, RESAMPLES, 0, weights), TAIL, weights)


def score_interval(scores: Sequence[float], groups: Sequence[str]) -> tuple[float, float] | None:
    """95 % interval of a mean score: Wilson's where groups are right (1) or wrong (0), else the bootstrap.

    No bootstrap knows that 0 of 16 leaves room for a right answer, and Wilson's interval does (Wilson 1927, "Probable
    Inference, the Law of Succession, and Statistical Inference"). It counts groups, and so is used where each has one
    row, or where all rows have the same score.

    Args:
        scores: score of each row, from 0 to 1.
        groups: each row's group; rows of one depend on each other.

    Returns:
        None for fewer than two groups, or scores that are not finite.
    """
    right = len({group for group, score in zip(groups, scores, strict=True) if score == 1})
    count = len(set(groups))
    if count < 2 or not set(scores) <= {0, 1} or (len(set(scores)) > 1 and count < len(scores)):
        return weighted_interval([(score, 1.0) for score in scores], groups)
    from scipy.stats import binomtest  # takes long to import, and most commands need none of this

    bounds = binomtest(right, count).proportion_ci(1 - 2 * TAIL, method="wilson")
    return float(bounds.low), float(bounds.high)


def verdicts(decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The gate's comparisons in a decision, one for each domain and measure; empty for a release without an incumbent.

    Known rows are those that the incumbent was tested on, too. They have comparisons of their own in domains that also
    have other rows. The best champion so far has a comparison where it is not the incumbent.
    """
    lines = []
    for domain, verdict in decision.get("domains", {}).items():
        known = verdict.get("known") or {}
        for measure, comparison in (("loss", verdict.get("loss", verdict)), ("metric", verdict.get("metric")),
                                    ("loss, known rows", known.get("loss")),
                                    ("metric, known rows", known.get("metric")),
                                    ("loss, best champion", verdict.get("anchor"))):
            if comparison:
                lines.append({"domain": domain, "measure": measure, "verdict": comparison["verdict"],
                              "difference": comparison.get("point"), "interval": comparison.get("interval"),
                              "rows": comparison.get("rows"), "better": bool(comparison.get("improved")),
                              "reason": comparison.get("reason", "")})
    return lines


def wear(decision: Mapping[str, Any]) -> str:
    """How often a decision's test rows were looked at, in words; empty where this was the first time for all."""
    looks = {domain: verdict["look"] for domain, verdict in (decision.get("domains") or {}).items()
             if verdict.get("look", 1) > 1}
    if not looks:
        return ""
    return ("looks at these test rows, this one included: "
            f"{', '.join(f'{domain} {look}' for domain, look in looks.items())}; each makes the intervals wider, and "
            "new rows of a domain refresh them")


# Reading.

def _digest(pin: Any) -> str:
    """The digest of a manifest's pin, which is a digest or a mapping with one."""
    return str(pin.get("digest", "")) if isinstance(pin, Mapping) else str(pin)


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where the file is missing or holds none."""
    with suppress(OSError, ValueError):
        content = read_json(path)
        if isinstance(content, dict):
            return content
    return {}
