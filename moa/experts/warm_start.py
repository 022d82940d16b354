"""Initial weights of an expert's training: new ones, or those of a parent expert.

    data/starts.json          domain -> {"domain", "digest", "path"} of its parent; other domains start afresh (git)
    data/parents/DIGEST16/    the parent's files, by the first digits of its digest (DVC)
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
    """A parent expert: its domain, digest and path."""

    domain: str
    digest: str


def read(workspace: Workspace) -> dict[str, InitialExpert]:
    """The start of every domain that has one. Raises ArtifactError when data/starts.json is not what moa writes."""
    name = workspace.relative(workspace.starts)
    try:
        content = read_json(workspace.starts)
        found = {domain: InitialExpert(entry["domain"], entry["digest"]) for domain, entry in content.items()}
        sound = all(isinstance(start.domain, str) and DIGEST.fullmatch(start.digest) for start in found.values())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{name} cannot be read ({type(error).__name__}: {error}): take it back from git with "
                            f"`git checkout {name}`, or delete it to train every expert afresh.") from None
    if not sound:
        raise ArtifactError(f"{name} names a parent without a whole digest: take it back from git with "
                            f"`git checkout {name}`, or delete it to train every expert afresh.")
    return found


def folder(workspace: Workspace, start: InitialExpert) -> Path:
    """Folder of the parent's files. Raises ArtifactError when they are missing or have another digest."""
    place = workspace.parent(start.digest)
    name = workspace.relative(place)
    if not (place / MANIFEST).is_file():
        raise ArtifactError(f"The parent expert ({start.domain}) in {name} is not there: run `dvc checkout "
                            f"{name}.dvc`, or `dvc pull {name}.dvc` where another machine has it.")
    if digests.of_expert(place) != start.digest:
        raise ArtifactError(f"The parent expert ({start.domain}) in {name} is not the one that data/starts.json names: "
                            f"run `dvc checkout --force {name}.dvc`.")
    return place


def misfit(expert: Path, stack: "ExpertStack", wanted: "LoraSpec", pin: BasePin) -> str | None:
    """Why training on `stack` with `wanted` cannot start from the expert in this folder; None when it can."""
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
    if written.get("rank_pattern") or written.get("alpha_pattern"):
        return "its rank or alpha differs from layer to layer"
    for key, found, asked in (("rank", written["r"], wanted.rank), ("alpha", written["lora_alpha"], wanted.alpha),
                              ("rslora", bool(written.get("use_rslora")), wanted.rslora)):
        if found != asked:
            return f"its {key} is {json.dumps(found)}, and train.{key} is {json.dumps(asked)}"
    return None
