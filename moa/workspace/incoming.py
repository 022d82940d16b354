"""Files that wait in data/incoming to be learned: which wait, how they get in, and how they go on into data/raw.

    data/incoming/NAME/...                 rows of the domain NAME, put there by `moa ingest` or by any other program
    data/incoming/NAME/.FILE.origin.json   beside a file: its original name, if `moa ingest` brought it

The files are the queue: nothing else records what waits. A file leaves only when it is stored in data/raw or
quarantined (`moa.workspace.quarantine`).
"""

import contextlib
import os
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
from moa.workspace.quarantine import reject
from moa.workspace.row_sources import HubDataset, SourceFile

UNFINISHED = (".part", ".tmp", ".crdownload", ".partial", "~")   # names of files that another program is still writing
AHEAD = 60.0   # seconds; a file that much from the future was written before a clock was put back


@dataclass(frozen=True)
class Arrival:
    """A file that waits. `domain` is empty for one that lies directly in data/incoming; `modified`: since 1970."""

    domain: str
    path: Path
    size: int
    modified: float


def waiting_files(workspace: Workspace) -> list[Arrival]:
    """Every file in data/incoming, but for hidden and unfinished ones; unusable files count, too."""
    found = []
    for folder, below, files in os.walk(workspace.incoming):
        below[:] = [name for name in below if not _passed_over(name)]
        for path in (Path(folder, name) for name in files if not _passed_over(name)):
            with contextlib.suppress(OSError):   # taken away again
                state = path.stat()
                if stat.S_ISREG(state.st_mode):
                    parts = path.relative_to(workspace.incoming).parts
                    # Copying may set the first of these to any time, the second is the file system's own.
                    found.append(Arrival(parts[0] if len(parts) > 1 else "", path, state.st_size,
                                         min(state.st_mtime, state.st_ctime)))
    return sorted(found, key=lambda each: each.path)


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name.lower().endswith(UNFINISHED)


def settled_files(arrivals: Sequence[Arrival], seconds: float, now: float) -> list[Arrival]:
    """Those that were last written to so many seconds ago or more."""
    return [each for each in arrivals if now - each.modified >= seconds or each.modified > now + AHEAD]


def incoming_signature(arrivals: Sequence[Arrival]) -> str:
    """A digest that is the same as long as nothing comes, goes or grows."""
    lines = sorted(b"%s %d %r" % (os.fsencode(each.path), each.size, each.modified) for each in arrivals)
    return digests.of_bytes(b"\n".join(lines))


def usable_row_count(config: Config, arrival: Arrival) -> int:
    """How many rows of a file its domain can use; 0 = `ingest` will reject it."""
    try:
        check_domain_folder(arrival.domain)
    except UsageError:
        return 0
    if arrival.domain in config.quickstart:
        return 0
    return count_rows(arrival.path, domains.reading_of(config, arrival.domain, {}))


def count_rows(path: Path, domain: Domain | None = None) -> int:
    """How many rows of a file can be used as `domain` reads them; None = can be read at all. 0 if the file is bad."""
    try:
        state = path.stat()
        return _counted(path, state.st_size, state.st_mtime_ns, domain.model_dump_json() if domain else None)
    except (DataError, OSError):
        return 0


@lru_cache(maxsize=4096)   # a watching process asks again and again
def _counted(path: Path, _size: int, _modified: int, reading: str | None) -> int:
    if path.suffix.lower() not in FORMATS:
        return 0
    return usable_rows(path, path.name, Domain.model_validate_json(reading) if reading else None)


def usable_rows(path: Path, name: str, domain: Domain | None) -> int:
    """The same of a file whose original name is `name`.

    Raises DataError when the file is not what its name says, or breaks off.
    """
    return sum(_usable(raw.value, domain) for raw in read_file(path, name))


def _usable(value: Any, domain: Domain | None) -> bool:
    if domain is None:
        return not isinstance(value, RowRejected)
    try:
        conversation(value, domain)
    except RowRejected:
        return False
    return True


def check_domain_folder(name: str) -> None:
    """Raise UsageError unless the folder data/incoming/NAME can be a domain's; empty = data/incoming itself."""
    if not name:
        raise UsageError("It lies directly in data/incoming; put it into data/incoming/NAME, where NAME is its domain.")
    domains.valid_name(name)


__all__ = [
    "Arrival",
    "IngestResult",
    "count_rows",
    "incoming_signature",
    "ingest",
    "queue",
    "queued_text",
    "reject",
    "settled_files",
    "usable_row_count",
    "waiting_files",
]


