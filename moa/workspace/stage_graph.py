"""The pipeline as plain data: stages, what each needs, and why it is stale.

`reasons` translates what DVC's status says of a stage; nothing else here knows DVC, and nothing runs a stage.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moa.core.errors import UsageError

# Why a stage must run. "restore": only its outputs are missing, DVC may have them in its cache.
FORCED, NEW, CHANGED, RESTORE = "forced", "new", "changed", "restore"
# Steps that `--domain` limits; what follows them needs every domain.
PER_DOMAIN = frozenset({"quickstart", "prepare", "train"})


@dataclass(frozen=True)
class Stage:
    """One node: `train@math` is step `train` of domain `math`."""

    name: str
    command: str | None   # None: data that DVC tracks without a command
    outputs: tuple[str, ...] = ()

    @property
    def step(self) -> str:
        return self.name.split("@", 1)[0]

    @property
    def domain(self) -> str | None:
        _, found, domain = self.name.partition("@")
        return domain if found else None


@dataclass(frozen=True)
class Reason:
    """Why DVC finds a stage stale, without looking further up the graph."""

    kind: str
    text: str


class Graph:
    """Stages and what each is built from. `upstream` maps a stage's name to the names it reads from directly."""

    def __init__(self, stages: Iterable[Stage], upstream: Mapping[str, Iterable[str]]) -> None:
        import networkx as nx

        self.stages = {stage.name: stage for stage in stages}
        self._graph: Any = nx.DiGraph()   # edges go downstream
        self._graph.add_nodes_from(sorted(self.stages))
        self._graph.add_edges_from((above, name) for name in sorted(upstream) for above in sorted(upstream[name]))

    def upstream(self, name: str) -> list[str]:
        return sorted(self._graph.predecessors(name))

    def descendants(self, names: Iterable[str]) -> set[str]:
        """Everything that reads, directly or not, from one of `names`; not the names themselves, unless they do."""
        import networkx as nx

        return {below for name in names for below in nx.descendants(self._graph, name)}

    def generations(self) -> list[list[str]]:
        """Stages in the order they can run; those of one generation do not need each other."""
        import networkx as nx

        return [sorted(generation) for generation in nx.topological_generations(self._graph)]

    def matching(self, word: str) -> list[str]:
        """Stages meant by `train` or `train@math`. Raises UsageError naming what there is."""
        found = sorted(name for name, stage in self.stages.items() if stage.command and word in (name, stage.step))
        if not found:
            known = sorted({stage.step for stage in self.stages.values() if stage.command})
            raise UsageError(f"No stage {word!r}; name a step ({', '.join(known)}) or one domain of it, "
                             "such as train@math.")
        return found


@dataclass(frozen=True)
class Snapshot:
    """The pipeline at one moment. `stale` holds the directly stale stages; the rest follows from the graph."""

    graph: Graph
    stale: Mapping[str, tuple[Reason, ...]]
    left_out: frozenset[str] = frozenset()

    @property
    def affected(self) -> set[str]:
        """Stages that are stale or may become so when those above them run: the transitive closure."""
        below = {name for name in self.graph.descendants(self.stale) if self.graph.stages[name].command}
        return (set(self.stale) | below) - self.left_out

    def forced(self, words: Iterable[str]) -> "Snapshot":
        """The same with every stage named in `words` made stale."""
        stale = dict(self.stale)
        for word in words:
            for name in self.graph.matching(word):
                stale[name] = (Reason(FORCED, f"forced (--force {word})"), *stale.get(name, ()))
        return replace(self, stale=stale)

    def limited(self, domains: Iterable[str] | None) -> "Snapshot":
        """The same without the per-domain steps of other domains; None = all domains."""
        if domains is None:
            return self
        kept = set(domains)
        out = frozenset(name for name, stage in self.graph.stages.items()
                        if stage.step in PER_DOMAIN and stage.domain is not None and stage.domain not in kept)
        return replace(self, stale={name: why for name, why in self.stale.items() if name not in out}, left_out=out)


def reasons(changes: Sequence[Any], paths: Mapping[str, str], *, recorded: bool) -> tuple[Reason, ...]:
    """`changes`: what DVC's status says of one stage. `paths`: our names of the files that it names.

    `recorded`: whether the stage ever ran.
    """
    if not recorded:
        return (Reason(NEW, "never run"),)
    return tuple(reason for change in changes for reason in _explain(change, paths))


def _explain(change: Any, paths: Mapping[str, str]) -> Iterator[Reason]:
    """One entry of DVC's status: a word, or changed inputs or outputs by path."""
    if not isinstance(change, Mapping):
        yield Reason(CHANGED, "its command changed" if change == "changed command" else str(change))
        return
    for path, state in change.get("changed deps", {}).items():
        if isinstance(state, Mapping):
            begins = path.endswith(".moa/starts.json")
            yield from (Reason(CHANGED, "where its training begins changed" if begins else
                               f"parameter {key} {_state(how)}") for key, how in state.items())
        else:
            yield Reason(CHANGED, f"{paths.get(path, path)} {_state(state)}")
    for path, state in change.get("changed outs", {}).items():
        if state == "modified":
            yield Reason(CHANGED, f"its output {paths.get(path, path)} was changed by something else")
        else:
            yield Reason(RESTORE, f"its output {paths.get(path, path)} is "
                                  f"{'missing' if state == 'deleted' else state}")


def _state(state: str) -> str:
    return {"modified": "changed", "deleted": "is missing", "new": "is new"}.get(state, state)
