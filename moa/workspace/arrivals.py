"""What waits in data/incoming: which files, whether somebody still writes to them, how many of their rows can be used.

    data/incoming/NAME/...   rows of the domain NAME, put there by `moa ingest` or by anybody

The files are the queue: nothing else records what waits. Only looks; knows nothing of when or how anything is learned.
"""

import contextlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from moa.core import digests
from moa.core.config import Config, Domain
from moa.core.errors import DataError, UsageError
from moa.core.paths import Workspace
from moa.data.conversations import Rejected, conversation
from moa.data.readers import FORMATS, read_file
from moa.workspace import domains

UNFINISHED = (".part", ".tmp", ".crdownload", ".partial", "~")   # names of files that somebody is still writing
AHEAD = 60.0   # seconds; a file that much from the future was written before a clock was put back


@dataclass(frozen=True)
class Arrival:
    """A file that waits. `domain` is empty for one that lies directly in data/incoming; `modified`: since 1970."""

    domain: str
    path: Path
    size: int
    modified: float


def waiting(workspace: Workspace) -> list[Arrival]:
    """Every file in data/incoming, but for hidden and unfinished ones; also those that nobody can use."""
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


def settled(arrivals: Sequence[Arrival], seconds: float, now: float) -> list[Arrival]:
    """Those that nobody has written to for so long."""
    return [each for each in arrivals if now - each.modified >= seconds or each.modified > now + AHEAD]


def signature(arrivals: Sequence[Arrival]) -> str:
    """A digest that is the same as long as nothing comes, goes or grows."""
    lines = sorted(b"%s %d %r" % (os.fsencode(each.path), each.size, each.modified) for each in arrivals)
    return digests.of_bytes(b"\n".join(lines))


def rows(config: Config, arrival: Arrival) -> int:
    """How many rows of a file its domain can use; 0 = `take_in` will reject it."""
    try:
        acceptable(arrival.domain)
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


@lru_cache(maxsize=4096)   # whoever watches asks again and again
def _counted(path: Path, _size: int, _modified: int, reading: str | None) -> int:
    if path.suffix.lower() not in FORMATS:
        return 0
    return usable_rows(path, path.name, Domain.model_validate_json(reading) if reading else None)


def usable_rows(path: Path, name: str, domain: Domain | None) -> int:
    """The same of a file called `name` by people. Raises DataError when it is not what its name says, or breaks off."""
    return sum(_usable(raw.value, domain) for raw in read_file(path, name))


def _usable(value: Any, domain: Domain | None) -> bool:
    if domain is None:
        return not isinstance(value, Rejected)
    try:
        conversation(value, domain)
    except Rejected:
        return False
    return True


def acceptable(name: str) -> None:
    """Raise UsageError unless the folder data/incoming/NAME can be a domain's; empty = data/incoming itself."""
    if not name:
        raise UsageError("It lies directly in data/incoming; put it into data/incoming/NAME, where NAME is its domain.")
    domains.valid_name(name)
