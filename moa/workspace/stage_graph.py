"""The pipeline as plain data: the graph of stages, and the reasons why stages are stale.

`reasons` translates DVC's status of a stage; the rest is independent of DVC, and nothing here runs a stage.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moa.core.errors import UsageError

# Kinds of `Reason`. RESTORE: only outputs are missing, which DVC may have in its cache.
FORCED, NEW, CHANGED, RESTORE = "forced", "new", "changed", "restore"
# Words for a change of the inputs that moa keeps in .moa/.
LOCAL_INPUTS = {"starts.json": "where its training begins changed",
                "calibration.json": "which calibration it extends changed"}
# Steps with a stage for each domain, which `--domain` limits; later steps need every domain.
PER_DOMAIN = frozenset({"quickstart", "prepare", "train"})


@dataclass(frozen=True)
class Stage:
    """One node of the graph: the stage `train@math` is step `train` of domain `math`."""

    name: str
    command: str | None   # None: data that DVC tracks without a command
    outputs: tuple[str, ...] = ()

    @property
    def step(self) -> str:
        """The part of the name before @, or the whole name."""
        return self.name.split("@", 1)[0]

    @property
    def domain(self) -> str | None:
        """The domain of a per-domain stage; None for the others."""
        _, separator, domain = self.name.partition("@")
        return domain if separator else None


@dataclass(frozen=True)
class Reason:
    """Why a stage itself is stale, apart from its ancestors."""

    kind: str   # FORCED, NEW, CHANGED or RESTORE
    text: str


class Graph:
    """The directed acyclic graph of the pipeline's stages."""

    def __init__(self, stages: Iterable[Stage], upstream: Mapping[str, Iterable[str]]) -> None:
        """`upstream` maps a stage's name to the names of the stages whose outputs it reads."""
        import networkx as nx

        self.stages = {stage.name: stage for stage in stages}
        self._graph: Any = nx.DiGraph()   # edges go downstream
        self._graph.add_nodes_from(sorted(self.stages))
        self._graph.add_edges_from((above, name) for name in sorted(upstream) for above in sorted(upstream[name]))

    def upstream(self, name: str) -> list[str]:
        """Names of the stages whose outputs the stage `name` reads directly, sorted."""
        return sorted(self._graph.predecessors(name))

    def descendants(self, names: Iterable[str]) -> set[str]:
        """Names of all stages that read, directly or indirectly, outputs of one of the stages `names`."""
        import networkx as nx

        return {below for name in names for below in nx.descendants(self._graph, name)}

    def generations(self) -> list[list[str]]:
        """Names of the stages in topological order, in generations of stages that do not depend on each other."""
        import networkx as nx

        return [sorted(generation) for generation in nx.topological_generations(self._graph)]

    def matching(self, word: str) -> list[str]:
        """Names of the stages with a command that `word` means: a stage (`train@math`) or all of a step (`train`).

        Raises UsageError that lists the known steps.
        """
        names = sorted(name for name, stage in self.stages.items() if stage.command and word in (name, stage.step))
        if not names:
            known = sorted({stage.step for stage in self.stages.values() if stage.command})
            raise UsageError(f"No stage {word!r}; name a step ({', '.join(known)}) or one domain of it, "
                             "such as train@math.")
        return names


@dataclass(frozen=True)
class Snapshot:
    """The state of the pipeline at one moment."""

    graph: Graph
    stale: Mapping[str, tuple[Reason, ...]]   # the stages that are stale themselves, with reasons
    left_out: frozenset[str] = frozenset()    # stages that `limited` excluded

    @property
    def affected(self) -> set[str]:
        """Names of the stages that are stale or may become stale when their ancestors run: the transitive closure."""
        below = {name for name in self.graph.descendants(self.stale) if self.graph.stages[name].command}
        return (set(self.stale) | below) - self.left_out

    def forced(self, words: Iterable[str]) -> "Snapshot":
        """A snapshot in which the stages that `words` mean are stale, too, as --force asks. Raises UsageError."""
        stale = dict(self.stale)
        for word in words:
            for name in self.graph.matching(word):
                stale[name] = (Reason(FORCED, f"forced (--force {word})"), *stale.get(name, ()))
        return replace(self, stale=stale)

    def limited(self, domains: Iterable[str] | None) -> "Snapshot":
        """A snapshot without the per-domain stages of other domains than `domains`; None = all domains."""
        if domains is None:
            return self
        chosen = set(domains)
        out = frozenset(name for name, stage in self.graph.stages.items()
                        if stage.step in PER_DOMAIN and stage.domain is not None and stage.domain not in chosen)
        return replace(self, stale={name: why for name, why in self.stale.items() if name not in out}, left_out=out)


def reasons(changes: Sequence[Any], paths: Mapping[str, str], *, recorded: bool) -> tuple[Reason, ...]:
    """Translate DVC's status of one stage into reasons.

    Args:
        changes: the stage's entries in the result of DVC's `Stage.status`.
        paths: paths relative to the workspace, by the paths in `changes`.
        recorded: whether the stage ever ran.
    """
    if not recorded:
        return (Reason(NEW, "never run"),)
    return tuple(reason for change in changes for reason in _explain(change, paths))


def _explain(change: Any, paths: Mapping[str, str]) -> Iterator[Reason]:
    """The reasons in one entry of DVC's status: a word, or changed inputs or outputs by path."""
    if not isinstance(change, Mapping):
        yield Reason(CHANGED, "its command changed" if change == "changed command" else str(change))
        return
    for path, state in change.get("changed deps", {}).items():
        if isinstance(state, Mapping):
            known = next((words for name, words in LOCAL_INPUTS.items() if path.endswith(f".moa/{name}")), None)
            yield from (Reason(CHANGED, known or f"parameter {key} {_state(key_state)}")
                        for key, key_state in state.items())
        else:
            yield Reason(CHANGED, f"{paths.get(path, path)} {_state(state)}")
    for path, state in change.get("changed outs", {}).items():
        if state == "modified":
            yield Reason(CHANGED, f"its output {paths.get(path, path)} was changed by something else")
        else:
            yield Reason(RESTORE, f"its output {paths.get(path, path)} is "
                                  f"{'missing' if state == 'deleted' else state}")


def _state(state: str) -> str:
    """DVC's word for a change as the end of a sentence."""
    return {"modified": "changed", "deleted": "is missing", "new": "is new"}.get(state, state)
