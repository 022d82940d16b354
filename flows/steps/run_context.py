"""What adaptation and retraining share: their context under the workspace's lock, and their entries of the event log.

Knows no ML, and not which runner runs it.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flows.steps import event_log
from flows.steps import release as releasing
from flows.steps.runner import Call, Runner
from flows.steps.session import BuildOptions, Result, Session, open_session
from flows.steps.stage_order import build
from moa.core.config import Config, load
from moa.core.errors import MoaError, PipelineError, in_words
from moa.core.files import read_json, write_json
from moa.core.paths import Workspace
from moa.evaluation.gate import verdict_of
from moa.workspace import warm_starts
from moa.workspace.data_versions import DataVersions, commit
from moa.workspace.warm_starts import InitialExpert

Facts = dict[str, Any]
After = Callable[[Session, Result], None]


def do_nothing(_: Session, __: Result) -> None:
    """The default of `after`."""


@dataclass
class RunContext:
    """What an adaptation or retraining works with while it holds the workspace's lock, from `run_context`."""

    workspace: Workspace
    versions: DataVersions
    runner: Runner
    verbose: bool = False
    after: After = do_nothing   # called after each build that releases

    @property
    def config(self) -> Config:
        """params.yaml, read anew: taking in a new domain changes it."""
        return load(self.workspace.params)

    def one(self, name: str, work: Callable[[], Any]) -> Any:
        """Run `work` as one call of the runner, named `name`, and return its value. Raises what `work` raises."""
        outcome, = self.runner.run_all([Call(name, work)])
        if outcome.error is not None:
            raise outcome.error
        return outcome.value

    def build(self, *, release: bool = True, touched: Sequence[str] = (), accepted: bool = False) -> Result:
        """Build every stale stage and, if `release`, run the release steps. Failures are in the result, not raised.

        Args:
            touched: domains whose new rows an adaptation has taken in.
            accepted: the caller promotes the release itself, because a person has accepted these rows.
        """
        options = BuildOptions(promote=not accepted)
        with open_session(self.workspace, options, verbose=self.verbose, held=self.versions) as session:
            session.touched, session.accepted = touched, accepted
            if not release:
                session.hooks = ()
            elif self.config.adapt.commit:
                session.hooks = [("commit", lambda: commit(self.workspace)), *session.hooks]
            result = build(session, self.runner)
            if release:
                self.after(session, result)
            return result

    def say(self, kind: str, **facts: Any) -> None:
        """Append an entry to the event log."""
        event_log.append(self.workspace, kind, **facts)


class Busy(PipelineError):
    """Another run holds the workspace's lock."""


@contextlib.contextmanager
def run_context(workspace: Workspace, runner: Runner, verbose: bool, after: After, wait: float) -> Iterator[RunContext]:
    """Hold the workspace's lock for a run, after undoing a training from scratch that was interrupted.

    Raises Busy when another run still holds the lock after `wait` seconds.
    """
    versions = DataVersions(workspace)
    with contextlib.ExitStack() as stack:
        try:
            abandoned = stack.enter_context(versions.lock(wait))
        except PipelineError as error:
            raise Busy(str(error)) from None
        if abandoned is not None:
            event_log.append(workspace, "taken-over", pid=abandoned["pid"], since=abandoned["since"])
        work = RunContext(workspace, versions, runner, verbose, after)
        if undone := restore_starts(work):
            work.say("undone", domains=undone, reason="the training from scratch was interrupted")
        yield work


@contextlib.contextmanager
def log_failures(work: RunContext, step: str, began: float) -> Iterator[None]:
    """Log an exception of the block as an event `failed` of `step`, and raise it again. `began`: `time.monotonic`."""
    try:
        yield
    except Exception as error:   # any: the sensor's pause depends on how many failures the event log has
        with contextlib.suppress(OSError, MoaError):   # the disk may be full
            work.say("failed", step=step, reason=in_words(error), seconds=round(time.monotonic() - began, 1))
        raise
    except KeyboardInterrupt:
        work.say("failed", step=step, reason="interrupted; the next run continues")
        raise


# A retraining from scratch removes the starts of all experts, and keeps them in a file until its end, for an undo.

def forget_starts(work: RunContext) -> None:
    """Let every training begin afresh. The file with the starts stays until `restore_starts` or `keep_fresh`."""
    continued = warm_starts.read(work.workspace)
    if continued:
        write_json(work.workspace.retraining, {name: asdict(start) for name, start in continued.items()})
        work.one("forget starts", lambda: warm_starts.forget(work.versions, sorted(continued)))


