"""Transactions: a change of several paths that happens as a whole or not at all, even if the process is killed.

    .moa/change.json    the journal: the paths that may change. It is written before any of them changes. Writing
                        `committed` into it is the commit. It is deleted after the backups.
    .NAME.old.tmp       beside a path: the backup of its old content
    .NAME.new.tmp       beside a folder: its new content, which a rename puts into place

A process that changes paths holds the workspace's lock. The next process that gets the lock undoes an unfinished
change.
"""

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moa.core import digests
from moa.core.errors import ArtifactError, MoaError
from moa.core.files import read_json, temp_path, write_atomic, write_json
from moa.core.paths import Workspace


class Change:
    """A change that is being made; `transaction` yields it."""

    def __init__(self, workspace: Workspace, what: str, files: Iterable[Path], folders: Iterable[Path]) -> None:
        self.workspace = workspace
        self.journal: dict[str, Any] = {"what": what, "committed": False, "paths": {}}
        for kind, paths in (("file", files), ("folder", folders)):
            for path in paths:
                self.journal["paths"][workspace.relative(path)] = {"kind": kind, "existed": _exists(path)}

    def write(self, path: Path, text: str) -> None:
        """Replace the content of a file by `text`, in UTF-8 and with its line ends unchanged."""
        data = text.encode("utf-8")
        self._record(path, "new", digests.of_bytes(data))
        write_atomic(path, data)

    @contextlib.contextmanager
    def replace(self, folder: Path) -> Iterator[Path]:
        """Yield an empty folder for the new content. It replaces `folder` when the block ends without an exception."""
        new = _new_path(folder)
        _delete(new)
        new.mkdir(parents=True)
        yield new
        self._record(folder, "new", _sizes(new))
        self.take_out(folder)
        new.rename(folder)

    def take_out(self, folder: Path) -> None:
        """Remove `folder`, which stays as a backup until the commit."""
        if _exists(folder):
            folder.rename(_backup_path(folder))

    def _record(self, path: Path, key: str, value: Any) -> None:
        self.journal["paths"][self.workspace.relative(path)][key] = value
        self._save()

    def _save(self) -> None:
        write_json(self.workspace.journal, self.journal)

    def begin(self) -> None:
        """Write the journal, and then the backups of the files."""
        entries = {self.workspace.root / name: entry for name, entry in self.journal["paths"].items()}
        for path in entries:
            _delete(_backup_path(path))
        self._save()
        for path, entry in entries.items():
            if entry["kind"] == "file" and entry["existed"]:   # a copy, because DVC writes its files in place
                write_atomic(_backup_path(path), path.read_bytes())
                shutil.copymode(path, _backup_path(path))

    def commit(self) -> None:
        """Make the change final, and delete the backups and the journal."""
        self.journal["committed"] = True
        self._save()
        _clean(self.workspace, self.journal)


@contextlib.contextmanager
def transaction(workspace: Workspace, what: str, *, files: Iterable[Path] = (),
                folders: Iterable[Path] = ()) -> Iterator[Change]:
    """Make all changes of `files` and `folders` in the block, or none of them. The caller holds the workspace's lock.

    Args:
        workspace: all paths are below its root.
        what: the command, for messages.
        files: files that the block may write, create or delete.
        folders: folders that the block may replace or take out, through the `Change` that it gets.

    Raises:
        ArtifactError: an operating system error in the block, or in undoing it. Other exceptions of the block go on.

    The block itself must undo its changes to other paths.
    """
    change = Change(workspace, what, files, folders)
    try:
        change.begin()
        yield change
        change.commit()
    except BaseException as error:
        try:
            undo(workspace)
        except OSError as undo_error:
            raise ArtifactError(f"`{what}` failed ({_reason(error)}), and the old state could not be put back "
                                f"({_reason(undo_error)}); the next moa command tries again.") from error
        if isinstance(error, OSError):
            raise ArtifactError(f"`{what}` failed ({_reason(error)}); nothing was changed.") from error
        raise


def recover(workspace: Workspace) -> list[str]:
    """Undo an unfinished change, unless another process holds the workspace's lock.

    Returns sentences for the user, as `undo` does. Raises ArtifactError where the old state cannot be put back.
    """
    if not workspace.journal.exists():
        return []
    from filelock import FileLock, Timeout

    try:
        with FileLock(workspace.lock, timeout=0):
            return undo(workspace)
    except Timeout:
        return []   # the change is still being made
    except OSError as error:
        raise ArtifactError(f"An interrupted change could not be undone ({_reason(error)}); mend that and run the "
                            "command again.") from None


def undo(workspace: Workspace) -> list[str]:
    """Put the paths of the journal back into their old state, or, after a commit, delete its backups.

    It may be interrupted and called again. Returns sentences for the user: what was undone, and where files that were
    edited since the interruption are kept. The caller holds the workspace's lock.
    """
    try:
        journal = read_json(workspace.journal)
    except FileNotFoundError:
        return []
    sentences = []
    if not journal["committed"]:
        sentences.append(f"an interrupted `{journal['what']}` was undone.")
        for name, entry in journal["paths"].items():
            path = workspace.root / name
            restore = _restore_file if entry["kind"] == "file" else _restore_folder
            sentences += [f"{name} had been edited since: that is kept as {workspace.relative(edited)}."
                          for edited in restore(path, entry, workspace.displaced / name)]
    _clean(workspace, journal)
    return sentences


def _restore_file(path: Path, entry: dict[str, Any], aside: Path) -> Iterator[Path]:
    """Put the backup of a file back. Copies a file that was edited since to `aside`, and yields that path."""
    old = _backup_path(path)
    if entry["existed"] and not old.exists():
        return   # not changed yet, or restored already
    known = {entry.get("new"), digests.of_file(old) if entry["existed"] else None}
    if "new" in entry and path.is_file() and digests.of_file(path) not in known:
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, aside)
        yield aside
    if entry["existed"]:
        old.replace(path)
    else:
        path.unlink(missing_ok=True)


def _restore_folder(path: Path, entry: dict[str, Any], aside: Path) -> Iterator[Path]:
    """Put the backup of a folder back. Moves files that were edited since below `aside`, and yields their paths there.

    A file counts as edited unless the change wrote one of the same name and size.
    """
    old = _backup_path(path)
    changed = _exists(old) or (not entry["existed"] and "new" in entry)
    if changed and _exists(path):
        written = entry.get("new", {})
        for name, size in _sizes(path).items():
            if written.get(name) != size:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(path / name, aside / name)
                yield aside / name
        _delete(path)
    if _exists(old):
        old.rename(path)


def _clean(workspace: Workspace, journal: dict[str, Any]) -> None:
    """Delete the backups and temporary files of a change, and then its journal."""
    for name in journal["paths"]:
        path = workspace.root / name
        for leftover in (_backup_path(path), _new_path(path), temp_path(path), temp_path(_backup_path(path))):
            _delete(leftover)
    workspace.journal.unlink(missing_ok=True)


def _backup_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.old.tmp")


def _new_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.new.tmp")


def _exists(path: Path) -> bool:   # also as a link to a missing file
    return path.exists() or path.is_symlink()


def _sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of every file below `folder`, by relative path; none for a link to a folder."""
    if folder.is_symlink():
        return {}
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*"))
            if path.is_file()}


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    if isinstance(error, MoaError):
        return str(error).rstrip(".")
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {Path(error.filename).name}" if error.filename else error.strerror
    return str(error) or type(error).__name__
