"""The session of a build: options, the workspace under its lock, the result. No order and no policy in here."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from flows.remote import cluster
from flows.steps.runner import Outcome
from moa.core import transaction
from moa.core.config import NO_DOMAIN, Config, load
from moa.core.errors import ConfigError, PipelineError
from moa.core.paths import Workspace
from moa.core.progress import Screen
from moa.evaluation import metrics
from moa.mixture import incumbent
from moa.workspace.pipeline import Pipeline
from moa.workspace.stage_graph import FORCED, Snapshot, Stage

Hook = tuple[str, Callable[[], Any]]   # name and work of a release step


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build."""

    domains: tuple[str, ...] | None = None   # build only these domains' own stages; None = all
    force: tuple[str, ...] = ()              # stages or steps to run although they are fresh
    promote: bool = True                     # whether a release that passes the gate becomes champion
    recalibrate: bool = False                # whether the router is made anew, and not as the champion's successor


@dataclass
class Result:
    """How a build ended: an outcome by name of stage or release step, and what the last release step returned."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    release: Any = None

    def named(self, state: str) -> list[str]:
        """The stages that ended in this state: done, cached, skipped or failed."""
        return sorted(name for name, outcome in self.outcomes.items() if outcome.state == state)

    def failure(self) -> PipelineError | None:
        """An error whose message names every failed stage and why; None when none failed."""
        failed = self.named("failed")
        if not failed:
            return None
        reasons = dict.fromkeys(str(self.outcomes[name].error) for name in failed)   # a group has one error
        text = f"Failed: {', '.join(failed)}. {' '.join(reasons)}"
        if skipped := self.named("skipped"):
            text += f" Not run: {', '.join(skipped)}."
        return PipelineError(f"{text} What had finished is recorded; `moa run` continues from there.")

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON: stages by state, errors, seconds, release."""
        return {**{state: self.named(state) for state in ("done", "cached", "skipped")},
                "failed": {name: str(self.outcomes[name].error) for name in self.named("failed")},
                "seconds": {name: round(self.outcomes[name].seconds, 2) for name in self.named("done")},
                "release": self.release}


@dataclass
class Session:
    """Everything a build needs, opened under the workspace's lock."""

    workspace: Workspace
    config: Config
    pipeline: Pipeline
    options: BuildOptions
    screen: Screen
    snapshot: Snapshot
    finished: Callable[[str], bool]   # whether a domain's expert is complete for its present inputs
    hooks: Sequence[Hook] = ()        # release steps, which follow the last stage
    result: Result | None = None      # once a build has begun
    touched: Sequence[str] = ()       # domains whose new rows an adaptation has taken in
    accepted: bool = False            # a person has accepted these rows, whatever the gate says

    def stage(self, name: str) -> Stage:
        """The stage of this name."""
        return self.snapshot.graph.stages[name]

    def forced(self, name: str) -> bool:
        """Whether the options force this stage to run."""
        return any(reason.kind == FORCED for reason in self.snapshot.stale.get(name, ()))


def load_configuration(workspace: Workspace) -> Config:
    """params.yaml, read and checked. Raises ConfigError when it is wrong, or has no domain to build."""
    config = load(workspace.params)
    if not config.domains:
        raise ConfigError(NO_DOMAIN)
    return config


_ambient: ContextVar[Session | None] = ContextVar("session", default=None)


@contextmanager
def open_session(workspace: Workspace, options: BuildOptions, *, verbose: bool = False,
                 held: Pipeline | None = None) -> Iterator[Session]:
    """Open a session for the block, under the workspace's lock; a session that is open in this context is used again.

    Args:
        held: the pipeline whose lock the caller holds already.

    Raises:
        ConfigError: params.yaml is wrong, or an engine or metric that it names cannot be used.
        PipelineError: another run holds the lock.
    """
    if (ambient := _ambient.get()) is not None:
        yield ambient
        return
    if held is None:
        transaction.recover(workspace)
    config = load_configuration(workspace)
    for domain in options.domains or ():
        config.require_domain(domain)
    for domain_params in config.domains.values():
        metrics.resolve(domain_params.metric)   # only the last stage uses it: fail before the first stage runs
    cluster.require_engine(config.execution)
    pipeline = held or Pipeline(workspace)
    with nullcontext() if held else pipeline.lock(), Screen(verbose=verbose) as screen:
        incumbent.recalibrate(workspace, options.recalibrate)
        snapshot = pipeline.snapshot().limited(options.domains).forced(options.force)
        session = Session(workspace, config, pipeline, options, screen, snapshot,
                          finished=lambda domain: _finished(workspace, config, domain),
                          hooks=_release_hooks(workspace, config, options))
        token = _ambient.set(session)
        try:
            yield session
        finally:
            _ambient.reset(token)
            incumbent.recalibrate(workspace, False)   # for this run alone: a later plan extends the champion again


def _finished(workspace: Workspace, config: Config, domain: str) -> bool:
    from moa.experts.train import finished

    return finished(workspace, config, domain)


def _release_hooks(workspace: Workspace, config: Config, options: BuildOptions) -> list[Hook]:
    from flows.steps import release

    return release.hooks(workspace, config, options.promote)
