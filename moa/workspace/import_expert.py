"""An expert trained outside becomes a domain's expert: checked, copied, recorded as if it had been trained here.

Only adapter_config.json and adapter_model.safetensors are taken, byte for byte. What cannot be compared is said, never
assumed.
"""

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moa.base import sources
from moa.base.pin import BasePin, locate, pin
from moa.core import config as parameters
from moa.core import digests
from moa.core.config import Config
from moa.core.errors import ArtifactError, BaseModelError, ConfigError, DataError, UsageError
from moa.core.files import read_json, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.core.transaction import transaction
from moa.experts import train
from moa.workspace.pipeline import Pipeline

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
PARTS = ("weights", "tokenizer", "template")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def import_adapter(workspace: Workspace, source: Path, domain: str) -> dict[str, Any]:
    """Take the PEFT adapter in `source` as the expert of `domain`; what was done.

    Raises ConfigError or DataError when the domain is not there or not prepared, and ArtifactError when the adapter is
    not one that this workspace can mix; then nothing has changed.
    """
    pipeline = Pipeline(workspace)
    with pipeline.lock():
        config = parameters.load(workspace.params)
        _require_prepared(pipeline, config, domain)
        pinned = pin(workspace)
        found = inspect_adapter(workspace, config, source, pinned)
        before = _manifest(workspace.expert(domain)).get("digest")
        stage, folder = f"train@{domain}", workspace.expert(domain)
        with transaction(workspace, f"moa expert import --domain {domain}", folders=[folder],
                         files=[workspace.root / "dvc.lock", folder.parent / ".gitignore"]) as change:
            with change.replace(folder) as new:
                digest = _write(workspace, config, domain, source, new, found, pinned)
            pipeline.record([stage])
            if left := pipeline.stale([stage]):
                raise ArtifactError(f"DVC does not take the expert for what {stage} makes "
                                    f"({left[stage][0].text}), so nothing was changed.")
    return {"domain": domain, "digest": digest, "rank": found["rank"], "alpha": found["alpha"],
            "targets": found["targets"], "base": found["base"], "recorded": stage,
            "replaced": before if before != digest else None}


def text(done: Mapping[str, Any]) -> str:
    """What `moa expert import` says."""
    lines = [f"{done['domain']} has the imported expert {done['digest'][:12]}: rank {done['rank']}, "
             f"{', '.join(done['targets'])}."]
    if done["replaced"]:
        lines.append(f"It takes the place of {done['replaced'][:12]}.")
    said, by = done["base"]["said"], done["base"]["compared_by"]
    if by == "shapes":
        origin = f"It says it was trained on {said}" if said else "It does not say what base it was trained on"
        lines.append(f"{origin}: only its shapes could be compared with this workspace's base.")
    else:
        lines.append(f"Its base is this workspace's, by {by}.")
    lines += [f"{done['recorded']} is recorded as done: `moa run` goes on from assemble.", "", "Try next:",
              "  moa plan", "  moa run"]
    return "\n".join(lines)


def _require_prepared(pipeline: Pipeline, config: Config, domain: str) -> None:
    if domain not in config.domains:
        known = f"its domains are {', '.join(config.domains)}" if config.domains else "it has none yet"
        raise ConfigError(f"No domain {domain!r} in params.yaml ({known}): run `moa domain add {domain} FILE` first; "
                          "an expert needs rows to be routed to and measured on.")
    stage, snapshot = f"prepare@{domain}", pipeline.snapshot()
    snapshot.graph.matching(stage)   # or dvc.yaml has no such stage
    if stage in snapshot.affected:
        reasons = snapshot.stale.get(stage) or next(iter(snapshot.stale.values()))
        raise DataError(f"Domain {domain!r} is not prepared as its rows and parameters are now ({reasons[0].text}): "
                        f"run `moa domain check {domain}` first, which prepares it.")


# What it is.

def inspect_adapter(workspace: Workspace, config: Config, source: Path, pinned: BasePin) -> dict[str, Any]:
    """Rank, alpha, targets and base of the adapter in `source`. Raises ArtifactError that names what does not fit."""
    from moa.experts import peft_format

    if not source.is_dir():
        raise UsageError(f"{source} is no folder: name one with {peft_format.CONFIG} and {peft_format.WEIGHTS}.")
    _refuse_pickles(source, peft_format.WEIGHTS)
    written = peft_format.read_config(source)
    base = _compare_base(source, _manifest(source), written, pinned)
    spec = peft_format.read_spec(source)
    layers = _fit(workspace, config, source, spec)
    if not layers:
        raise ArtifactError(f"{source} adapts no layer: {peft_format.WEIGHTS} holds no matrices.")
    return {"rank": spec.rank, "alpha": spec.alpha, "rslora": spec.rslora, "base": base,
            "targets": sorted({name.rsplit(".", 1)[-1] for name in layers})}