def restore_starts(work: RunContext) -> list[str]:
    """Undo `forget_starts`: restore the starts, and from DVC's cache what was made from them.

    Returns:
        The domains whose starts were restored; empty when no retraining from scratch was under way.
    """
    try:
        continued = {name: InitialExpert(**start) for name, start in read_json(work.workspace.retraining).items()}
    except FileNotFoundError:
        return []
    work.one("restore starts", lambda: warm_starts.restore(work.versions, continued))
    require_success(work.build(release=False))
    keep_fresh(work)
    return sorted(continued)


def keep_fresh(work: RunContext) -> None:
    """Delete the file of `forget_starts`: the experts that began afresh stay."""
    work.workspace.retraining.unlink(missing_ok=True)


# Entries of the event log that every run writes.

def log_finished(work: RunContext, step: str, facts: Facts, began: float) -> Facts:
    """Log the end of a run, and return `facts` with its seconds. `began`: `time.monotonic`."""
    seconds = round(time.monotonic() - began, 1)
    work.say("finished", result=f"{step} {facts['state']}", seconds=seconds)
    return {**facts, "seconds": seconds}


def require_success(result: Result) -> None:
    """Raise PipelineError when a stage or release step of a build failed."""
    if failure := result.failure():
        raise failure


def log_trained(work: RunContext, result: Result) -> None:
    """Log which experts a build trained, if any."""
    if trained := [name.partition("@")[2] for name in result.named("done") if name.startswith("train@")]:
        seconds = max(result.outcomes[f"train@{name}"].seconds for name in trained)   # a group has one time
        work.say("trained", domains=trained, seconds=round(seconds, 1))


def _forgetting(work: RunContext, old: int | None, new: int) -> Facts | None:
    """Log and return what champion `new` kept of champion `old`; None without an old one or without golden prompts.

    Rolls back to `old` and raises PipelineError when an expert that did not change answers otherwise.
    """
    if old in (None, new) or not work.config.adapt.golden:
        return None
    report: Facts = work.one("forgetting", lambda: releasing.forgetting(work.workspace, old, new))
    experts = {change: sorted(name for name, expert in report["experts"].items() if expert["change"] == change)
               for change in ("same", "changed", "new")}
    work.say("forgetting", verdict="nothing was forgotten" if report["equal"] else "experts that are the same answer "
             "otherwise", version=new, against=old, **experts)
    if not report["equal"]:
        reason = f"version {new} answers golden prompts otherwise than version {old} with the same experts"
        work.one("roll back", lambda: releasing.roll_back(work.workspace, work.config, old, reason))
        raise PipelineError(f"{reason[0].upper()}{reason[1:]}; version {old} is champion again. See `moa release "
                            f"forgetting {new} --against {old}`.")
    return report


def log_released(work: RunContext, release: Facts) -> Facts:
    """Log the outcome of the release steps, and return it as facts for display and for the policy.

    Args:
        release: the value of the last release step; with `accepted`, why a person overruled the gate, if so.

    Returns:
        `state` (released, waiting, kept or refused), `version`, `champion`, `reason`, `outcome` of the gate, and
        `worse`: the domains that would get worse.

    Raises:
        PipelineError: the new champion was rolled back, because an expert that did not change answers otherwise.
    """
    decision, version = release["decision"], release["version"]
    accepted = release.get("accepted")
    facts: Facts = {"version": version, "reason": accepted or decision["reason"], "champion": release["champion"],
                    "worse": decision.get("worse", []), "outcome": "promote" if accepted else decision.get("outcome")}
    work.say("gate", version=version, verdict=verdict_of(decision), reason=decision["reason"],
             against=decision.get("against"))
    if release["waiting"]:
        return {**facts, "state": "waiting"}
    if decision["promote"] or release["champion"] == version:
        logged = event_log.read(work.workspace, last=1, kinds=["released"])
        if not logged or logged[0]["version"] != version:   # a run that was killed may have logged it
            work.say("released", version=version, instead_of=decision.get("against"))
        return {**facts, "state": "released", "instead_of": decision.get("against"),
                "forgetting": _forgetting(work, decision.get("against"), version)}
    if decision.get("harm"):
        return {**facts, "state": "refused"}
    return {**facts, "state": "kept"}
