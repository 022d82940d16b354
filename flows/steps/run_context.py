"""What a run that learns works with, under the workspace's lock, and the lines of the event log that every run writes.

Used by adaptation and retraining. Written once for every runner; knows no ML, and not whether Prefect watches.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
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
from moa.workspace import warm_starts
from moa.workspace.data_versions import DataVersions, commit
from moa.workspace.warm_starts import InitialExpert

Facts = dict[str, Any]
After = Callable[[Session, Result], None]


def do_nothing(_: Session, __: Result) -> None:
    pass


@dataclass
class RunContext:
    """What an adaptation or retraining works with, under the workspace's lock."""

    workspace: Workspace
    versions: DataVersions
    runner: Runner
    verbose: bool = False
    after: After = do_nothing   # told of each build that releases

    @property
    def config(self) -> Config:   # taking a domain in changes params.yaml
        return load(self.workspace.params)

    def one(self, name: str, work: Callable[[], Any]) -> Any:
        """Run one step of our own; its value. Raises what it raises."""
        outcome, = self.runner.run_all([Call(name, work)])
        if outcome.error is not None:
            raise outcome.error
        return outcome.value

    def build(self, *, release: bool = True) -> Result:
        with open_session(self.workspace, BuildOptions(), verbose=self.verbose, held=self.versions) as session:
            if not release:
                session.hooks = ()
            elif self.config.adapt.commit:
                session.hooks = [("commit", lambda: commit(self.workspace)), *session.hooks]
            result = build(session, self.runner)
            if release:
                self.after(session, result)
            return result

    def say(self, kind: str, **facts: Any) -> None:
        event_log.append(self.workspace, kind, **facts)


class Busy(PipelineError):
    """Another run is at work."""


@contextlib.contextmanager
def run_context(workspace: Workspace, runner: Runner, verbose: bool, after: After, wait: float) -> Iterator[RunContext]:
    versions = DataVersions(workspace)
    with contextlib.ExitStack() as stack:
        try:
            abandoned = stack.enter_context(versions.lock(wait))
        except PipelineError as error:
            raise Busy(str(error)) from None
        if abandoned is not None:
            event_log.append(workspace, "taken-over", pid=abandoned["pid"], since=abandoned["since"])
        work = RunContext(workspace, versions, runner, verbose, after)
        if left := restore_starts(work):
            work.say("undone", domains=left, reason="the training from scratch was interrupted")
        yield work


@contextlib.contextmanager
def log_failures(work: RunContext, what: str, began: float) -> Iterator[None]:
    try:
        yield
    except Exception as error:   # any library's: the sensor waits longer after each failure that the ledger tells
        with contextlib.suppress(OSError, MoaError):   # a full disk takes no more lines
            work.say("failed", step=what, reason=in_words(error), seconds=round(time.monotonic() - began, 1))
        raise
    except KeyboardInterrupt:
        work.say("failed", step=what, reason="interrupted; the next run continues")
        raise


# A retraining from scratch forgets where experts begin; what it forgot is kept until its end.

def forget_starts(work: RunContext) -> None:
    """Let every expert begin afresh, until `restore_starts` or `keep_fresh`, whatever ends this process."""
    continued = warm_starts.read(work.workspace)
    if continued:
        write_json(work.workspace.retraining, {name: asdict(start) for name, start in continued.items()})
        work.one("forget starts", lambda: warm_starts.forget(work.versions, sorted(continued)))


def restore_starts(work: RunContext) -> list[str]:
    """Put back what was forgotten, and everything made from it, out of DVC's cache; the domains, none = nothing was."""
    try:
        continued = {name: InitialExpert(**each) for name, each in read_json(work.workspace.retraining).items()}
    except FileNotFoundError:
        return []
    work.one("restore starts", lambda: warm_starts.restore(work.versions, continued))
    require_success(work.build(release=False))
    keep_fresh(work)
    return sorted(continued)


def keep_fresh(work: RunContext) -> None:
    work.workspace.retraining.unlink(missing_ok=True)


# What every run says.

def log_finished(work: RunContext, what: str, facts: Facts, began: float) -> Facts:
    seconds = round(time.monotonic() - began, 1)
    work.say("finished", result=f"{what} {facts['state']}", seconds=seconds)
    return {**facts, "seconds": seconds}


def require_success(result: Result) -> None:
    if failure := result.failure():
        raise failure


def log_trained(work: RunContext, result: Result) -> None:
    if trained := [name.partition("@")[2] for name in result.named("done") if name.startswith("train@")]:
        seconds = max(result.outcomes[f"train@{name}"].seconds for name in trained)   # those of a group share theirs
        work.say("trained", domains=trained, seconds=round(seconds, 1))


def _forgetting(work: RunContext, old: int | None, new: int) -> Facts | None:
    """What the new champion kept of the old one. Rolls back when an expert that did not change answers otherwise."""
    if old in (None, new) or not work.config.adapt.golden:
        return None
    found: Facts = work.one("forgetting", lambda: releasing.forgetting(work.workspace, old, new))
    experts = {change: sorted(name for name, each in found["experts"].items() if each["change"] == change)
               for change in ("same", "changed", "new")}
    work.say("forgetting", verdict="nothing was forgotten" if found["equal"] else "experts that are the same answer "
             "otherwise", version=new, against=old, **experts)
    if not found["equal"]:
        reason = f"version {new} answers golden prompts otherwise than version {old} with the same experts"
        work.one("roll back", lambda: releasing.roll_back(work.workspace, work.config, old, reason))
        raise PipelineError(f"{reason[0].upper()}{reason[1:]}; version {old} is champion again. See `moa release "
                            f"forgetting {new} --against {old}`.")
    return found


def log_released(work: RunContext, release: Facts) -> Facts:
    """The outcome of the release steps, for display and for the policy: released, waiting, kept or refused."""
    decision, version = release["decision"], release["version"]
    facts: Facts = {"version": version, "reason": decision["reason"], "champion": release["champion"],
                    "worse": decision.get("worse", [])}
    work.say("gate", version=version, verdict="pass" if decision["promote"] else "refused", reason=decision["reason"],
             against=decision.get("against"))
    if release["waiting"]:
        return {**facts, "state": "waiting"}
    if decision["promote"] or release["champion"] == version:
        told = event_log.read(work.workspace, last=1, kinds=["released"])
        if not told or told[0]["version"] != version:   # a run that was killed may have said it
            work.say("released", version=version, instead_of=decision.get("against"))
        return {**facts, "state": "released", "instead_of": decision.get("against"),
                "forgetting": _forgetting(work, decision.get("against"), version)}
    if decision.get("harm"):
        return {**facts, "state": "refused"}
    return {**facts, "state": "kept"}
