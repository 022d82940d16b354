"""The quarantine data/incoming/.rejected: files that could not be used or were refused, each with its reason.

    data/incoming/.rejected/NAME/FILE               the file; NAME is `-` for one that lay directly in data/incoming
    data/incoming/.rejected/NAME/FILE.reason.json   reason, at, digest, from, origin

The reason is written before the file is moved, so that after a crash the file is in one of the two places.
"""

import os
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moa.core import digests
from moa.core.errors import ArtifactError
from moa.core.files import write_json
from moa.core.names import escaped, printable
from moa.core.paths import Workspace
from moa.workspace.row_sources import stem

LONGEST = 200   # bytes of a file's name; the name of its reason is longer, and file systems allow 255


def reject(workspace: Workspace, name: str, paths: Sequence[Path], reason: str, *, origin: str | None = None
           ) -> list[dict[str, Any]]:
    """Quarantine files of domain `name` with the reason.

    Files in data/incoming are moved, all others copied. Files that no longer exist are skipped, and the same content is
    stored once. The caller holds the lock.

    Args:
        origin: the files' original name; None = their present one.

    Returns:
        `file`, `reason` and place in the quarantine (`kept`) of each.

    Raises ArtifactError when the disk refuses; the file is in its old place then.
    """
    quarantined = []
    for path in paths:
        if not path.exists():
            continue
        try:
            target = _reject(workspace, name, path, reason, origin)
        except OSError as error:
            raise ArtifactError(f"{printable(path.name)} cannot be put into "
                                f"{workspace.relative(workspace.quarantine)}: "
                                f"{error.strerror or error}; mend that, and the next run tries again.") from error
        quarantined.append({"file": printable(path.name), "reason": escaped(reason),
                            "kept": printable(workspace.relative(target))})
    return quarantined


def quarantined(workspace: Workspace, name: str) -> list[Path]:
    """The quarantined files of domain `name`, without the files that hold their reasons; sorted."""
    return sorted(path for path in (workspace.quarantine / name).glob("*")
                  if path.is_file() and not path.name.startswith(".") and _reason_of(path).exists())


def release(path: Path, target: Path) -> Path:
    """Move a quarantined file to `target`, which is free, and delete its reason. Returns `target`."""
    path.replace(target)
    _reason_of(path).unlink(missing_ok=True)
    return target


def _reject(workspace: Workspace, name: str, path: Path, reason: str, origin: str | None) -> Path:
    """Quarantine one file. Returns its new place."""
    try:
        digest = digests.of_file(path)
    except OSError:
        digest = None   # the file may have been rejected because it cannot be read
    folder = workspace.quarantine / (name or "-")
    target = _free(folder, path, digest)
    for abandoned in folder.glob(".*.tmp"):   # by a process that was killed
        abandoned.unlink(missing_ok=True)
    write_json(_reason_of(target), {
        "reason": escaped(reason), "at": datetime.now(UTC).isoformat(timespec="seconds"), "digest": digest,
        "from": printable(os.path.relpath(path, workspace.root)), "origin": printable(origin or path.name)})
    move = path.is_relative_to(workspace.incoming)
    if move and not path.is_symlink() and path.stat().st_dev == folder.stat().st_dev:
        path.replace(target)
        return target
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(path, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    if move:
        path.unlink()
    return target


def _free(folder: Path, path: Path, digest: str | None) -> Path:
    """The place for a file: it is free or holds the same content, and its reason overwrites no file."""
    short_stem, suffix = stem(path.stem), path.suffix[:20]
    names = [path.name] if len(os.fsencode(path.name)) <= LONGEST else []
    names += [f"{short_stem}-{(digest or 'unreadable')[:digits]}{suffix}" for digits in (12, 64)]
    names += [f"{short_stem}-{number}{suffix}" for number in range(1, 1000)]
    for target in (folder / name for name in names):
        reason = _reason_of(target)
        if reason.exists() and _reason_of(reason).exists():
            continue   # a rejected file has this name
        if not target.exists() or (digest is not None and digests.of_file(target) == digest):
            return target
    raise OSError(17, "too many files of that name")


def _reason_of(target: Path) -> Path:
    """The file that holds the reason of a quarantined file."""
    return target.with_name(f"{target.name}.reason.json")