def _check(found: SourceFile, config: Config, name: str, domain: Domain) -> int:
    """How many rows can be used. Raises DataError when that is none, or a column is missing."""
    if found.path.suffix.lower() not in FORMATS:
        raise DataError(f"{found.origin} is not of a known format; files end with {', '.join(FORMATS)}.")
    try:
        row_sources.check(found, domain)
    except DataError as error:
        hint = ("" if name in config.domains else
                f" A domain whose columns are called otherwise begins with `moa domain add {name} FILE --map ...`.")
        raise DataError(f"{error}{hint}") from None
    return usable_rows(found.path, found.origin, domain)


# How files get there.

def queue(workspace: Workspace, name: str, sources: Sequence[str], here: Path, hub: HubDataset | None = None
          ) -> dict[str, Any]:
    """Copy the files behind `sources` to data/incoming/NAME, all or none; what was done.

    Takes no lock: another process may be building for hours, or queueing too. Raises UsageError, ConfigError or
    DataError as `moa domain add` does.
    """
    config = load(workspace.params)
    check_domain_folder(name)
    if name in config.quickstart:
        raise UsageError(f"The rows of {name} are generated by quickstart in params.yaml: ingest yours under another "
                         f"name, or run `moa domain remove {name}` first.")
    domain = domains.reading_of(config, name, {})
    folder = workspace.incoming / name
    with row_sources.gathered(workspace, sources, here, hub or HubDataset()) as gathered:
        counts = {found.digest: _check(found, config, name, domain) for found in gathered.found}
        there = [found for found in gathered.found if _lies_in(row_sources.raw_files(workspace.raw(name)), found)]
        queued = [each.path for each in waiting_files(workspace) if each.domain == name]
        twice = [found for found in gathered.found if found not in there and _lies_in(queued, found)]
        new = [found for found in gathered.found if found not in [*there, *twice]]
        if new:
            _put(new, folder)
    return {"domain": name, "new": name not in config.domains, "folder": workspace.relative(folder),
            "files": [{"name": found.name(), "origin": found.origin, "size": found.size, "digest": found.digest,
                       "rows": counts[found.digest]} for found in new],
            "already_there": [found.origin for found in there],
            "already_waiting": [*(found.origin for found in twice), *gathered.twice],
            "ignored": list(gathered.ignored)}


def _lies_in(paths: Sequence[Path], found: SourceFile) -> bool:
    for path in paths:
        with contextlib.suppress(OSError):   # a run is taking it in
            if path.stat().st_size == found.size and digests.of_file(path) == found.digest:
                return True
    return False


