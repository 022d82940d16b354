"""Files that are whole or not there: JSON, bytes and folders, written beside their place and renamed into it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that a reader sees the whole file or the old one: temporary name, flush, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_private(path: Path, text: str) -> None:
    """Write what only the owner's own processes may read; a reader sees the whole file or the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)   # its permissions would stay
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)


def write_json_if_changed(path: Path, value: Any) -> None:
    """`write_json` unless the file holds this value already."""
    try:
        unchanged = read_json(path) == value
    except (OSError, ValueError):
        unchanged = False
    if not unchanged:
        write_json(path, value)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that users or git also write: a reader sees the old or the new one, and its permissions stay."""
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
    """Where `write_atomic` writes first."""
    return path.with_name(f".{path.name}.part.tmp")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in file `path`; an empty one where there is none or it cannot be read."""
    try:
        value = read_json(path)
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def replace_directory(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes `target`'s place when the block ends well, and vanishes when it does not.

    The manifest should be the last thing written into it.
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
