"""A release for servers other than moa's: experts as plain PEFT directories, the router beside them, a manifest last.

    NAME-<12 hex of the digest>/    the expert as it was released: a new expert is a new name, so no server keeps an old
                                    one under it
    router.safetensors, router.json the heads, and how they decide
    vllm.sh                         only for vLLM: the command that serves the experts by these names
    manifest.json                   release, base, prompt, labels and every digest (last)
"""

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moa.base.pin import locate, pin
from moa.core import digests
from moa.core.config import Config
from moa.core.errors import ArtifactError, RegistryError, UsageError
from moa.core.files import replace_directory, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.mixture import artifact

FORMATS = ("peft", "vllm")
SCRIPT, ROUTER_FACTS = "vllm.sh", "router.json"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 512)   # what every version takes as --max-lora-rank (vllm/config/lora.py)
PREFIX = 12


def export(workspace: Workspace, config: Config, target: Path, form: str, version: int | None = None) -> dict[str, Any]:
    """Write the champion, or `version`, into the new or empty folder `target`; its manifest, and the vLLM command.

    Raises UsageError when `target` holds something, RegistryError when there is no such release, ArtifactError when
    the release is for another base than the workspace's, or vLLM would not compute what moa does.
    """
    if form not in FORMATS:
        raise UsageError(f"--format {form} is not known; it is one of {', '.join(FORMATS)}.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is already there and not an empty folder: name a new one.")
    from moa.release.registry import Registry

    registry = Registry(workspace, config)
    release = registry.get(version) if version is not None else registry.champion() if registry.exists() else None
    if release is None:
        raise RegistryError("Nothing has been released yet, so there is no champion: run `moa run` first.")
    mixture = registry.download(release.version)
    manifest, router, folders = artifact.read(mixture, pin(workspace))
    names = {label: adapter_name(label, manifest["experts"][label]["digest"]) for label in folders}
    command = _command(workspace, config, folders, names) if form == "vllm" else None
    try:
        with replace_directory(target) as folder:
            for label, source in folders.items():
                shutil.copytree(source, folder / names[label])
            shutil.copyfile(mixture / artifact.ROUTER, folder / artifact.ROUTER)
            write_json(folder / ROUTER_FACTS, _router_facts(router))
            if command:
                _write_script(folder / SCRIPT, command)
            written = _manifest(folder, form, release, manifest, names)
            write_json(folder / MANIFEST, written)
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror}): name another folder.") from None
    return {"directory": str(target), **written,
            "command": shlex.join(_placed(command, target.resolve())) if command else None}


def adapter_name(label: str, digest: str) -> str:
    """What other servers know an expert by."""
    return f"{label}-{digest[:PREFIX]}"


def text(done: Mapping[str, Any]) -> str:
    """What the command says on standard error."""
    lines = [f"Version {done['release']['version']} of {done['release']['name']} in {done['directory']}:"]
    lines += [f"  {each['path']}  rank {each['rank']}" for each in done["experts"].values()]
    return "\n".join([*lines, f"  {artifact.ROUTER}, {ROUTER_FACTS}, {MANIFEST}"
                              + (f", {SCRIPT}" if done["format"] == "vllm" else "")])


def _manifest(folder: Path, form: str, release: Any, manifest: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    from moa.experts.peft_format import read_spec

    experts = {label: {"path": name, "digest": manifest["experts"][label]["digest"], **asdict(read_spec(folder / name))}
               for label, name in names.items()}
    content = {"kind": "export", "format": form,
               "release": {"name": release.name, "version": release.version, "digest": release.digest},
               "base": manifest["base"], "prompt": manifest["prompt"], "labels": manifest["labels"], "experts": experts,
               "router": {"tensors": artifact.ROUTER, "facts": ROUTER_FACTS,
                          "digest": digests.of_file(folder / artifact.ROUTER)}}
    return {**content, "digest": digests.of_json(content)}


def _router_facts(router: Any) -> dict[str, Any]:
    """What decides, and how to come by its input; tensors' names and shapes are what `moa.mixture.router` reads."""
    return {"labels": list(router.labels), **router.facts(), "reads_level": router.reads,
            "tensors": {name: list(tensor.shape) for name, tensor in router.tensors().items()},
            "features": "level l = mean, over the prompt's tokens with generation prompt, of the hidden states that "
                        "enter decoder layer l; logits = weight[l] @ ((features - mean[l]) / scale[l]) + bias[l]; "
                        "probabilities = softmax(logits / temperature)"}


# vLLM.

def _command(workspace: Workspace, config: Config, folders: Mapping[str, Path], names: Mapping[str, str]) -> list[str]:
    """`vllm serve`, its adapters relative to the export."""
    from moa.experts.peft_format import read_config, read_spec

    for label, folder in folders.items():
        found = read_config(folder)
        if uneven := [field for field in ("rank_pattern", "alpha_pattern") if found.get(field)]:
            raise ArtifactError(f"The expert of {label!r} has {uneven[0]}, which vLLM ignores, so it would answer "
                                "otherwise than here: export with --format peft.")
    ranks = {label: read_spec(folder).rank for label, folder in folders.items()}
    widest = max(ranks, key=lambda label: ranks[label])
    room = next((rank for rank in VLLM_RANKS if rank >= ranks[widest]), None)
    if room is None:
        raise ArtifactError(f"The expert of {widest!r} has rank {ranks[widest]}, and vLLM takes at most "
                            f"{VLLM_RANKS[-1]}: export with --format peft.")
    return ["vllm", "serve", *_base(workspace, config), "--enable-lora", "--lora-modules",
            *(f"{name}={name}" for name in names.values()), "--max-lora-rank", str(room)]


def _base(workspace: Workspace, config: Config) -> list[str]:
    """How vLLM finds the base: a hub's name and commit, or the folder here."""
    kind, _, place = pin(workspace).source.partition(":")
    if kind == "hub":
        name, _, revision = place.partition("@")
        return [name, "--revision", revision] if revision else [name]
    folder = str(locate(workspace, config.base).resolve())
    # The tokenizer kept here has the template that params.yaml gave it; the weights may lie beside another one.
    return [folder, *(["--tokenizer", str(workspace.base.resolve())] if config.base.template else [])]


def _placed(command: list[str], folder: Path) -> list[str]:
    """The command with the adapters' whole paths, to be run from anywhere."""
    first = command.index("--lora-modules") + 1
    return [f"{word.partition('=')[0]}={folder / word.partition('=')[2]}"
            if place >= first and "=" in word else word for place, word in enumerate(command)]


def _write_script(path: Path, command: list[str]) -> None:
    """The command as a file that may move with its folder."""
    path.write_text("#!/bin/sh\n# Serves the experts by name on one base; arguments are passed on to vLLM.\n"
                    f'cd "$(dirname "$0")" && exec {shlex.join(command)} "$@"\n', encoding="utf-8")