def _put(new: Sequence[SourceFile], folder: Path) -> None:
    """Copy under hidden names, and rename when every copy is complete and on disk."""
    temporary = {folder / f".{found.name()}.{os.getpid()}.part": found for found in new}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.*.part"):
            if not row_sources.process_is_alive(left.name.split(".")[-2]):
                left.unlink(missing_ok=True)
        for path, found in temporary.items():
            row_sources.copy_checked(found, path)
            write_json(_origin_of(folder / found.name()), {"origin": found.origin})
        for path, found in temporary.items():
            path.replace(folder / found.name())
        for each in (folder, folder.parent):
            _to_disk(each)
    except OSError as error:
        raise ArtifactError(f"Nothing can be queued in {folder.name}: {error.strerror or error}; mend that and run the "
                            "command again.") from error
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def _to_disk(folder: Path) -> None:
    """The names in a folder, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _origin_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.origin.json")


def queued_text(done: dict[str, Any]) -> str:
    """What `moa ingest` says."""
    total = sum(each["rows"] for each in done["files"])
    lines = [f"{len(done['files'])} file{'' if len(done['files']) == 1 else 's'} with {total} usable rows of "
             f"{'the new domain ' if done['new'] else ''}{done['domain']} queued in {done['folder']}."
             if done["files"] else "Nothing new to queue."]
    lines += [f"  {each['name']}  {each['rows']} rows, from {each['origin']}" for each in done["files"]]
    told = {"already_there": f"Already in data/raw/{done['domain']}", "already_waiting": "Waiting already",
            "ignored": "Passed over, not of a known format"}
    lines += [f"{what}: {name_list(done[key])}." for key, what in told.items() if done[key]]
    return "\n".join(lines)


# How they are taken in.

@dataclass(frozen=True)
class IngestResult:
    """What became of the files of one domain.

    `files`: name in data/raw, origin, digest, rows. `already_there`: origins of files whose content data/raw holds.
    `rejected`: file, reason. `before`: text of data/raw/NAME.dvc before them, for `domains.revert`; None = there was no
    such domain, empty = it had no rows.
    """

    domain: str
    new: bool
    files: list[dict[str, Any]]
    already_there: list[str]
    rejected: list[dict[str, Any]]
    before: str | None


def ingest(versions: DataVersions, arrivals: Sequence[Arrival]) -> list[IngestResult]:
    """Move what arrived to data/raw, versioned, each domain all or nothing; those for which anything happened.

    The caller holds the lock. A new domain with fewer usable rows than `prepare.min_rows` stays where it is. Raises
    MoaError when the workspace or the disk is at fault; the files that are not in data/raw by then still wait.
    """
    groups = groupby(sorted(arrivals, key=lambda each: (each.domain, each.path)), key=lambda each: each.domain)
    taken = [_take_domain(versions, name, list(group)) for name, group in groups]
    return [each for each in taken if each.files or each.already_there or each.rejected]


@dataclass(frozen=True)
class _Seen:
    """An arrival that was looked at. `state`: so that a file that was replaced meanwhile is not deleted."""

    arrival: Arrival
    found: SourceFile
    rows: int
    state: tuple[int, int]


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
    there = {found.digest for found in domains.raw_files(workspace, name)}
    usable, bad = _looked_at(arrivals, config, name, there)
    if new and 0 < sum(each.rows for each in usable) < config.prepare.min_rows:
        usable = []
    fresh: dict[str, _Seen] = {}
    for each in usable:
        if each.found.digest not in there:
            fresh.setdefault(each.found.digest, each)
    files = {domains.free_name(each.found, workspace.raw(name)): each for each in fresh.values()}
    before = None
    if files:
        domains.version_rows(versions, name)
        tracked = workspace.tracked(name)
        before = tracked.read_text(encoding="utf-8") if tracked.exists() else None if new else ""
        domains.add_files(versions, name, domains.reading_of(config, name, {}),
                          {file: each.found for file, each in files.items()}, "moa adapt", link=True)
    for each in usable:
        _delete(each)
    rejected = [fact for arrival, reason in bad for fact in reject(workspace, name, [arrival.path], reason,
                                                                   origin=_called(arrival))]
    for arrival, _ in bad:
        _forget_origin(arrival.path)
    return IngestResult(name, new, [{"name": file, "origin": each.found.origin, "digest": each.found.digest,
                                     "rows": each.rows}
                                    for file, each in files.items()],
                        [each.found.origin for each in usable if each not in fresh.values()], rejected, before)


def _refuse_foreign(workspace: Workspace, config: Config, name: str) -> None:
    """Undoing a new domain deletes its rows, so none of them may have been there before."""
    if name not in config.domains and domains.raw_files(workspace, name):
        raise UsageError(f"data/raw/{name} holds files, and params.yaml has no domain {name}: run `moa domain add "
                         f"{name}`, or move them away, and put this file into data/incoming/{name} again.")


def _looked_at(arrivals: Sequence[Arrival], config: Config, name: str, there: set[str]
               ) -> tuple[list[_Seen], list[tuple[Arrival, str]]]:
    """What can be used, what lies in data/raw already included; and what cannot, with reasons."""
    domain = domains.reading_of(config, name, {})
    usable, bad = [], []
    for arrival in arrivals:
        try:
            state = arrival.path.stat()
            found = row_sources.look(arrival.path, _called(arrival))
            found = replace(found, stem=found.stem.removesuffix(f"-{found.digest[:12]}"))   # `moa ingest` adds it
            count = 0 if found.digest in there else _check(found, config, name, domain)
            usable.append(_Seen(arrival, found, count, (state.st_size, state.st_mtime_ns)))
        except (DataError, OSError) as error:
            if arrival.path.exists():   # unless the user took it back
                bad.append((arrival, str(error)))
    return usable, bad


def _called(arrival: Arrival) -> str:
    """The file's original name."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return printable(str(read_json(_origin_of(arrival.path))["origin"]))
    return printable(arrival.path.name)


def _delete(seen: _Seen) -> None:
    path = seen.arrival.path
    with contextlib.suppress(FileNotFoundError):
        state = path.stat()
        if (state.st_size, state.st_mtime_ns) == seen.state:
            _forget_origin(path)
            path.unlink()


def _forget_origin(path: Path) -> None:
    with contextlib.suppress(OSError):   # there is none of most files, and of some the name would be too long
        _origin_of(path).unlink()
