"""A change of several paths that happens as a whole or not at all, whatever ends the process.

    .moa/change.json    the journal: which paths may change. It is written before any is touched; saying `committed` in
                        it is the commit, and it is deleted when nothing of the old state is left to clean up
    .NAME.old.tmp       beside a path: what was there before
    .NAME.new.tmp       beside a folder: what will be there, built aside and swapped in by rename

A process that changes paths holds the workspace's lock. The next one that gets the lock undoes an abandoned change.
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
    """One change while it is made: what `transaction` yields."""

    def __init__(self, workspace: Workspace, what: str, files: Iterable[Path], folders: Iterable[Path]) -> None:
        self.workspace = workspace
        self.journal: dict[str, Any] = {"what": what, "committed": False, "paths": {}}
        for kind, paths in (("file", files), ("folder", folders)):
            for path in paths:
                self.journal["paths"][workspace.relative(path)] = {"kind": kind, "existed": _there(path)}

    def write(self, path: Path, text: str) -> None:
        """Give a file new text, line ends as they stand in it."""
        data = text.encode("utf-8")
        self._note(path, "new", digests.of_bytes(data))
        write_atomic(path, data)

    @contextlib.contextmanager
    def replace(self, folder: Path) -> Iterator[Path]:
        """Yield an empty folder to fill, which takes the place of `folder` when the block ends well."""
        new = _new(folder)
        _delete(new)
        new.mkdir(parents=True)
        yield new
        self._note(folder, "new", _sizes(new))
        self.take_out(folder)
        new.rename(folder)

    def take_out(self, folder: Path) -> None:
        """Leave nothing where `folder` is."""
        if _there(folder):
            folder.rename(_old(folder))

    def _note(self, path: Path, key: str, value: Any) -> None:
        self.journal["paths"][self.workspace.relative(path)][key] = value
        self._save()

    def _save(self) -> None:
        write_json(self.workspace.journal, self.journal)

    def begin(self) -> None:
        places = {self.workspace.root / name: entry for name, entry in self.journal["paths"].items()}
        for path in places:
            _delete(_old(path))
        self._save()
        for path, entry in places.items():
            if entry["kind"] == "file" and entry["existed"]:   # a copy, because DVC writes its files in place
                write_atomic(_old(path), path.read_bytes())
                shutil.copymode(path, _old(path))

    def commit(self) -> None:
        self.journal["committed"] = True
        self._save()
        _clean(self.workspace, self.journal)


@contextlib.contextmanager
def transaction(workspace: Workspace, what: str, *, files: Iterable[Path] = (),
                folders: Iterable[Path] = ()) -> Iterator[Change]:
    """Everything that happens to `files` and `folders` in the block, or nothing. The caller holds the workspace's lock.

    `what` names the command in messages. The block itself undoes its changes to other paths.
    """
    change = Change(workspace, what, files, folders)
    try:
        change.begin()
        yield change
        change.commit()
    except BaseException as error:
        try:
            undo(workspace)
        except OSError as second:
            raise ArtifactError(f"`{what}` failed ({_words(error)}), and the old state could not be put back "
                                f"({_words(second)}); the next moa command tries again.") from error
        if isinstance(error, OSError):
            raise ArtifactError(f"`{what}` failed ({_words(error)}); nothing was changed.") from error
        raise


def recover(workspace: Workspace) -> list[str]:
    """Undo an abandoned change, unless another process holds the lock. Returns a sentence for each thing to know."""
    if not workspace.journal.exists():
        return []
    from filelock import FileLock, Timeout

    try:
        with FileLock(workspace.lock, timeout=0):
            return undo(workspace)
    except Timeout:
        return []   # the change is still being made
    except OSError as error:
        raise ArtifactError(f"An interrupted change could not be undone ({_words(error)}); mend that and run the "
                            "command again.") from None


def undo(workspace: Workspace) -> list[str]:
    """Put back what the journal names, or finish cleaning up behind a commit. May itself be interrupted."""
    try:
        journal = read_json(workspace.journal)
    except FileNotFoundError:
        return []
    said = []
    if not journal["committed"]:
        said.append(f"an interrupted `{journal['what']}` was undone.")
        for name, entry in journal["paths"].items():
            path = workspace.root / name
            restore = _restore_file if entry["kind"] == "file" else _restore_folder
            said += [f"{name} had been edited since: that is kept as {workspace.relative(kept)}."
                     for kept in restore(path, entry, workspace.prompt_log / name)]
    _clean(workspace, journal)
    return said


def _restore_file(path: Path, entry: dict[str, Any], kept: Path) -> Iterator[Path]:
    old = _old(path)
    if entry["existed"] and not old.exists():
        return   # not yet touched, or back already
    known = {entry.get("new"), digests.of_file(old) if entry["existed"] else None}
    if "new" in entry and path.is_file() and digests.of_file(path) not in known:
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, kept)   # it was edited after the interruption
        yield kept
    if entry["existed"]:
        old.replace(path)
    else:
        path.unlink(missing_ok=True)


def _restore_folder(path: Path, entry: dict[str, Any], kept: Path) -> Iterator[Path]:
    old = _old(path)
    touched = _there(old) or (not entry["existed"] and "new" in entry)
    if touched and _there(path):
        ours = entry.get("new", {})
        for name, size in _sizes(path).items():
            if ours.get(name) != size:
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(path / name, kept / name)
                yield kept / name
        _delete(path)
    if _there(old):
        old.rename(path)


def _clean(workspace: Workspace, journal: dict[str, Any]) -> None:
    for name in journal["paths"]:
        path = workspace.root / name
        for leftover in (_old(path), _new(path), temp_path(path), temp_path(_old(path))):
            _delete(leftover)
    workspace.journal.unlink(missing_ok=True)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old.tmp")


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new.tmp")


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _sizes(folder: Path) -> dict[str, int]:
    """Every file below `folder`; a link to a folder has none."""
    if folder.is_symlink():
        return {}
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*"))
            if path.is_file()}


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _words(error: BaseException) -> str:
    if isinstance(error, MoaError):
        return str(error).rstrip(".")
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {Path(error.filename).name}" if error.filename else error.strerror
    return str(error) or type(error).__name__
