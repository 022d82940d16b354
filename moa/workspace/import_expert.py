"""`moa expert import`: takes a PEFT adapter that was trained elsewhere as a domain's expert.

The adapter is checked against the workspace's base, copied, and recorded in dvc.lock as if stage `train` had made it.
Only adapter_config.json and adapter_model.safetensors are copied, byte for byte. The result says which parts of the
base could be compared.
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
    """Import the PEFT adapter in the folder `source` as the expert of `domain`.

    Returns:
        Facts for `text`: the expert's digest, rank, alpha and targets, how its base was compared (`base`), and the
        digest of the expert that it `replaced`, or None.

    After an error nothing has changed.

    Raises:
        ConfigError: params.yaml lacks the domain.
        DataError: the domain is not prepared.
        ArtifactError: the adapter does not fit the workspace's base.
    """
    pipeline = Pipeline(workspace)
    with pipeline.lock():
        config = parameters.load(workspace.params)
        _require_prepared(pipeline, config, domain)
        pinned = pin(workspace)
        adapter = inspect_adapter(workspace, config, source, pinned)
        before = _manifest(workspace.expert(domain)).get("digest")
        stage, folder = f"train@{domain}", workspace.expert(domain)
        with transaction(workspace, f"moa expert import --domain {domain}", folders=[folder],
                         files=[workspace.root / "dvc.lock", folder.parent / ".gitignore"]) as change:
            with change.replace(folder) as new:
                digest = _write(workspace, config, domain, source, new, adapter, pinned)
            pipeline.record([stage])
            if still_stale := pipeline.stale([stage]):
                raise ArtifactError(f"DVC does not take the expert for what {stage} makes "
                                    f"({still_stale[stage][0].text}), so nothing was changed.")
    return {"domain": domain, "digest": digest, "rank": adapter["rank"], "alpha": adapter["alpha"],
            "targets": adapter["targets"], "base": adapter["base"], "recorded": stage,
            "replaced": before if before != digest else None}


def text(done: Mapping[str, Any]) -> str:
    """Describe the result of `import_adapter`, as `moa expert import` prints it."""
    lines = [f"{done['domain']} has the imported expert {done['digest'][:12]}: rank {done['rank']}, "
             f"{', '.join(done['targets'])}."]
    if done["replaced"]:
        lines.append(f"It takes the place of {done['replaced'][:12]}.")
    named_base, compared_by = done["base"]["said"], done["base"]["compared_by"]
    if compared_by == "shapes":
        origin = (f"It says it was trained on {named_base}" if named_base
                  else "It does not say what base it was trained on")
        lines.append(f"{origin}: only its shapes could be compared with this workspace's base.")
    else:
        lines.append(f"Its base is this workspace's, by {compared_by}.")
    lines += [f"{done['recorded']} is recorded as done: `moa run` goes on from assemble.", "", "Try next:",
              "  moa plan", "  moa run"]
    return "\n".join(lines)


def _require_prepared(pipeline: Pipeline, config: Config, domain: str) -> None:
    if domain not in config.domains:
        known = f"its domains are {', '.join(config.domains)}" if config.domains else "it has none yet"
        raise ConfigError(f"No domain {domain!r} in params.yaml ({known}): run `moa domain add {domain} FILE` first; "
                          "an expert needs rows to be routed to and measured on.")
    stage, snapshot = f"prepare@{domain}", pipeline.snapshot()
    snapshot.graph.matching(stage)   # raises UsageError where dvc.yaml has no such stage
    if stage in snapshot.affected:
        reasons = snapshot.stale.get(stage) or next(iter(snapshot.stale.values()))
        raise DataError(f"Domain {domain!r} is not prepared as its rows and parameters are now ({reasons[0].text}): "
                        f"run `moa domain check {domain}` first, which prepares it.")


# Checks of the adapter.

def inspect_adapter(workspace: Workspace, config: Config, source: Path, pinned: BasePin) -> dict[str, Any]:
    """Check the adapter in `source` against the workspace's base.

    Returns:
        `rank`, `alpha`, `rslora`, `targets`, and `base`: the base that the adapter names (`said`), and how it was
        compared (`compared_by`: digest, name or shapes).

    Raises UsageError where `source` is no folder, and ArtifactError naming what does not fit.
    """
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
    """Raise ArtifactError for pickled weights, which can run code when they are loaded.

    Other pickles, such as training_args.bin, are ignored.
    """
    pickles = sorted(path.name for pattern in PICKLES for path in source.glob(pattern))
    pickled_weights = [name for name in pickles if name.startswith("adapter_model.")]
    if pickled_weights or (pickles and not (source / weights).is_file()):
        raise ArtifactError(f"{source} holds {(pickled_weights or pickles)[0]}: pickled weights can run code when they "
                            f"are loaded, so only {weights} is taken; save the adapter with safe_serialization=True.")


def _compare_base(source: Path, manifest: Mapping[str, Any], written: Mapping[str, Any],
                  pinned: BasePin) -> dict[str, Any]:
    """The base that the adapter names, and how it was compared with the workspace's.

    Raises ArtifactError where the adapter was trained on another base.
    """
    recorded = manifest.get("base")
    if manifest.get("kind") == "expert" and isinstance(recorded, Mapping) and any(part in recorded for part in PARTS):
        if differing := [part for part in PARTS if part in recorded and recorded[part] != getattr(pinned, part)]:
            raise ArtifactError(f"The expert in {source} was trained on {recorded.get('source', 'another base')}, and "
                                f"the {' and '.join(differing)} of this workspace's base ({pinned.source}) differ.")
        return {"said": recorded.get("source"), "compared_by": "digest"}
    named_base = written.get("base_model_name_or_path")
    named_base = named_base if isinstance(named_base, str) and named_base else None
    compared = _same_name(named_base, written.get("revision"), pinned) if named_base else None
    if compared is False:
        raise ArtifactError(f"The expert in {source} was trained on {named_base}"
                            + (f" at {written['revision']}" if written.get("revision") else "")
                            + f", and this workspace's base is {pinned.source}.")
    return {"said": Path(named_base).name if named_base and Path(named_base).is_absolute() else named_base,
            "compared_by": "name" if compared else "shapes"}


def _same_name(named_base: str, revision: Any, pinned: BasePin) -> bool | None:
    """Whether `named_base` means the workspace's base; None where names cannot tell, as for a folder elsewhere."""
    ours = sources.parse(pinned.source)
    if named_base.startswith(("wheel:", "hub:")):   # a source in moa's own form
        with suppress(BaseModelError):
            theirs = sources.parse(named_base)
            return str(theirs) == pinned.source if theirs.kind == ours.kind else None
        return None
    if ours.kind == "hub" and HUB_NAME.fullmatch(named_base):
        commit = isinstance(revision, str) and sources.COMMIT.fullmatch(revision)
        return named_base.lower() == ours.name.lower() and not (commit and revision != ours.version)
    return None


