"""The append-only history of champions: version, time, user and reason of each promotion.

The functions are pure; `moa.release.registry` stores the entries as tags of the registered model.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

HISTORY = "moa.champion."   # prefix of the tags that hold entries
REASON_LENGTH = 2000     # characters of a reason that are stored


@dataclass(frozen=True)
class Entry:
    """One change of champion. `effective` is False for a change that was recorded and then interrupted."""

    key: str         # of the tag
    n: int           # number of the change, from 1
    version: int
    digest: str      # of the version's content
    previous: int | None   # version that was champion before
    at: str          # ISO 8601, UTC
    by: str
    reason: str
    effective: bool = True

    def as_json(self) -> str:
        """The value of the entry's tag: all fields but the key, and `effective`, which `parse` derives."""
        return json.dumps({name: value for name, value in asdict(self).items() if name not in ("key", "effective")})


def next_entry(entries: Sequence[Entry], version: int, digest: str, current: int | None, reason: str,
               by: str) -> tuple[Entry, bool]:
    """The entry for making `version` champion after `current`, and whether it is new.

    It is not new when the last entry records the same change: the change is complete, or it was interrupted after the
    entry was stored.
    """
    last = entries[-1] if entries else None
    if last and last.version == version and current in (version, last.previous):
        return last, False
    n = last.n + 1 if last else 1
    # The random suffix keeps two processes on two machines from overwriting each other's entry.
    key = f"{HISTORY}{n:06d}-{secrets.token_hex(2)}"
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return Entry(key, n, version, digest, current, at, by, reason[:REASON_LENGTH]), True


def parse(tags: Mapping[str, str], champion: int | None) -> list[Entry]:
    """The entries in the tags of a registered model, oldest first.

    An entry is `effective` if the next entry names its version as `previous`, or, for the last entry, if its version
    is the present `champion`. With no alias (`champion` is None) the last entry counts as effective: deleting the alias
    deletes no history.
    """
    entries = sorted((Entry(key=key, **json.loads(value)) for key, value in tags.items()),
                     key=lambda entry: (entry.n, entry.at, entry.key))
    judged: list[Entry] = []
    for index, entry in enumerate(entries):
        champion_after = entries[index + 1].previous if index + 1 < len(entries) else champion
        effective = champion_after is None or champion_after == entry.version
        judged.append(Entry(**{**asdict(entry), "effective": effective}))
    return judged


def previous_champion(entries: Sequence[Entry]) -> Entry | None:
    """The entry that put the champion before the present one in place; None when there was none.

    Going back to an old champion undoes what followed it: after 1, 2, 3 and back to 2, the one before is 1, not 3.
    """
    succession: list[Entry] = []
    for entry in entries:
        if entry.effective:
            earlier = [index for index, other in enumerate(succession) if other.version == entry.version]
            succession = [*succession[:earlier[0]], entry] if earlier else [*succession, entry]
    return succession[-2] if len(succession) > 1 else None
