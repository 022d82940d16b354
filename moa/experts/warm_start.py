"""Warm starts: trainings whose initial weights are those of another expert, the parent.

    data/starts.json          domain -> {"domain", "digest", "path"} of its parent; other domains start afresh (git)
    data/parents/DIGEST16/    the parent's files; the name is the first 16 digits of its digest (DVC)
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa.base.pin import BasePin
from moa.core import digests
from moa.core.errors import ArtifactError
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace

if TYPE_CHECKING:
    from moa.experts.lora import ExpertStack, LoraSpec

DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class InitialExpert:
    """The parent expert whose weights are the initial weights of a training."""

    domain: str   # of the parent
    digest: str   # of the parent's files


def read(workspace: Workspace) -> dict[str, InitialExpert]:
    """Read data/starts.json: the parent expert of each domain that has one. Raises ArtifactError if it is invalid."""
    name = workspace.relative(workspace.starts)
    try:
        content = read_json(workspace.starts)
        starts = {domain: InitialExpert(entry["domain"], entry["digest"]) for domain, entry in content.items()}
        valid = all(isinstance(start.domain, str) and DIGEST.fullmatch(start.digest) for start in starts.values())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{name} cannot be read ({type(error).__name__}: {error}): take it back from git with "
                            f"`git checkout {name}`, or delete it to train every expert afresh.") from None
    if not valid:
        raise ArtifactError(f"{name} names a parent without a whole digest: take it back from git with "
                            f"`git checkout {name}`, or delete it to train every expert afresh.")
    return starts


def folder(workspace: Workspace, start: InitialExpert) -> Path:
    """Folder of a parent's files. Raises ArtifactError when they are missing or have another digest."""
    parent = workspace.parent(start.digest)
    name = workspace.relative(parent)
    if not (parent / MANIFEST).is_file():
        raise ArtifactError(f"The parent expert ({start.domain}) in {name} is not there: run `dvc checkout "
                            f"{name}.dvc`, or `dvc pull {name}.dvc` where another machine has it.")
    if digests.of_expert(parent) != start.digest:
        raise ArtifactError(f"The parent expert ({start.domain}) in {name} is not the one that data/starts.json names: "
                            f"run `dvc checkout --force {name}.dvc`.")
    return parent


def misfit(expert: Path, stack: "ExpertStack", wanted: "LoraSpec", pin: BasePin) -> str | None:
    """Why a training cannot start from the expert in a folder: a clause for a message, or None when it can.

    Args:
        expert: the parent's folder.
        stack: the stack that is trained; its layers must be those that the parent adapts.
        wanted: rank and scaling of the expert to train.
        pin: the base that it is trained on.
    """
    from safetensors import safe_open

    from moa.experts import peft_format

    trained = read_json(expert / MANIFEST).get("base") or {}
    if trained.get("digest") != pin.digest:
        return f"it was trained on another base ({trained.get('source', 'unknown')})"
    written = peft_format.read_config(expert)
    if other := _differences(written, wanted):
        return other
    with safe_open(expert / peft_format.WEIGHTS, framework="pt") as file:
        names = set(file.keys())
    if names != {f"{peft_format.PREFIX}{name}.lora_{part}.weight" for name in stack.layers for part in "AB"}:
        return "it adapts other layers than train.targets"
    return None


def _differences(written: Mapping[str, Any], wanted: "LoraSpec") -> str | None:
    """The first difference between a PEFT configuration's rank and scaling and the wanted ones, as a clause."""
    if written.get("rank_pattern") or written.get("alpha_pattern"):
        return "its rank or alpha differs from layer to layer"
    for key, actual, configured in (("rank", written["r"], wanted.rank), ("alpha", written["lora_alpha"], wanted.alpha),
                                    ("rslora", bool(written.get("use_rslora")), wanted.rslora)):
        if actual != configured:
            return f"its {key} is {json.dumps(actual)}, and train.{key} is {json.dumps(configured)}"
    return None
