"""The lineage that a registered version records: git commit, dirty flag, `dvc.lock`, and measured metrics."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moa.core import digests, git
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace

Point = tuple[str, float, int]   # metric, value, step


def of_workspace(workspace: Workspace) -> dict[str, str]:
    """Tags that pin a version's code and data: `moa.git.commit`, `moa.git.dirty` and `moa.dvc.lock`.

    A tag is absent where its source does not exist (no commit, no dvc.lock). Where git refuses to read the repository,
    `moa.git.refused` holds its reason.
    """
    tags = _git(workspace.root)
    lock = workspace.root / "dvc.lock"
    if lock.is_file():
        tags["moa.dvc.lock"] = digests.of_file(lock)
    return tags


def dvc_outputs(workspace: Workspace) -> dict[str, str]:
    """DVC's MD5 of every output that dvc.lock records, by path; a directory's MD5 ends in `.dir`."""
    from ruamel.yaml import YAML

    lock = workspace.root / "dvc.lock"
    if not lock.is_file():
        return {}
    recorded: dict[str, Any] = YAML(typ="safe").load(lock.read_text(encoding="utf-8")) or {}
    return {out["path"]: out["md5"] for stage in recorded.get("stages", {}).values()
            for out in stage.get("outs", []) if "md5" in out}


def dvc_corpora(workspace: Workspace, wanted: Mapping[str, str]) -> dict[str, str]:
    """DVC's MD5, by domain, of the corpora whose digests are `wanted` (by domain).

    A domain is left out when its corpus has another digest now: its expert learned from an older corpus than the one
    that dvc.lock records.
    """
    outputs, md5s = dvc_outputs(workspace), {}
    for domain, digest in wanted.items():
        folder = workspace.corpus(domain)
        path, manifest = workspace.relative(folder), folder / MANIFEST
        if path in outputs and manifest.is_file() and read_json(manifest)["digest"] == digest:
            md5s[domain] = outputs[path]
    return md5s


def learning_curve_metrics(epochs: Iterable[Mapping[str, float]]) -> Iterator[Point]:
    """The points of a learning curve, as MLflow metrics whose step is the optimizer step."""
    for epoch in epochs:
        for key, value in epoch.items():
            if key != "step" and value is not None:
                yield key, float(value), int(epoch["step"])


def evaluation_metrics(summary: Path) -> Iterator[Point]:
    """The metrics in an evaluation's summary.json, such as `math/routed/loss`; none where the file does not exist."""
    if not summary.is_file():
        return
    content = read_json(summary)
    for domain, systems in content.get("domains", {}).items():
        for system, values in systems.items():
            if isinstance(values, dict):
                for key, value in values.items():
                    if isinstance(value, int | float) and math.isfinite(value):
                        yield f"{domain}/{system}/{key}", float(value), 0
    for key, value in content.get("routing", {}).items():
        if isinstance(value, int | float) and math.isfinite(value):
            yield f"routing/{key}", float(value), 0


def _git(root: Path) -> dict[str, str]:
    try:
        if not git.has_commits(root):
            return {}   # no repository, or one without a commit
        commit = git.run(root, "rev-parse", "HEAD").strip()
        # dvc.lock differs after every build and has a digest of its own: it does not make a commit dirty.
        changes = git.run(root, "status", "--porcelain", "--", ".", ":(exclude)dvc.lock")
    except git.GitError as error:
        return {"moa.git.refused": str(error)}
    return {"moa.git.commit": commit, "moa.git.dirty": "true" if changes else "false"}
