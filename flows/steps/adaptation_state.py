"""The state of an adaptation under way, on disk: how the domains that it changes were before, for an undo.

However the process ends, the next run loads the state and finishes the adaptation.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from flows.steps.deferral import Deferral, note, rules_of
from moa.core.config import load
from moa.core.files import read_json, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.workspace import domains, incoming, warm_starts
from moa.workspace.data_versions import DataVersions
from moa.workspace.warm_starts import InitialExpert


@dataclass
class DomainBefore:
    """A domain as it was before the adaptation."""

    known: bool                    # whether params.yaml had the domain
    tracked: str | None            # text of data/raw/NAME.dvc; empty = it had no rows, None = there was no such domain
    files: list[str]               # names of its files in data/raw
    start: dict[str, str] | None   # its entry in data/starts.json


@dataclass
class AdaptationState:
    """An adaptation under way, as .moa/attempt.json holds it from `note` until `end`."""

    began: float                                                    # seconds since 1970
    trigger: str                                                    # what started it
    before: dict[str, DomainBefore] = field(default_factory=dict)   # by domain
    refused: dict[str, str] = field(default_factory=dict)           # by domain: why it has to be undone
    deferred: dict[str, Deferral] = field(default_factory=dict)     # by domain: why it has to be undone, and waits
    accepted: dict[str, str] = field(default_factory=dict)          # by domain: why a person overrules the gate
    started: list[str] = field(default_factory=list)                # domains where training begins is decided

    @classmethod
    def load(cls, workspace: Workspace) -> Self | None:
        """The state of the adaptation that has not ended; None if there is none."""
        try:
            state = read_json(workspace.adaptation_state)
        except FileNotFoundError:
            return None
        return cls(**{**state, "before": {name: DomainBefore(**before) for name, before in state["before"].items()},
                      "deferred": {name: Deferral(**each) for name, each in state.get("deferred", {}).items()}})

    @classmethod
    def begin(cls, trigger: str) -> Self:
        """The state of a new adaptation. `note` writes it to disk."""
        return cls(time.time(), trigger)

    def note(self, workspace: Workspace, names: dict[str, bool]) -> None:
        """Record how these domains are, before their rows change, and save. `names`: whether params.yaml has each."""
        starts = warm_starts.read(workspace)
        for name, known in names.items():
            start = starts.get(name)
            self.before.setdefault(name, DomainBefore(known, _tracked(workspace, name) or ("" if known else None),
                                                      [path.name for path in _paths(workspace, name)],
                                                      asdict(start) if start else None))
        self.save(workspace)

    def touched(self, workspace: Workspace) -> list[str]:
        """The domains whose rows differ from before, and so have to be learned."""
        return [name for name, before in self.before.items() if _tracked(workspace, name) != (before.tracked or "")]

    def refuse(self, workspace: Workspace, names: list[str], reason: str) -> None:
        """Mark these domains to be undone, and save."""
        self.refused.update(dict.fromkeys(names, reason))
        self.save(workspace)

    def defer(self, workspace: Workspace, name: str, why: str, lacking: int, of: str) -> None:
        """Mark a domain to be undone, its new rows to wait until `lacking` rows of domain `of` arrive, and save."""
        config = load(workspace.params)
        rows, kept = self.new_rows(workspace, name) + lacking, 0
        if of != name:
            kept = read_json(workspace.corpus(of) / MANIFEST)["rows"]["kept"]
        self.deferred[name] = Deferral(why, rows, lacking, rules_of(config), of if of != name else "", kept)
        self.save(workspace)

    def new_rows(self, workspace: Workspace, name: str) -> int:
        """Number of usable rows in `new_files`."""
        reading = domains.reading_of(load(workspace.params), name, {})
        return sum(incoming.count_rows(path, reading) for path in self.new_files(workspace, name))

    def new_files(self, workspace: Workspace, name: str) -> list[Path]:
        """The files of a domain in data/raw that were not there before."""
        return [path for path in _paths(workspace, name) if path.name not in self.before[name].files]

    def undo(self, versions: DataVersions) -> dict[str, list[str]]:
        """Restore the refused and the deferred domains as they were, and save.

        The new files of refused domains move to data/incoming/.rejected, those of deferred ones back to data/incoming.

        Returns:
            By domain, the names of the files that were moved.
        """
        workspace = versions.workspace
        moved: dict[str, list[str]] = {}
        note(workspace, load(workspace.params), self.deferred)
        for name in sorted(self.refused.keys() | self.deferred.keys()):
            before, new = self.before[name], self.new_files(workspace, name)
            if name in self.refused:
                incoming.reject(workspace, name, new, self.refused[name])
            else:
                incoming.put_back(workspace, name, new)
            domains.revert_rows(versions, name, before.tracked)
            starts = {**warm_starts.read(workspace), name: InitialExpert(**before.start) if before.start else None}
            warm_starts.restore(versions, {domain: start for domain, start in starts.items() if start is not None})
            moved[name] = [path.name for path in new]
            del self.before[name]
            self.started = [each for each in self.started if each != name]
        self.refused.clear()
        self.deferred.clear()
        self.save(workspace)
        return moved

    def save(self, workspace: Workspace) -> None:
        """Write the state to disk."""
        write_json(workspace.adaptation_state, asdict(self))

    def end(self, workspace: Workspace) -> None:
        """Delete the state: the adaptation is released or undone."""
        workspace.adaptation_state.unlink(missing_ok=True)


def _tracked(workspace: Workspace, name: str) -> str:
    """The text of data/raw/NAME.dvc; empty when there is none."""
    path = workspace.tracked(name)
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _paths(workspace: Workspace, name: str) -> list[Path]:
    """The files of a domain in data/raw."""
    return sorted(path for path in workspace.raw(name).rglob("*") if path.is_file())
