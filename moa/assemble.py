"""The stage `assemble`: experts and a router to one mixture, pinned by digest. Knows nothing of serving or releases.

    data/mixture/    experts/NAME/ (as trained), router.safetensors, manifest.json (last)
    .moa/cache/features/    router features by digest of what they come from, never recomputed for an old domain
"""

import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from moa import digests, rows
from moa.base import Base, load, pick_device, pin
from moa.config import Config
from moa.errors import ArtifactError
from moa.rows import Row, Split
from moa.tokens import Encoder
from moa.workspace import MANIFEST, Workspace, read_json, replace_directory, write_json

ROUTER = "router.safetensors"


def assemble(workspace: Workspace, config: Config) -> dict[str, Any]:
    """Train the router and write `data/mixture`; returns its manifest.

    Raises ArtifactError when an expert is missing or was trained on another base.
    """
    import torch
    from safetensors.torch import save_file

    from moa.progress import track
    from moa.router import calibrate, fit

    labels = sorted(config.domains)
    experts = {domain: _expert(workspace, domain) for domain in labels}
    base = load(workspace, config.base, pick_device(config.execution.devices))
    encoder = Encoder(base.tokenizer, config.prompt.system, config.prompt.max_tokens)
    found: dict[Split, list[torch.Tensor]] = {"train": [], "validation": []}
    with track("router features", total=2 * len(labels), unit="sets") as bar:
        for domain in labels:
            limits: dict[Split, int | None] = {"train": config.assemble.rows, "validation": None}
            for split, limit in limits.items():
                content = rows.read(workspace.corpus(domain), split)[:limit]   # in order of their digests: no bias
                found[split].append(_features(workspace, base, encoder, content))
                bar.advance(1)
    targets = {split: torch.cat([torch.full((len(part),), label) for label, part in enumerate(parts)])
               for split, parts in found.items()}
    params = config.assemble
    router = fit(labels, torch.cat(found["train"]), targets["train"], seed=params.seed)
    validation = torch.cat(found["validation"])
    calibrate(router, validation, targets["validation"], rule=params.rule, tolerance=params.tolerance,
              max_abstention=params.max_abstention)
    right = router.probabilities(validation).argmax(-1) == targets["validation"]
    with replace_directory(workspace.mixture) as folder:
        for domain in labels:
            shutil.copytree(workspace.expert(domain), folder / "experts" / domain)
        save_file(router.tensors(), folder / ROUTER)
        manifest = {
            "kind": "mixture", "base": asdict(base.pin), "prompt": config.prompt.model_dump(), "labels": labels,
            "experts": {domain: {key: expert[key] for key in ("digest", "corpus", "rank")}
                        for domain, expert in experts.items()},
            "router": {"digest": digests.of_file(folder / ROUTER), "rule": router.rule, "layer": router.layer,
                       "temperature": router.temperature, "threshold": router.threshold,
                       "accuracy": right.float().mean().item()}}
        manifest["digest"] = digests.of_json(manifest)
        write_json(folder / MANIFEST, manifest)
    return manifest


def _expert(workspace: Workspace, domain: str) -> dict[str, Any]:
    folder, again = workspace.expert(domain), f"run `moa train --domain {domain}"
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"Domain {domain!r} has no expert: {again}` first.")
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    base = pin(workspace)
    if other := [part for part in ("weights", "tokenizer", "template")
                 if manifest["base"][part] != getattr(base, part)]:
        raise ArtifactError(f"The expert of {domain!r} was trained on {manifest['base']['source']}, and the "
                            f"{' and '.join(other)} of this workspace's base ({base.source}) differ: {again}`.")
    files = [path for path in folder.iterdir() if path.name != MANIFEST]
    if digests.of_files(files, folder) != manifest["digest"]:
        raise ArtifactError(f"The expert of {domain!r} is not the one its manifest names: {again} --fresh`.")
    return manifest


def _features(workspace: Workspace, base: Base, encoder: Encoder, content: list[Row]) -> Any:
    """The router's features of these rows' prompts, (N, L, D), from the cache when they were computed before."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    from moa.router import features

    key = digests.of_json({"base": base.pin.digest, "dtype": base.device.dtype, "system": encoder.system,
                           "max_tokens": encoder.max_tokens, "rows": [row.id for row in content]})
    path = workspace.cache / "features" / f"{key[:32]}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):   # absent or damaged: it can be computed again
        return load_file(path)["features"]
    prompts = [encoder.prompt(row.prompt)[-encoder.max_tokens:] for row in content]
    result = features(base.model, prompts)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"features": result}, temporary)
    temporary.replace(path)
    return result
