"""What the stages know of the champion, in data/champion: its calibration, and its loss on every test row.

    manifest.json          of the champion's mixture: base, prompt, experts and corpora by digest, the router's scalars
    router.safetensors     the router's tensors
    rows.parquet           the rows of the evaluation that it was registered with (`moa.evaluation.evaluate.Scored`)

The flow writes the folder when a release becomes champion. Stages read it and ask no server. Stage `assemble` extends
the calibration in it (`moa.mixture.calibration.successor`); .moa/calibration.json names the calibration that the
present inputs extend, where DVC reads it as a parameter of the stage.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa.base.pin import BasePin
from moa.core.config import AssembleParams, Config
from moa.core.files import read_json, replace_directory, write_json_if_changed
from moa.core.paths import MANIFEST, Workspace
from moa.mixture.artifact import ROUTER, artifact_errors

if TYPE_CHECKING:
    from moa.mixture.router import Router

ROWS = "rows.parquet"
AFRESH = "afresh"   # in place of a digest: the calibration extends none, because someone asked for that
CALIBRATED_BY = ("rule", "tolerance", "rows", "joint_epochs")   # fields of `assemble` that a calibration depends on


def write(workspace: Workspace, mixture: Path) -> bool:
    """Write data/champion from a release's mixture folder; its `reports` lie beside it. Returns whether it changed."""
    manifest = read_json(mixture / MANIFEST)
    if _manifest(workspace).get("digest") == manifest["digest"]:
        return False
    with replace_directory(workspace.champion) as folder:
        shutil.copyfile(mixture / ROUTER, folder / ROUTER)
        if (rows := mixture.parent / "reports" / ROWS).is_file():
            shutil.copyfile(rows, folder / ROWS)
        shutil.copyfile(mixture / MANIFEST, folder / MANIFEST)
    return True


def settings(params: AssembleParams) -> dict[str, Any]:
    """What a calibration records of `assemble`: the fields that it depends on, and `max_abstention`."""
    return {name: getattr(params, name) for name in (*CALIBRATED_BY, "max_abstention")}


# Which calibration the present inputs extend.

def write_extended(workspace: Workspace, config: Config) -> None:
    """Bring .moa/calibration.json up to date."""
    write_json_if_changed(workspace.calibration, {"extends": _extended(workspace, config)})


def recalibrate(workspace: Workspace, wanted: bool) -> None:
    """Make the coming run of `assemble` extend no calibration, or take that back."""
    marker = workspace.local / "recalibrate"
    if wanted:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    else:
        marker.unlink(missing_ok=True)


def extended(workspace: Workspace) -> str | None:
    """What .moa/calibration.json says: the digest of the mixture that is extended, `AFRESH`, or None without one."""
    with suppress(FileNotFoundError):
        found: str | None = read_json(workspace.calibration)["extends"]
        return found
    return _manifest(workspace).get("digest")


def _extended(workspace: Workspace, config: Config) -> str | None:
    """The champion's mixture; where the champion is made of the present inputs, what the champion itself extended."""
    if (workspace.local / "recalibrate").exists():
        return AFRESH
    champion = _manifest(workspace)
    if not champion:
        return None
    router = champion["router"]
    same = (_experts(workspace, config) == {label: (entry.get("parent", entry["digest"]), entry.get("corpus"))
                                            for label, entry in champion["experts"].items()}
            and champion["prompt"] == config.prompt.model_dump()
            and router.get("settings") == settings(config.assemble))
    return router.get("extends") if same else champion["digest"]


def _experts(workspace: Workspace, config: Config) -> dict[str, tuple[str | None, str | None]]:
    """Digest and corpus of the expert of each domain of params.yaml; None where there is none."""
    found: dict[str, tuple[str | None, str | None]] = {}
    for domain in config.domains:
        try:
            manifest = read_json(workspace.expert(domain) / MANIFEST)
            found[domain] = manifest["digest"], manifest["corpus"]
        except (OSError, ValueError, KeyError):
            found[domain] = None, None
    return found


def _manifest(workspace: Workspace) -> Mapping[str, Any]:
    """The champion's manifest; empty without a readable one."""
    try:
        manifest: Mapping[str, Any] = read_json(workspace.champion / MANIFEST)
        return manifest if {"digest", "router", "experts", "prompt", "base", "labels"} <= manifest.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


# What it is made of.

def calibration(workspace: Workspace, config: Config, pin: BasePin) -> tuple["Router | None", str]:
    """The champion's router, if a successor made with this base and configuration can extend it.

    Returns:
        The router, or None; and why it cannot be extended, as a clause that is empty where it can, or where there is
        nothing to extend.

    Raises:
        ArtifactError: data/champion cannot be read.
    """
    if extended(workspace) in (None, AFRESH) or not (champion := _manifest(workspace)):
        return None, ""
    router = champion["router"]
    kept = router.get("settings") or {}
    now = settings(config.assemble)
    if changed := [name for name in CALIBRATED_BY if kept.get(name) != now[name]]:
        return None, f"assemble.{changed[0]} is now {json.dumps(now[changed[0]])}"
    if config.assemble.joint_epochs or router["stream"] != "base":
        return None, "experts that are trained jointly have a router of their own"
    if any(champion["base"].get(part) != getattr(pin, part) for part in ("weights", "tokenizer", "template")):
        return None, "the base is another one"
    if champion["prompt"] != config.prompt.model_dump():
        return None, "the prompt's parameters changed"
    from safetensors.torch import load_file

    from moa.mixture.router import Router

    tensors: Mapping[str, Any] = {}
    with artifact_errors("The champion's calibration in data/champion"):
        tensors = load_file(workspace.champion / ROUTER)
    return Router.restore(champion["labels"], tensors, router), ""


def rows(workspace: Workspace) -> list[dict[str, Any]]:
    """The champion's rows of its evaluation: the fields of `Scored`; empty where it recorded none."""
    import pyarrow.parquet as pq

    path = workspace.champion / ROWS
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found
