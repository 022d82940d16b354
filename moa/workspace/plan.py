"""The plan of a run: which stages would run, why, and about how long training would take. Nothing runs.

All functions are pure except `Statistics.read`, which reads what earlier runs measured.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moa.core.config import NO_DOMAIN, Config
from moa.core.errors import ConfigError
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.core.text import indented_table
from moa.workspace.stage_graph import Snapshot

DEFAULT_ROWS = 400            # training rows of a corpus that is not prepared yet
DEFAULT_ROW_TOKENS = 120.0    # tokens of a row, prompt and answer
DEFAULT_RATE = 240.0          # trained tokens a second: a 135M base on two CPU cores

State = Literal["fresh", "stale", "maybe"]


@dataclass(frozen=True)
class Step:
    """One stage of the plan. `maybe`: the stage is stale only if an ancestor that runs changes its output."""

    name: str
    state: State
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of training the experts of a plan."""

    tokens: int      # trained, over all experts and epochs
    minutes: float
    basis: str       # where the numbers come from, in words


@dataclass(frozen=True)
class Plan:
    """What a run would do; `make_plan` makes it."""

    steps: tuple[Step, ...]
    experts: tuple[str, ...]       # domains whose expert will be trained
    router: bool                   # whether the router must be trained
    estimate: Estimate
    release: str | None            # what would be registered
    left_out: tuple[str, ...] = () # by --domain
    imported: tuple[str, ...] = () # those of `experts` that were imported; training replaces them
    # What the gate can tell from the test rows of `experts`, and of domains that it cannot judge, in words.
    power: tuple[str, ...] = ()
    # What the router promises about abstention, in words: the present one, or the one that will be trained.
    promises: tuple[str, ...] = ()

    @property
    def stale(self) -> tuple[Step, ...]:
        """The steps that would run or might run."""
        return tuple(step for step in self.steps if step.state != "fresh")

    def as_dict(self) -> dict[str, Any]:
        """The plan as a JSON value, for --json: the steps that would or might run, and the number of fresh ones."""
        return {"stale": [asdict(step) for step in self.stale], "fresh": len(self.steps) - len(self.stale),
                "experts": list(self.experts), "imported": list(self.imported), "power": list(self.power),
                "promises": list(self.promises),
                "router": self.router, "tokens": self.estimate.tokens,
                "minutes": self.estimate.minutes, "basis": self.estimate.basis,
                "release": self.release, "left_out": list(self.left_out)}

    def text(self) -> str:
        """The plan as text for a terminal."""
        told = ["What the gate can tell:", *(f"  {sentence}" for sentence in self.power)] if self.power else []
        promised = [f"What the router {'can promise' if self.router else 'promises'}:",
                    *(f"  {sentence}" for sentence in self.promises)] if self.promises else []
        if not self.stale:
            return "\n".join([f"Nothing to do: all {len(self.steps)} steps are fresh.", *told, *promised])
        marks = {"stale": "run", "maybe": "maybe", "fresh": ""}
        lines = [indented_table([(marks[step.state], step.name, "; ".join(step.reasons)) for step in self.stale])]
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
        lines += [*told, *promised]
        if self.release:
            lines.append(f"Release: {self.release}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Statistics:
    """Measurements of earlier runs, from which `make_plan` estimates the cost of training."""

    corpora: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)   # manifests of prepared corpora, by domain
    rates: Mapping[str, float] = field(default_factory=dict)                 # tokens a second, by step
    imported: frozenset[str] = frozenset()                                   # domains with an imported expert
    promises: Mapping[str, Any] | None = None   # of the mixture's router, by domain; None = it has recorded none

    @classmethod
    def read(cls, workspace: Workspace, config: Config) -> "Statistics":
        """Read the statistics of a workspace; what does not exist is left out."""
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
        try:
            promises = read_json(workspace.mixture / MANIFEST)["router"].get("promises")
        except (OSError, ValueError, KeyError):
            promises = None
        return cls(corpora, rates, frozenset(domain for domain, path in experts.items()
                                             if path.is_file() and read_json(path).get("source") == "imported"),
                   promises)


def plan_run(workspace: Workspace, config: Config, domains: Collection[str] = (), force: Sequence[str] = ()) -> Plan:
    """What a run of the workspace would do.

    Args:
        domains: only these domains' own steps; empty = all.
        force: steps or stages that count as stale.

    Raises:
        ConfigError: there is no domain yet, or a metric that cannot be used.
        UsageError: a domain or a stage that there is not.
    """
    from moa.evaluation import metrics  # takes long to import
    from moa.workspace.pipeline import Pipeline

    if not config.domains:
        raise ConfigError(NO_DOMAIN)
    for name in domains:
        config.require_domain(name)
    for domain in config.domains.values():
        metrics.resolve(domain.metric)
    snapshot = Pipeline(workspace).snapshot().limited(domains or None).forced(force)
    return make_plan(snapshot, config, Statistics.read(workspace, config))


