"""The queue of files with new rows, data/incoming: lists it, adds files to it, and moves them into data/raw.

    data/incoming/NAME/...                 rows of the domain NAME, put there by `moa ingest` or by any other program
    data/incoming/NAME/.FILE.origin.json   beside a file: its original name, if `moa ingest` brought it

The files themselves are the queue: no other record exists. A file leaves it only when it is stored in data/raw or
quarantined (`moa.workspace.quarantine`).
"""

import contextlib
import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from moa.core import digests
from moa.core.config import Config, Domain, load
from moa.core.errors import ArtifactError, DataError, UsageError
from moa.core.files import read_json, write_json
from moa.core.names import printable
from moa.core.paths import Workspace
from moa.core.text import name_list
from moa.data.conversations import RowRejected, conversation
from moa.data.readers import FORMATS, read_file
from moa.workspace import domains, row_sources
from moa.workspace.data_versions import DataVersions
from moa.workspace.origins import origins
from moa.workspace.quarantine import quarantined, reject, release
from moa.workspace.row_sources import HubDataset, SourceFile

UNFINISHED = (".part", ".tmp", ".crdownload", ".partial", "~")   # names of files that another program is still writing
AHEAD = 60.0   # seconds; a file with a time farther in the future was written before the clock was set back


@dataclass(frozen=True)
class Arrival:
    """A file in data/incoming."""

    domain: str       # "" for a file directly in data/incoming
    path: Path
    size: int         # bytes
    modified: float   # seconds since 1970


def waiting_files(workspace: Workspace) -> list[Arrival]:
    """Every file in data/incoming, usable or not, except hidden and unfinished ones; sorted by path."""
    arrivals = []
    for folder, folders, files in os.walk(workspace.incoming):
        folders[:] = [name for name in folders if not _passed_over(name)]
        for path in (Path(folder, name) for name in files if not _passed_over(name)):
            with contextlib.suppress(OSError):   # the file was removed meanwhile
                state = path.stat()
                if stat.S_ISREG(state.st_mode):
                    parts = path.relative_to(workspace.incoming).parts
                    # A program that copies may set st_mtime to any time; the file system itself sets st_ctime.
                    arrivals.append(Arrival(parts[0] if len(parts) > 1 else "", path, state.st_size,
                                            min(state.st_mtime, state.st_ctime)))
    return sorted(arrivals, key=lambda arrival: arrival.path)


def _passed_over(name: str) -> bool:
    """Whether a file of this name is hidden or unfinished."""
    return name.startswith(".") or name.lower().endswith(UNFINISHED)


def settled_files(arrivals: Sequence[Arrival], seconds: float, now: float) -> list[Arrival]:
    """The arrivals that were last written at least `seconds` before `now` (seconds since 1970), so are complete."""
    return [arrival for arrival in arrivals if now - arrival.modified >= seconds or arrival.modified > now + AHEAD]


def incoming_signature(arrivals: Sequence[Arrival]) -> str:
    """A digest of the paths, sizes and times of the files, which changes when a file is added, removed or written."""
    lines = sorted(b"%s %d %r" % (os.fsencode(arrival.path), arrival.size, arrival.modified) for arrival in arrivals)
    return digests.of_bytes(b"\n".join(lines))


def usable_row_count(config: Config, arrival: Arrival) -> int:
    """Number of rows of a waiting file that its domain can use; 0 = `ingest` will reject the file."""
    try:
        check_domain_folder(arrival.domain)
    except UsageError:
        return 0
    if arrival.domain in config.quickstart:
        return 0
    return count_rows(arrival.path, domains.reading_of(config, arrival.domain, {}))


def count_rows(path: Path, domain: Domain | None = None) -> int:
    """Number of rows of a file that become conversations with the settings of `domain`; 0 for an unreadable file.

    Without `domain`, counts the rows that can be read at all.
    """
    try:
        state = path.stat()
        return _counted(path, state.st_size, state.st_mtime_ns, domain.model_dump_json() if domain else None)
    except (DataError, OSError):
        return 0


@lru_cache(maxsize=4096)   # a process that watches the folder counts the same files repeatedly
def _counted(path: Path, _size: int, _modified: int, reading: str | None) -> int:
    if path.suffix.lower() not in FORMATS:
        return 0
    return usable_rows(path, path.name, Domain.model_validate_json(reading) if reading else None)


def usable_rows(path: Path, name: str, domain: Domain | None) -> int:
    """Number of usable rows, as `count_rows`, of the file at `path`, whose original name is `name`.

    Raises DataError when the file does not have the format of its name, or is truncated.
    """
    return sum(_usable(raw.value, domain) for raw in read_file(path, name))


