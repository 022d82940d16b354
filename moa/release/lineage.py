"""What a version came from: git commit, dirty flag, `dvc.lock`, figures."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moa.core import digests, git
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace

Point = tuple[str, float, int]   # metric, value, step


def of_workspace(workspace: Workspace) -> dict[str, str]:
    """Tags that pin code and data; what does not exist (no repository, nothing built by DVC) has none.

    Where git refuses to read the repository, `moa.git.refused` is its reason.
    """
    tags = _git(workspace.root)
    lock = workspace.root / "dvc.lock"
    if lock.is_file():
        tags["moa.dvc.lock"] = digests.of_file(lock)
    return tags


def dvc_outputs(workspace: Workspace) -> dict[str, str]:
    """MD5 by path of every output `dvc.lock` records; directories end in `.dir`, as DVC writes them."""
    from ruamel.yaml import YAML

    lock = workspace.root / "dvc.lock"
    if not lock.is_file():
        return {}
    recorded: dict[str, Any] = YAML(typ="safe").load(lock.read_text(encoding="utf-8")) or {}
    return {out["path"]: out["md5"] for stage in recorded.get("stages", {}).values()
            for out in stage.get("outs", []) if "md5" in out}


def dvc_corpora(workspace: Workspace, wanted: Mapping[str, str]) -> dict[str, str]:
    """DVC's MD5 by domain, of those corpora whose digest is still the one wanted: an expert may have learned from an
    older corpus than `dvc.lock` records now."""
    outputs, found = dvc_outputs(workspace), {}
    for domain, digest in wanted.items():
        folder = workspace.corpus(domain)
        path, manifest = workspace.relative(folder), folder / MANIFEST
        if path in outputs and manifest.is_file() and read_json(manifest)["digest"] == digest:
            found[domain] = outputs[path]
    return found


def learning_curve_metrics(epochs: Iterable[Mapping[str, float]]) -> Iterator[Point]:
    """A learning curve as metrics; the optimizer step is MLflow's step."""
    for epoch in epochs:
        for key, value in epoch.items():
            if key != "step" and value is not None:
                yield key, float(value), int(epoch["step"])


def evaluation_metrics(summary: Path) -> Iterator[Point]:
    """Metrics `math/routed/loss`, `routing/accuracy` and so on; none where nothing was evaluated."""
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
            return {}   # none, or one without a commit
        commit = git.run(root, "rev-parse", "HEAD").strip()
        # dvc.lock differs after every build and has a digest of its own: it does not make a commit dirty.
        changes = git.run(root, "status", "--porcelain", "--", ".", ":(exclude)dvc.lock")
    except git.GitError as error:
        return {"moa.git.refused": str(error)}
    return {"moa.git.commit": commit, "moa.git.dirty": "true" if changes else "false"}
