"""What a run would do, why, and about how long it would take. Decides only; nothing runs.

Everything here is a pure function but `Statistics.read`, which looks up what earlier steps measured.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moa.core.config import Config
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.workspace.stage_graph import Snapshot

DEFAULT_ROWS = 400            # of a corpus that is not prepared yet
DEFAULT_ROW_TOKENS = 120.0    # prompt and answer
DEFAULT_RATE = 240.0          # trained tokens a second: a 135M base on two CPU cores

State = Literal["fresh", "stale", "maybe"]


@dataclass(frozen=True)
class Step:
    """One stage. `maybe`: stale only if what runs above it changes its own output."""

    name: str
    state: State
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    tokens: int
    minutes: float
    basis: str   # where the numbers come from


@dataclass(frozen=True)
class Plan:
    steps: tuple[Step, ...]
    experts: tuple[str, ...]       # domains whose expert will be trained
    router: bool                   # whether the router must be trained
    estimate: Estimate
    release: str | None            # what would be registered
    left_out: tuple[str, ...] = () # by --domain
    imported: tuple[str, ...] = () # of `experts`, those that came from outside: training puts its own in their place

    @property
    def stale(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.state != "fresh")

    def as_dict(self) -> dict[str, Any]:
        """For --json: only the steps that would run, and how many are fresh."""
        return {"stale": [asdict(step) for step in self.stale], "fresh": len(self.steps) - len(self.stale),
                "experts": list(self.experts), "imported": list(self.imported), "router": self.router,
                "tokens": self.estimate.tokens, "minutes": self.estimate.minutes, "basis": self.estimate.basis,
                "release": self.release, "left_out": list(self.left_out)}

    def text(self) -> str:
        """As a text for a terminal."""
        if not self.stale:
            return f"Nothing to do: all {len(self.steps)} steps are fresh."
        width = max(len(step.name) for step in self.stale)
        marks = {"stale": "run  ", "maybe": "maybe", "fresh": ""}
        lines = [f"  {marks[step.state]}  {step.name:<{width}}  {'; '.join(step.reasons)}" for step in self.stale]
        fresh = len(self.steps) - len(self.stale)
        lines += ["", f"{len(self.stale)} steps to run or check, {fresh} fresh."]
        if self.left_out:
            lines.append(f"Left out by --domain: {', '.join(self.left_out)}.")
        lines.append(f"Experts to train: {', '.join(self.experts) or 'none'}. "
                     f"Router: {'trained' if self.router else 'unchanged'}.")
        if self.imported:
            lines.append(f"Imported, and replaced if it is trained here: {', '.join(self.imported)}.")
        if self.experts:
            lines.append(f"Training: about {self.estimate.tokens:,} tokens, {self.estimate.minutes:.1f} minutes "
                         f"({self.estimate.basis}).")
        if self.release:
            lines.append(f"Release: {self.release}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Statistics:
    """What earlier runs left. `corpora`: manifest of each prepared corpus. `rates`: tokens a second by step.
    `imported`: domains whose expert was trained elsewhere."""

    corpora: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    imported: frozenset[str] = frozenset()

    @classmethod
    def read(cls, workspace: Workspace, config: Config) -> "Statistics":
        corpora = {}
        for domain in config.domains:
            path = workspace.corpus(domain) / MANIFEST
            if path.is_file():
                corpora[domain] = read_json(path)
        try:
            rates = read_json(workspace.cache / "rates.json")
        except (OSError, ValueError):
            rates = {}
        experts = {domain: workspace.expert(domain) / MANIFEST for domain in config.domains}
        return cls(corpora, rates, frozenset(domain for domain, path in experts.items()
                                             if path.is_file() and read_json(path).get("source") == "imported"))


def make_plan(snapshot: Snapshot, config: Config, statistics: Statistics) -> Plan:
    """The plan for a snapshot that already knows what is forced and what is left out."""
    graph, affected = snapshot.graph, snapshot.affected
    steps = [_step(snapshot, affected, name) for generation in graph.generations() for name in generation
             if graph.stages[name].command and name not in snapshot.left_out]
    experts = tuple(stage.domain for stage in (graph.stages[step.name] for step in steps)
                    if stage.step == "train" and stage.domain is not None and stage.name in affected)
    releases = bool(affected & {"assemble", "evaluate"})
    return Plan(tuple(steps), experts, "assemble" in affected, estimate_training(experts, config, statistics),
                "a new release, if its content is new; it becomes champion "
                "if the gate passes it." if releases else None, tuple(sorted(snapshot.left_out)),
                tuple(domain for domain in experts if domain in statistics.imported))


def _step(snapshot: Snapshot, affected: set[str], name: str) -> Step:
    if name in snapshot.stale:
        return Step(name, "stale", tuple(reason.text for reason in snapshot.stale[name]))
    if name in affected:
        above = [other for other in snapshot.graph.upstream(name) if other in affected]
        if not above:   # only data without a command lies between
            above = sorted(other for other in affected if name in snapshot.graph.descendants([other]))
        return Step(name, "maybe", (f"upstream {_few(above)} will run",))
    return Step(name, "fresh")


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def estimate_training(experts: tuple[str, ...], config: Config, statistics: Statistics) -> Estimate:
    """Tokens = rows seen x mean tokens of a row, over all epochs; minutes = tokens / measured rate."""
    known = [domain for domain in experts if domain in statistics.corpora]
    tokens = sum(rows_seen(config, statistics.corpora.get(domain)) * row_tokens(statistics.corpora.get(domain))
                 for domain in experts)
    rate = statistics.rates.get("train") or DEFAULT_RATE
    basis = (f"measured {rate:,.0f} tokens/s" if statistics.rates.get("train")
             else f"assuming {rate:,.0f} tokens/s, as on two CPU cores")
    if len(known) < len(experts):
        basis += f"; {DEFAULT_ROW_TOKENS:.0f} tokens a row assumed where the corpus is not prepared yet"
    return Estimate(round(tokens), round(tokens / rate / 60, 1), basis)


def rows_seen(config: Config, manifest: Mapping[str, Any] | None) -> int:
    """Rows one expert is trained on, over all its epochs."""
    rows = int(manifest["rows"]["train"]) if manifest else DEFAULT_ROWS
    return min(config.train.rows_per_epoch or rows, rows) * config.train.epochs


def row_tokens(manifest: Mapping[str, Any] | None) -> float:
    """Mean tokens of a row, prompt and answer; a default when the corpus does not say."""
    tokens = manifest.get("tokens") if manifest else None
    if not isinstance(tokens, Mapping):
        return DEFAULT_ROW_TOKENS
    parts = [part["mean"] if isinstance(part, Mapping) and "mean" in part else part
             for part in (tokens.get("prompt"), tokens.get("completion"))]
    means = [float(part) for part in parts if isinstance(part, int | float)]
    return sum(means) if len(means) == len(parts) else DEFAULT_ROW_TOKENS
