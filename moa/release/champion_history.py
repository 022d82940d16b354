"""Who was champion when, and why: entries that are only ever added. Pure; `moa.release.registry` stores them."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

HISTORY = "moa.champion."
REASON_LENGTH = 2000


@dataclass(frozen=True)
class Entry:
    """One change of champion. `effective` is False for a change that was recorded and then interrupted."""

    key: str
    n: int
    version: int
    digest: str
    previous: int | None
    at: str          # ISO 8601, UTC
    by: str
    reason: str
    effective: bool = True

    def as_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if name not in ("key", "effective")})


def next_entry(entries: Sequence[Entry], version: int, digest: str, current: int | None, reason: str,
               by: str) -> tuple[Entry, bool]:
    """The entry for making `version` champion after `current`, and whether it is new.

    It is not when the last entry says just that: the champion already is, or the change was interrupted.
    """
    last = entries[-1] if entries else None
    if last and last.version == version and current in (version, last.previous):
        return last, False
    n = last.n + 1 if last else 1
    # The random end keeps two writers on two machines from overwriting one another.
    key = f"{HISTORY}{n:06d}-{secrets.token_hex(2)}"
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return Entry(key, n, version, digest, current, at, by, reason[:REASON_LENGTH]), True


def parse(tags: Mapping[str, str], champion: int | None) -> list[Entry]:
    """Entries in order. One took effect if its successor found it in place; of the last, the alias tells.

    Without an alias the last entry is believed: deleting the alias deletes no history.
    """
    entries = sorted((Entry(key=key, **json.loads(value)) for key, value in tags.items()),
                     key=lambda entry: (entry.n, entry.at, entry.key))
    found: list[Entry] = []
    for place, entry in enumerate(entries):
        then = entries[place + 1].previous if place + 1 < len(entries) else champion
        effective = then is None or then == entry.version
        found.append(Entry(**{**asdict(entry), "effective": effective}))
    return found


def previous_champion(entries: Sequence[Entry]) -> Entry | None:
    """The entry that put the champion before the present one in place; None when there was none.

    Going back to an old champion undoes what followed it: after 1, 2, 3 and back to 2, the one before is 1, not 3.
    """
    line: list[Entry] = []
    for entry in entries:
        if entry.effective:
            known = [place for place, one in enumerate(line) if one.version == entry.version]
            line = [*line[:known[0]], entry] if known else [*line, entry]
    return line[-2] if len(line) > 1 else None