def _usable(value: Any, domain: Domain | None) -> bool:
    """Whether a row becomes a conversation, or without `domain`, whether it could be read."""
    if domain is None:
        return not isinstance(value, RowRejected)
    try:
        conversation(value, domain)
    except RowRejected:
        return False
    return True


def check_domain_folder(name: str) -> None:
    """Raise UsageError unless `name` can be the name of a domain; "" stands for data/incoming itself and is refused."""
    if not name:
        raise UsageError("It lies directly in data/incoming; put it into data/incoming/NAME, where NAME is its domain.")
    domains.valid_name(name)


__all__ = [
    "Arrival",
    "IngestResult",
    "count_rows",
    "incoming_signature",
    "ingest",
    "put_back",
    "queue",
    "queued_text",
    "refused_files",
    "reject",
    "settled_files",
    "take_back",
    "usable_row_count",
    "waiting_files",
]


def _check(source: SourceFile, config: Config, name: str, domain: Domain) -> int:
    """Number of usable rows of a file. Raises DataError when there is none, or a column is missing."""
    if source.path.suffix.lower() not in FORMATS:
        raise DataError(f"{source.origin} is not of a known format; files end with {', '.join(FORMATS)}.")
    try:
        row_sources.check(source, domain)
    except DataError as error:
        hint = ("" if name in config.domains else
                f" A domain whose columns are called otherwise begins with `moa domain add {name} FILE --map ...`.")
        raise DataError(f"{error}{hint}") from None
    return usable_rows(source.path, source.origin, domain)


# Adding files to the queue.

def queue(workspace: Workspace, name: str, sources: Sequence[str], here: Path, hub: HubDataset | None = None
          ) -> dict[str, Any]:
    """Copy the files of `sources` into data/incoming/NAME, all or none.

    Takes no lock, because another process may hold it for hours; several processes may queue files at once.

    Args:
        sources: files, folders or data sets of a hub.
        here: folder that relative sources start from.

    Returns:
        Facts for `queued_text`: the queued files, and those that were skipped and why.

    Raises UsageError, ConfigError or DataError, as `moa.workspace.domains.add` does.
    """
    config = load(workspace.params)
    check_domain_folder(name)
    if name in config.quickstart:
        raise UsageError(f"The rows of {name} are generated by quickstart in params.yaml: ingest yours under another "
                         f"name, or run `moa domain remove {name}` first.")
    domain = domains.reading_of(config, name, {})
    folder = workspace.incoming / name
    with row_sources.gathered(workspace, sources, here, hub or HubDataset()) as gathered:
        counts = {source.digest: _check(source, config, name, domain) for source in gathered.found}
        present = [source for source in gathered.found if _lies_in(row_sources.raw_files(workspace.raw(name)), source)]
        queued = [arrival.path for arrival in waiting_files(workspace) if arrival.domain == name]
        waiting = [source for source in gathered.found if source not in present and _lies_in(queued, source)]
        new = [source for source in gathered.found if source not in [*present, *waiting]]
        if new:
            _put(new, folder)
    return {"domain": name, "new": name not in config.domains, "folder": workspace.relative(folder),
            "files": [{"name": source.name(), "origin": source.origin, "size": source.size, "digest": source.digest,
                       "rows": counts[source.digest]} for source in new],
            "already_there": [source.origin for source in present],
            "already_waiting": [*(source.origin for source in waiting), *gathered.twice],
            "ignored": list(gathered.ignored)}


def _lies_in(paths: Sequence[Path], source: SourceFile) -> bool:
    """Whether one of `paths` has the content of the file."""
    for path in paths:
        with contextlib.suppress(OSError):   # another process is moving it into data/raw
            if path.stat().st_size == source.size and digests.of_file(path) == source.digest:
                return True
    return False


def _put(new: Sequence[SourceFile], folder: Path) -> None:
    """Copy the files into `folder` under hidden names, and rename them when every copy is complete and on disk."""
    temporary = {folder / f".{source.name()}.{os.getpid()}.part": source for source in new}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for abandoned in folder.glob(".*.*.part"):
            if not row_sources.process_is_alive(abandoned.name.split(".")[-2]):
                abandoned.unlink(missing_ok=True)
        for path, source in temporary.items():
            row_sources.copy_checked(source, path)
            write_json(_origin_of(folder / source.name()), {"origin": source.origin})
        for path, source in temporary.items():
            path.replace(folder / source.name())
        for each in (folder, folder.parent):
            _sync(each)
    except OSError as error:
        raise ArtifactError(f"Nothing can be queued in {folder.name}: {error.strerror or error}; mend that and run the "
                            "command again.") from error
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Write a folder's entries to disk, so that the names of new files survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _origin_of(path: Path) -> Path:
    """The file beside `path` that holds its original name."""
    return path.with_name(f".{path.name}.origin.json")