def _fit(workspace: Workspace, config: Config, source: Path, spec: Any) -> list[str]:
    """Names of the layers that the adapter changes. Raises ArtifactError where a matrix does not fit the base's layer.

    The base is built on the meta device, without its weights.
    """
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
    """The manifest in `folder`; empty where it is missing, unreadable or no JSON object."""
    try:
        content = read_json(folder / MANIFEST)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


# Writing the expert.

def _write(workspace: Workspace, config: Config, domain: str, source: Path, new: Path, adapter: Mapping[str, Any],
           pinned: BasePin) -> str:
    """Write the expert's files and manifest into the folder `new`. Returns the expert's digest."""
    from moa.experts import peft_format

    for name in (peft_format.CONFIG, peft_format.WEIGHTS):
        shutil.copyfile(source / name, new / name)
    digest = digests.of_files(sorted(new.iterdir()), new)
    write_json(new / MANIFEST, {
        "kind": "expert", "domain": domain, "source": "imported", "digest": digest, "base": asdict(pinned),
        "corpus": train.corpus_digest(workspace, domain), "rank": adapter["rank"], "alpha": adapter["alpha"],
        "targets": adapter["targets"], "train": {}, "prompt": config.prompt.model_dump(),
        "imported": {"from": source.name, "base": adapter["base"]},
        "best_epoch": None, "best_loss": None, "curve": [],
        "fingerprint": train.fingerprint(workspace, config, domain)})
    return digest
