"""Exports a release for servers other than moa's: experts as PEFT directories, the router, and a manifest.

    NAME-<12 hex of the digest>/    an expert as it was released; a changed expert gets another name, so that no server
                                    goes on serving the old one under it
    router.safetensors, router.json the heads, and how they decide
    vllm.sh                         only for vLLM: the command that serves the experts by these names
    manifest.json                   release, base, prompt, labels and every digest; written last
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
from moa.core.text import NOTHING_RELEASED
from moa.mixture import artifact

FORMATS = ("peft", "vllm")
SCRIPT, ROUTER_FACTS = "vllm.sh", "router.json"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 512)   # what every version takes as --max-lora-rank (vllm/config/lora.py)
PREFIX = 12   # hexadecimal digits of an expert's digest in its name


def export(workspace: Workspace, config: Config, target: Path, form: str, version: int | None = None) -> dict[str, Any]:
    """Export the champion, or `version`, into the new or empty folder `target`.

    Args:
        form: one of `FORMATS`.

    Returns:
        The written manifest, with `directory` and, for vLLM, the shell `command` that serves the export (else None).

    Raises:
        UsageError: `form` is unknown, or `target` holds something or cannot be written.
        RegistryError: there is no such release.
        ArtifactError: the release is for another base than the workspace's, or vLLM would compute other answers.
    """
    if form not in FORMATS:
        raise UsageError(f"--format {form} is not known; it is one of {', '.join(FORMATS)}.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is already there and not an empty folder: name a new one.")
    from moa.release.registry import Registry

    registry = Registry(workspace, config)
    release = registry.get(version) if version is not None else registry.champion() if registry.exists() else None
    if release is None:
        raise RegistryError(NOTHING_RELEASED)
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
            "command": shlex.join(_with_absolute_paths(command, target.resolve())) if command else None}


def adapter_name(label: str, digest: str) -> str:
    """The name of an exported expert: its label and the beginning of its digest, as other servers list it."""
    return f"{label}-{digest[:PREFIX]}"


def text(done: Mapping[str, Any]) -> str:
    """Describe the result of `export`, as `moa export` prints it to standard error."""
    lines = [f"Version {done['release']['version']} of {done['release']['name']} in {done['directory']}:"]
    lines += [f"  {expert['path']}  rank {expert['rank']}" for expert in done["experts"].values()]
    return "\n".join([*lines, f"  {artifact.ROUTER}, {ROUTER_FACTS}, {MANIFEST}"
                              + (f", {SCRIPT}" if done["format"] == "vllm" else "")])


def _manifest(folder: Path, form: str, release: Any, manifest: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    """The export's own manifest, from the manifest of the mixture."""
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
    """The content of router.json: the router's parameters, its tensors' shapes, and how to compute its decision."""
    return {"labels": list(router.labels), **router.facts(), "reads_level": router.reads,
            "tensors": {name: list(tensor.shape) for name, tensor in router.tensors().items()},
            "features": "level l = mean, over the prompt's tokens with generation prompt, of the hidden states that "
                        "enter decoder layer l; logits = weight[l] @ ((features - mean[l]) / scale[l]) + bias[l]; "
                        "where generation[d] > 0, the highest logit of the domains of lower generations is added to "
                        "that of d; probabilities = softmax(logits / temperature)",
            "decision": "x = (features - mean) / scale at reads_level; y = x - within' @ within @ x, of length one; "
                        "similarity[d] = the largest seen[m] @ y with seen_of[m] == d; the most probable domain with "
                        "similarity[d] >= threshold[d] answers, its logits made without the other domains; where there "
                        "is none, the base; without a tensor `threshold`, the most probable domain"}


# vLLM.

def _command(workspace: Workspace, config: Config, folders: Mapping[str, Path], names: Mapping[str, str]) -> list[str]:
    """The `vllm serve` command, with adapters relative to the export. Raises ArtifactError for what vLLM lacks."""
    from moa.experts.peft_format import read_config, read_spec

    for label, folder in folders.items():
        adapter_config = read_config(folder)
        if ignored := [field for field in ("rank_pattern", "alpha_pattern") if adapter_config.get(field)]:
            raise ArtifactError(f"The expert of {label!r} has {ignored[0]}, which vLLM ignores, so it would answer "
                                "otherwise than here: export with --format peft.")
    ranks = {label: read_spec(folder).rank for label, folder in folders.items()}
    widest = max(ranks, key=lambda label: ranks[label])
    max_rank = next((rank for rank in VLLM_RANKS if rank >= ranks[widest]), None)
    if max_rank is None:
        raise ArtifactError(f"The expert of {widest!r} has rank {ranks[widest]}, and vLLM takes at most "
                            f"{VLLM_RANKS[-1]}: export with --format peft.")
    return ["vllm", "serve", *_base(workspace, config), "--enable-lora", "--lora-modules",
            *(f"{name}={name}" for name in names.values()), "--max-lora-rank", str(max_rank)]


def _base(workspace: Workspace, config: Config) -> list[str]:
    """vLLM's arguments that name the base: a hub's name and commit, or a local folder."""
    kind, _, place = pin(workspace).source.partition(":")
    if kind == "hub":
        name, _, revision = place.partition("@")
        return [name, "--revision", revision] if revision else [name]
    folder = str(locate(workspace, config.base).resolve())
    # The workspace's tokenizer has the chat template of params.yaml; the one beside the weights may have another.
    return [folder, *(["--tokenizer", str(workspace.base.resolve())] if config.base.template else [])]


def _with_absolute_paths(command: list[str], folder: Path) -> list[str]:
    """The command with absolute paths of the adapters in `folder`, so that it runs in any folder."""
    first = command.index("--lora-modules") + 1
    return [f"{word.partition('=')[0]}={folder / word.partition('=')[2]}"
            if index >= first and "=" in word else word for index, word in enumerate(command)]


def _write_script(path: Path, command: list[str]) -> None:
    """Write the command as a shell script that works wherever its folder is moved."""
    path.write_text("#!/bin/sh\n# Serves the experts by name on one base; arguments are passed on to vLLM.\n"
                    f'cd "$(dirname "$0")" && exec {shlex.join(command)} "$@"\n', encoding="utf-8")
