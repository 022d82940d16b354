"""An adaptation that is under way, on disk: what it took in and what was there before, until it is released or undone.

Whatever ends the process, the next run finds the attempt and brings it to an end.
"""

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from moa.core.files import read_json, write_json
from moa.core.paths import Workspace
from moa.workspace import domains, incoming, warm_starts
from moa.workspace.data_versions import DataVersions
from moa.workspace.warm_starts import InitialExpert


@dataclass
class DomainBefore:
    """A domain as it was. `tracked` is the text of data/raw/NAME.dvc; empty = it had no rows, None = it was none."""

    known: bool
    tracked: str | None
    files: list[str]
    start: dict[str, str] | None


@dataclass
class AdaptationState:
    """`before` by domain. `started`: whose expert's start is decided. `refused`: why these domains are being undone."""

    began: float
    trigger: str
    before: dict[str, DomainBefore] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, workspace: Workspace) -> Self | None:
        """The one that did not come to an end, if there is one."""
        try:
            found = read_json(workspace.adaptation_state)
        except FileNotFoundError:
            return None
        return cls(**{**found, "before": {name: DomainBefore(**each) for name, each in found["before"].items()}})

    @classmethod
    def begin(cls, trigger: str) -> Self:
        return cls(time.time(), trigger)

    def note(self, workspace: Workspace, names: dict[str, bool]) -> None:
        """Remember how these domains are, before anything happens to them; `names` says which are known already."""
        known = warm_starts.read(workspace)
        for name, is_known in names.items():
            start = known.get(name)
            self.before.setdefault(name, DomainBefore(is_known, _tracked(workspace, name) or ("" if is_known else None),
                                                      [path.name for path in _paths(workspace, name)],
                                                      asdict(start) if start else None))
        self.save(workspace)

    def touched(self, workspace: Workspace) -> list[str]:
        """The domains whose rows are other ones than before."""
        return [name for name, before in self.before.items() if _tracked(workspace, name) != (before.tracked or "")]

    def refuse(self, workspace: Workspace, names: list[str], reason: str) -> None:
        self.refused.update(dict.fromkeys(names, reason))
        self.save(workspace)

    def undo(self, versions: DataVersions) -> dict[str, list[str]]:
        """Bring the refused domains back to what they were; their new files, by domain, lie among the rejected."""
        workspace = versions.workspace
        gone: dict[str, list[str]] = {}
        for name, reason in sorted(self.refused.items()):
            before = self.before[name]
            new = [path for path in _paths(workspace, name) if path.name not in before.files]
            incoming.reject(workspace, name, new, reason)
            domains.revert_rows(versions, name, before.tracked)
            wanted = {**warm_starts.read(workspace), name: InitialExpert(**before.start) if before.start else None}
            warm_starts.restore(versions, {each: start for each, start in wanted.items() if start is not None})
            gone[name] = [path.name for path in new]
            del self.before[name]
        self.refused.clear()
        self.save(workspace)
        return gone

    def save(self, workspace: Workspace) -> None:
        write_json(workspace.adaptation_state, asdict(self))

    def end(self, workspace: Workspace) -> None:
        workspace.adaptation_state.unlink(missing_ok=True)


def _tracked(workspace: Workspace, name: str) -> str:
    path = workspace.tracked(name)
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _paths(workspace: Workspace, name: str) -> list[Any]:
    return sorted(path for path in workspace.raw(name).rglob("*") if path.is_file())