def queued_text(done: dict[str, Any]) -> str:
    """Describe the result of `queue`, as `moa ingest` prints it."""
    total = sum(file["rows"] for file in done["files"])
    lines = [f"{len(done['files'])} file{'' if len(done['files']) == 1 else 's'} with {total} usable rows of "
             f"{'the new domain ' if done['new'] else ''}{done['domain']} queued in {done['folder']}."
             if done["files"] else "Nothing new to queue."]
    lines += [f"  {file['name']}  {file['rows']} rows, from {file['origin']}" for file in done["files"]]
    skipped = {"already_there": f"Already in data/raw/{done['domain']}", "already_waiting": "Waiting already",
               "ignored": "Passed over, not of a known format"}
    lines += [f"{reason}: {name_list(done[key])}." for key, reason in skipped.items() if done[key]]
    return "\n".join(lines)


# Moving files into data/raw.

@dataclass(frozen=True)
class IngestResult:
    """What `ingest` did with the waiting files of one domain."""

    domain: str
    new: bool                        # params.yaml lacked the domain
    files: list[dict[str, Any]]      # stored in data/raw: name there, origin, digest, rows
    already_there: list[str]         # origins of files whose content data/raw held
    rejected: list[dict[str, Any]]   # quarantined: file, reason, kept (its place)
    before: str | None               # for `domains.revert_rows`: the earlier text of data/raw/NAME.dvc, "" or None


def ingest(versions: DataVersions, arrivals: Sequence[Arrival]) -> list[IngestResult]:
    """Move waiting files into data/raw and version them, or quarantine them; all files of a domain or none.

    The caller holds the lock. The files of a new domain go on waiting while they have fewer usable rows than
    `prepare.min_rows`.

    Returns:
        The results of the domains for which anything was done.

    Raises MoaError for faults of the workspace or the disk; files that are not in data/raw by then still wait.
    """
    groups = groupby(sorted(arrivals, key=lambda each: (each.domain, each.path)), key=lambda each: each.domain)
    results = [_take_domain(versions, name, list(group)) for name, group in groups]
    return [each for each in results if each.files or each.already_there or each.rejected]


@dataclass(frozen=True)
class _Inspected:
    """A waiting file that can be used."""

    arrival: Arrival
    source: SourceFile
    rows: int                # usable ones
    state: tuple[int, int]   # size and time; a file that was replaced since has others and is not deleted


def _take_domain(versions: DataVersions, name: str, arrivals: Sequence[Arrival]) -> IngestResult:
    workspace, config = versions.workspace, load(versions.workspace.params)
    new = name not in config.domains
    try:
        check_domain_folder(name)
        domains.refuse_generated(versions, config, name)
        _refuse_foreign(workspace, config, name)
    except UsageError as error:
        rejected = reject(workspace, name, [each.path for each in arrivals], str(error))
        return IngestResult(printable(name), new, [], [], rejected, None)
    present = {found.digest for found in domains.raw_files(workspace, name)}
    usable, bad = _inspect(arrivals, config, name, present)
    if new and 0 < sum(each.rows for each in usable) < config.prepare.min_rows:
        usable = []
    fresh: dict[str, _Inspected] = {}
    for each in usable:
        if each.source.digest not in present:
            fresh.setdefault(each.source.digest, each)
    files = {domains.free_name(each.source, workspace.raw(name)): each for each in fresh.values()}
    before = None
    if files:
        domains.version_rows(versions, name)
        tracked = workspace.tracked(name)
        before = tracked.read_text(encoding="utf-8") if tracked.exists() else None if new else ""
        domains.add_files(versions, name, domains.reading_of(config, name, {}),
                          {file: each.source for file, each in files.items()}, "moa adapt", link=True)
    for each in usable:
        _delete(each)
    rejected = [fact for arrival, reason in bad for fact in reject(workspace, name, [arrival.path], reason,
                                                                   origin=_original_name(arrival))]
    for arrival, _ in bad:
        _forget_origin(arrival.path)
    return IngestResult(name, new, [{"name": file, "origin": each.source.origin, "digest": each.source.digest,
                                     "rows": each.rows}
                                    for file, each in files.items()],
                        [each.source.origin for each in usable if each not in fresh.values()], rejected, before)


