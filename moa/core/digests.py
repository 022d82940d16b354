"""Content digests: what an artifact is called when it must not be confused with another."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHUNK = 1 << 20
_canonical = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode


def of_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def of_files(files: Iterable[Path], root: Path) -> str:
    """One digest over names (relative to `root`) and contents, whatever order the files come in."""
    lines = sorted(f"{path.relative_to(root).as_posix()} {of_file(path)}" for path in files)
    return of_bytes("\n".join(lines).encode())


def by_name(folder: Path) -> dict[str, str]:
    """Digest of every file under `folder`, by its name relative to it."""
    return {path.relative_to(folder).as_posix(): of_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def of_json(value: Any) -> str:
    """Digest of a JSON value: key order and white space do not count."""
    return of_bytes(_canonical(value).encode())