def _refuse_pickles(source: Path, weights: str) -> None:
    """Pickled weights can run code when they are read. Other pickles, such as training_args.bin, are left where they
    are."""
    found = sorted(path.name for pattern in PICKLES for path in source.glob(pattern))
    named = [name for name in found if name.startswith("adapter_model.")]
    if named or (found and not (source / weights).is_file()):
        raise ArtifactError(f"{source} holds {(named or found)[0]}: pickled weights can run code when they are loaded, "
                            f"so only {weights} is taken; save the adapter with safe_serialization=True.")


def _compare_base(source: Path, manifest: Mapping[str, Any], written: Mapping[str, Any],
                  pinned: BasePin) -> dict[str, Any]:
    """What the adapter says of its base, and how far that could be compared. Raises ArtifactError where it differs."""
    own = manifest.get("base")
    if manifest.get("kind") == "expert" and isinstance(own, Mapping) and any(part in own for part in PARTS):
        if other := [part for part in PARTS if part in own and own[part] != getattr(pinned, part)]:
            raise ArtifactError(f"The expert in {source} was trained on {own.get('source', 'another base')}, and the "
                                f"{' and '.join(other)} of this workspace's base ({pinned.source}) differ.")
        return {"said": own.get("source"), "compared_by": "digest"}
    said = written.get("base_model_name_or_path")
    said = said if isinstance(said, str) and said else None
    compared = _same_name(said, written.get("revision"), pinned) if said else None
    if compared is False:
        raise ArtifactError(f"The expert in {source} was trained on {said}"
                            + (f" at {written['revision']}" if written.get("revision") else "")
                            + f", and this workspace's base is {pinned.source}.")
    return {"said": Path(said).name if said and Path(said).is_absolute() else said,
            "compared_by": "name" if compared else "shapes"}


def _same_name(said: str, revision: Any, pinned: BasePin) -> bool | None:
    """Whether a base's name is ours; None where names tell nothing, such as a folder on another machine."""
    ours = sources.parse(pinned.source)
    if said.startswith(("wheel:", "hub:")):   # as moa writes it
        with suppress(BaseModelError):
            theirs = sources.parse(said)
            return str(theirs) == pinned.source if theirs.kind == ours.kind else None
        return None
    if ours.kind == "hub" and HUB_NAME.fullmatch(said):
        commit = isinstance(revision, str) and sources.COMMIT.fullmatch(revision)
        return said.lower() == ours.name.lower() and not (commit and revision != ours.version)
    return None


def _fit(workspace: Workspace, config: Config, source: Path, spec: Any) -> list[str]:
    """The layers it adapts, once every matrix fits the base's layer. The base's weights are not loaded for this."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from moa.experts import peft_format
    from moa.experts.lora import ExpertStack

    sources.silence_transformers()
    described = AutoConfig.from_pretrained(locate(workspace, config.base), local_files_only=True,
                                           trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described, trust_remote_code=False)
    # Joint training trains the targets of params.yaml alone.
    stack = ExpertStack(model, [spec], config.train.targets if config.assemble.joint_epochs else "all-linear")
    peft_format.load(stack, 0, source)
    return list(stack.shapes[0])


def _manifest(folder: Path) -> dict[str, Any]:
    """A manifest that may be missing, or be something else of the same name."""
    try:
        content = read_json(folder / MANIFEST)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


# What becomes of it.

def _write(workspace: Workspace, config: Config, domain: str, source: Path, new: Path, found: Mapping[str, Any],
           pinned: BasePin) -> str:
    """The expert's folder, complete; its digest."""
    from moa.experts import peft_format

    for name in (peft_format.CONFIG, peft_format.WEIGHTS):
        shutil.copyfile(source / name, new / name)
    digest = digests.of_files(sorted(new.iterdir()), new)
    write_json(new / MANIFEST, {
        "kind": "expert", "domain": domain, "source": "imported", "digest": digest, "base": asdict(pinned),
        "corpus": train.corpus_digest(workspace, domain), "rank": found["rank"], "alpha": found["alpha"],
        "targets": found["targets"], "train": {}, "prompt": config.prompt.model_dump(),
        "imported": {"from": source.name, "base": found["base"]},
        "best_epoch": None, "best_loss": None, "curve": [],
        "fingerprint": train.fingerprint(workspace, config, domain)})
    return digest
