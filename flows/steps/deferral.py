"""Rows that were tried and wait for more: why, and how many rows must join them before they are tried again.

    data/incoming/.waiting.json    by domain: the fields of `Deferral`

An entry counts as long as the parameters that the number of rows follows from are the same.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from moa.core import digests
from moa.core.config import Config
from moa.core.files import read_json, write_json
from moa.core.paths import Workspace

NOT_ENOUGH, NO_BETTER = "not enough data", "no better than what answers today"


@dataclass(frozen=True)
class Deferral:
    """Why the rows of a domain wait in data/incoming."""

    why: str      # NOT_ENOUGH or NO_BETTER
    rows: int     # usable rows that must wait there before they are tried again
    lacking: int  # how many of these had not arrived
    rules: str    # digest of the parameters, from `rules_of`
    of: str = ""  # another domain whose rows are lacking instead: its prompts cannot be shown to fare no worse
    kept: int = 0  # rows that the corpus of `of` had

    def lacks(self, waiting: int, of_waiting: int, of_kept: int) -> int:
        """How many rows are lacking now.

        Args:
            waiting: usable rows of the domain in data/incoming.
            of_waiting, of_kept: rows of the domain `of` in data/incoming, and in its corpus.
        """
        return self.kept + self.lacking - of_kept - of_waiting if self.of else self.rows - waiting


def sentence(why: str, lacking: int, of: str) -> str:
    """Why rows wait, in words: `lacking` rows of the domain `of` are missing."""
    return f"{why}: {lacking:,} more row{'' if lacking == 1 else 's'} of {of}"


def reason(name: str, each: Deferral) -> str:
    """Why the rows of domain `name` wait, in words."""
    return sentence(each.why, each.lacking, each.of or name)


def rules_of(config: Config) -> str:
    """Digest of the parameters that decide how many rows a verdict takes."""
    return digests.of_json([config.release.model_dump(mode="json"), config.prepare.model_dump(mode="json")])[:16]


def read(workspace: Workspace, config: Config) -> dict[str, Deferral]:
    """The domains that wait, under the present parameters."""
    found: dict[str, Deferral] = {}
    with suppress(OSError, ValueError, TypeError):   # absent or damaged: the rows are tried again, which loses none
        found = {name: Deferral(**entry) for name, entry in read_json(workspace.deferrals).items()}
    return {name: each for name, each in found.items() if each.rules == rules_of(config)}


def note(workspace: Workspace, config: Config, waits: Mapping[str, Deferral]) -> None:
    """Add entries, or replace those of the same domains."""
    _write(workspace, {**read(workspace, config), **waits})


def forget(workspace: Workspace, config: Config, names: Sequence[str]) -> None:
    """Remove the entries of domains whose rows are tried again."""
    if (present := read(workspace, config)).keys() & set(names):
        _write(workspace, {name: each for name, each in present.items() if name not in names})


def _write(workspace: Workspace, waits: Mapping[str, Deferral]) -> None:
    if waits:
        write_json(workspace.deferrals, {name: asdict(each) for name, each in waits.items()})
    else:
        workspace.deferrals.unlink(missing_ok=True)
