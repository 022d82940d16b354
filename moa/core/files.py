"""Atomic writes of JSON, bytes and folders: each is written beside its place and then renamed into it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON atomically: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_private(path: Path, text: str) -> None:
    """Write a secret atomically, with permissions (0600) for the user alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)   # a file that an interrupted call left would keep its own permissions
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)


def write_json_if_changed(path: Path, value: Any) -> None:
    """Write `value` as JSON, as `write_json` does, unless the file at `path` holds this value already."""
    try:
        unchanged = read_json(path) == value
    except (OSError, ValueError):
        unchanged = False
    if not unchanged:
        write_json(path, value)


def write_atomic(path: Path, data: bytes) -> None:
    """Write bytes atomically into a file that users or git also write: an existing file keeps its permissions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temp_path(path).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temp_path(path))
        temp_path(path).replace(path)
    finally:
        temp_path(path).unlink(missing_ok=True)


def temp_path(path: Path) -> Path:
    """The temporary file, beside `path`, that `write_atomic` writes and then renames."""
    return path.with_name(f".{path.name}.part.tmp")


def read_json(path: Path) -> Any:
    """The JSON value in file `path`. Raises OSError where it cannot be read, and ValueError where it is no JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in file `path`; an empty one where the file is missing or holds something else."""
    try:
        value = read_json(path)
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def replace_directory(target: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `target` when the block ends; an exception in the block deletes it instead.

    The block should write the manifest last, because an artifact counts as complete once it has one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