def make_plan(snapshot: Snapshot, config: Config, statistics: Statistics) -> Plan:
    """Make the plan of a run from a snapshot of the pipeline, to which --force and --domain have been applied."""
    graph, affected = snapshot.graph, snapshot.affected
    steps = [_step(snapshot, affected, name) for generation in graph.generations() for name in generation
             if graph.stages[name].command and name not in snapshot.left_out]
    experts = tuple(stage.domain for stage in (graph.stages[step.name] for step in steps)
                    if stage.step == "train" and stage.domain is not None and stage.name in affected)
    releases = bool(affected & {"assemble", "evaluate"})
    return Plan(tuple(steps), experts, "assemble" in affected, estimate_training(experts, config, statistics),
                "a new release, if its content is new; it becomes champion "
                "if the gate passes it." if releases else None, tuple(sorted(snapshot.left_out)),
                tuple(domain for domain in experts if domain in statistics.imported),
                tuple(_power(experts, config, statistics)),
                tuple(_promises("assemble" in affected, config, statistics)))


def _power(experts: tuple[str, ...], config: Config, statistics: Statistics) -> Iterator[str]:
    """What the gate can tell of these experts' domains and of those that it cannot judge, where they are prepared."""
    from moa.evaluation import power  # most uses of this module need none of it

    for domain in dict.fromkeys([*experts, *power.unjudged(statistics.corpora, config.release)]):
        if resolution := power.resolution(statistics.corpora.get(domain, {}), config.release):
            yield power.sentence(domain, resolution, config.release)


def _promises(anew: bool, config: Config, statistics: Statistics) -> list[str]:
    """What the router promises about abstention; with `anew`, what it will, of domains whose corpus is prepared."""
    from moa.evaluation import promises  # imports numpy, which other commands on a plan do not need

    return promises.expected(statistics.corpora, config.assemble) if anew else promises.recorded(statistics.promises)


def _step(snapshot: Snapshot, affected: set[str], name: str) -> Step:
    if name in snapshot.stale:
        return Step(name, "stale", tuple(reason.text for reason in snapshot.stale[name]))
    if name in affected:
        above = [other for other in snapshot.graph.upstream(name) if other in affected]
        if not above:   # only stages without a command are in between
            above = sorted(other for other in affected if name in snapshot.graph.descendants([other]))
        return Step(name, "maybe", (f"upstream {_few(above)} will run",))
    return Step(name, "fresh")


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def estimate_training(experts: tuple[str, ...], config: Config, statistics: Statistics) -> Estimate:
    """Estimate the cost of training the experts of the domains `experts`.

    Tokens are the rows seen over all epochs times the mean tokens of a row; minutes are tokens divided by the measured
    rate, or by a default.
    """
    known = [domain for domain in experts if domain in statistics.corpora]
    tokens = sum(rows_seen(config, statistics.corpora.get(domain)) * row_tokens(statistics.corpora.get(domain))
                 for domain in experts)
    rate = statistics.rates.get("train") or DEFAULT_RATE
    basis = (f"measured {rate:,.0f} tokens/s" if statistics.rates.get("train")
             else f"assuming {rate:,.0f} tokens/s, as on two CPU cores")
    cap = config.train.rows_per_epoch or math.inf
    capped = [domain for domain in known
              if (manifest := statistics.corpora[domain]) and cap < manifest["rows"]["train"]]
    if capped:
        basis += f"; of {_few(capped)} only train.rows_per_epoch: {config.train.rows_per_epoch} rows an epoch"
    if len(known) < len(experts):
        basis += f"; {DEFAULT_ROW_TOKENS:.0f} tokens a row assumed where the corpus is not prepared yet"
    return Estimate(round(tokens), round(tokens / rate / 60, 1), basis)


def rows_seen(config: Config, manifest: Mapping[str, Any] | None) -> int:
    """Number of rows that one expert is trained on, over all its epochs.

    `manifest` is its corpus's manifest; None = a default number of rows.
    """
    rows = int(manifest["rows"]["train"]) if manifest else DEFAULT_ROWS
    return min(config.train.rows_per_epoch or rows, rows) * config.train.epochs


def row_tokens(manifest: Mapping[str, Any] | None) -> float:
    """Mean number of tokens of a row, prompt and answer, from a corpus's manifest, or a default where it lacks them."""
    tokens = manifest.get("tokens") if manifest else None
    if not isinstance(tokens, Mapping):
        return DEFAULT_ROW_TOKENS
    parts = [part["mean"] if isinstance(part, Mapping) and "mean" in part else part
             for part in (tokens.get("prompt"), tokens.get("completion"))]
    means = [float(part) for part in parts if isinstance(part, int | float)]
    return sum(means) if len(means) == len(parts) else DEFAULT_ROW_TOKENS
