"""Content digests (SHA-256, in hexadecimal), which identify artifacts and their inputs."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moa.core.paths import MANIFEST

CHUNK = 1 << 20
_canonical = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode


def of_bytes(data: bytes) -> str:
    """SHA-256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def of_file(path: Path) -> str:
    """SHA-256 of the bytes of a file of any size: it is read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def of_files(files: Iterable[Path], root: Path) -> str:
    """One digest over the names (relative to `root`) and contents of `files`, independent of their order."""
    lines = sorted(f"{path.relative_to(root).as_posix()} {of_file(path)}" for path in files)
    return of_bytes("\n".join(lines).encode())


def of_expert(folder: Path) -> str:
    """Digest of an expert: names and contents of the files in its folder, without the manifest, which records it."""
    return of_files([path for path in folder.iterdir() if path.name != MANIFEST], folder)


def by_name(folder: Path) -> dict[str, str]:
    """Digest of every file under `folder`, keyed by the file's path relative to `folder`."""
    return {path.relative_to(folder).as_posix(): of_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def of_json(value: Any) -> str:
    """Digest of a JSON value, independent of the order of its keys."""
    return of_bytes(_canonical(value).encode())