def put_back(workspace: Workspace, name: str, paths: Sequence[Path]) -> None:
    """Copy files of data/raw/NAME back into data/incoming/NAME, with their times and origins.

    Files whose content waits there already are left out. The caller holds the lock, and restores data/raw afterwards.
    Raises ArtifactError when the disk refuses.
    """
    folder, original = workspace.incoming / name, origins(workspace, name)
    for path in paths:
        waiting = [each.path for each in waiting_files(workspace) if each.domain == name]
        if _lies_in(waiting, row_sources.look(path, path.name)):
            continue
        target = _free_place(folder, path.name)
        temporary = folder / f".{target.name}.{os.getpid()}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            write_json(_origin_of(target), {"origin": original.get(path.name, path.name)})
            temporary.replace(target)
        except OSError as error:
            raise ArtifactError(f"{printable(path.name)} cannot be put back into {workspace.relative(folder)}: "
                                f"{error.strerror or error}; mend that, and the next run tries again.") from error
        finally:
            temporary.unlink(missing_ok=True)


def _free_place(folder: Path, name: str) -> Path:
    """A path in `folder` that no file has: of this name, or with a number before its suffix."""
    path = Path(name)
    names = [name, *(f"{path.stem}-{number}{path.suffix}" for number in range(1, 1000))]
    return next(folder / each for each in names if not (folder / each).exists())


def refused_files(workspace: Workspace, name: str) -> list[Path]:
    """The files of domain `name` in the quarantine that have usable rows.

    Raises UsageError when there is none.
    """
    check_domain_folder(name)
    config = load(workspace.params)
    reading = domains.reading_of(config, name, {})
    found = [path for path in quarantined(workspace, name) if count_rows(path, reading)]
    if not found:
        raise UsageError(f"No rows of {name} were refused: {workspace.relative(workspace.quarantine)}/{name} holds no "
                         "file with usable rows.")
    return found


def take_back(workspace: Workspace, name: str, paths: Sequence[Path]) -> list[Arrival]:
    """Move quarantined files of domain `name` into data/incoming/NAME, where they wait as before.

    The caller holds the lock.
    """
    folder = workspace.incoming / name
    targets = set()
    for path in paths:
        folder.mkdir(parents=True, exist_ok=True)
        targets.add(release(path, _free_place(folder, path.name)))
    return [each for each in waiting_files(workspace) if each.path in targets]


def _refuse_foreign(workspace: Workspace, config: Config, name: str) -> None:
    """Raise UsageError where a new domain has files in data/raw: undoing the domain would delete them, too."""
    if name not in config.domains and domains.raw_files(workspace, name):
        raise UsageError(f"data/raw/{name} holds files, and params.yaml has no domain {name}: run `moa domain add "
                         f"{name}`, or move them away, and put this file into data/incoming/{name} again.")


def _inspect(arrivals: Sequence[Arrival], config: Config, name: str, present: set[str]
               ) -> tuple[list[_Inspected], list[tuple[Arrival, str]]]:
    """The usable arrivals, those with content that data/raw holds included, and the unusable ones with reasons.

    `present`: digests of the files in data/raw/NAME.
    """
    domain = domains.reading_of(config, name, {})
    usable, bad = [], []
    for arrival in arrivals:
        try:
            state = arrival.path.stat()
            source = row_sources.look(arrival.path, _original_name(arrival))
            source = replace(source, stem=source.stem.removesuffix(f"-{source.digest[:12]}"))   # `moa ingest` adds it
            count = 0 if source.digest in present else _check(source, config, name, domain)
            usable.append(_Inspected(arrival, source, count, (state.st_size, state.st_mtime_ns)))
        except (DataError, OSError) as error:
            if arrival.path.exists():   # the user may have removed it
                bad.append((arrival, str(error)))
    return usable, bad


def _original_name(arrival: Arrival) -> str:
    """The name that the file had before `moa ingest` renamed it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return printable(str(read_json(_origin_of(arrival.path))["origin"]))
    return printable(arrival.path.name)


def _delete(inspected: _Inspected) -> None:
    """Delete a file that was stored in data/raw, unless another program has replaced it."""
    path = inspected.arrival.path
    with contextlib.suppress(FileNotFoundError):
        state = path.stat()
        if (state.st_size, state.st_mtime_ns) == inspected.state:
            _forget_origin(path)
            path.unlink()


def _forget_origin(path: Path) -> None:
    with contextlib.suppress(OSError):   # most files have none, and some names are too long for one
        _origin_of(path).unlink()
