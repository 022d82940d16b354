"""The order and policy of adaptation and retraining: what is learned now, where it starts, what a refusal means.

    adapt      everything that waits in data/incoming, in one run
                 taken in -> a start for each expert -> build, register, gate, promote (flows/stages.py)
                 refused because a domain would get worse: undone, and the files go to data/incoming/.rejected
                 refused because nothing is better: the rows stay, for the next ones to join them
    retrain    whatever is stale by data, parameters, code or base; from scratch if asked

Written once for every runner; knows no ML, and not whether Prefect watches. Each decision is a line of the ledger.
"""

import contextlib
import json
import math
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from flows import release as releasing
from flows.attempt import Attempt
from flows.runner import Call, Runner
from flows.session import Options, Result, Session, opened
from flows.stages import build
from moa import domains, due, incoming, ledger, starts
from moa.commands import environment, last_error
from moa.commits import commit
from moa.config import Config, load
from moa.errors import MoaError, PipelineError
from moa.incoming import Arrival
from moa.versions import Versions
from moa.workspace import MANIFEST, Workspace

Facts = dict[str, Any]
SPARE = 1.25            # rows share sides by chance: the test split may be smaller than its share
RETRAIN_WAIT = 3600.0   # seconds that a retraining waits for another run to end
ENVIRONMENT = ("No space left", "was interrupted", "Cannot allocate", "Input/output error")   # not the rows' fault


After = Callable[[Session, Result], None]


def _nothing(_: Session, __: Result) -> None:
    pass


@dataclass
class Work:
    """What an adaptation or retraining works with, under the workspace's lock."""

    workspace: Workspace
    versions: Versions
    runner: Runner
    verbose: bool = False
    after: After = _nothing   # told of each build that releases

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
        with opened(self.workspace, Options(), verbose=self.verbose, held=self.versions) as session:
            if not release:
                session.hooks = ()
            elif self.config.adapt.commit:
                session.hooks = [("commit", lambda: commit(self.workspace)), *session.hooks]
            result = build(session, self.runner)
            if release:
                self.after(session, result)
            return result

    def say(self, kind: str, **facts: Any) -> None:
        ledger.append(self.workspace, kind, **facts)


# Adaptation.

def adapt(workspace: Workspace, runner: Runner, trigger: str, *, now: bool = False, verbose: bool = False,
          after: After = _nothing) -> Facts:
    """Learn everything that is due; what was done, `state` first: skipped, released, waiting, kept or refused.

    `now` leaves out debounce, cool-down and fewest rows: a person asks. While another run works here this one is
    skipped, because what is pending stays pending, and the sensor asks again.
    """
    began = time.monotonic()
    try:
        with _at_work(workspace, runner, verbose, after, wait=0.0) as work:
            return _adapt(work, trigger, now, began)
    except _Busy as busy:
        ledger.append(workspace, "skipped", trigger=trigger, reason=str(busy))
        return {"state": "skipped", "reason": str(busy)}


def _adapt(work: Work, trigger: str, now: bool, began: float) -> Facts:
    workspace, attempt = work.workspace, Attempt.load(work.workspace)
    found = pending(workspace, work.config, now=now)
    decision = found.due
    if found.hopeless:
        _take_in(work, None, found.hopeless)
    if attempt is None and not decision.run:
        if not found.hopeless:
            work.say("skipped", trigger=trigger, reason=decision.reason)
        return {"state": "skipped", "reason": decision.reason, "wait": decision.wait}
    wanted = [each for each in found.arrivals if each.domain in decision.domains] if decision.run else []
    work.say("started", flow="adapt", trigger=trigger, reason=decision.reason if decision.run else None,
             domains=sorted({*decision.domains} if decision.run else attempt.before if attempt else ()),
             resumed=attempt is not None)
    attempt = attempt or Attempt.begin(trigger)
    with _failures_told(work, "adaptation", began):
        _take_in(work, attempt, wanted)
        if not attempt.touched(workspace) and not attempt.refused:
            attempt.end(workspace)
            nothing = {"state": "skipped", "reason": "no new rows among what arrived"}
            return _finished(work, "adaptation", nothing, began)
        return _finished(work, "adaptation", _learn(work, attempt), began)


@dataclass(frozen=True)
class Pending:
    """What lies still in data/incoming; the part of it without a row; and whether the rest is learned now."""

    arrivals: list[Arrival]
    hopeless: list[Arrival]
    due: due.Due


def pending(workspace: Workspace, config: Config, *, now: bool = False) -> Pending:
    params = config.adapt
    if now:
        params = params.model_copy(update={"min_rows": 1, "debounce": 0.0, "cooldown": 0.0})
    clock = time.time()
    arrivals = incoming.settled(incoming.waiting(workspace), params.settle, clock)
    rows = {each.path: incoming.rows(config, each) for each in arrivals}
    groups = [due.Pending(name, name in config.domains, sum(rows[each.path] for each in files),
                          max(each.modified for each in files), len(files))
              for name in sorted({each.domain for each in arrivals})
              for files in [[each for each in arrivals if each.domain == name]]]
    return Pending(arrivals, [each for each in arrivals if not rows[each.path]],
                   due.decide(groups, params, clock, _last_end(workspace), fewest(config)))


def fewest(config: Config) -> int:
    """Rows that a new domain needs: with fewer test rows the gate has no verdict, and would hold up everybody else."""
    return max(config.prepare.min_rows, math.ceil(SPARE * config.release.min_rows / config.prepare.test))


def _last_end(workspace: Workspace) -> float | None:
    ended = ledger.read(workspace, last=1, kinds=["finished"])
    return datetime.fromisoformat(ended[-1]["at"]).timestamp() if ended else None


def _take_in(work: Work, attempt: Attempt | None, wanted: Sequence[Arrival]) -> None:
    """Take files in, or reject them; without an attempt, when all of them will be rejected."""
    if not wanted:
        return
    known = work.config.domains
    if attempt is not None:
        for name in sorted({each.domain for each in wanted} & known.keys()):
            domains.version(work.versions, name)
        attempt.note(work.workspace, {each.domain: each.domain in known for each in wanted})
    for taken in work.one("take in", lambda: incoming.take_in(work.versions, wanted)):
        if taken.files or taken.already_there:
            work.say("arrived", domain=taken.domain, rows=sum(each["rows"] for each in taken.files), new=taken.new,
                     files=taken.files, already_there=taken.already_there)
        for each in taken.rejected:
            work.say("rejected", domain=taken.domain, file=each["file"], reason=each["reason"])


def _learn(work: Work, attempt: Attempt) -> Facts:
    """Build and release what was taken in; what would make a domain worse is undone, and the rest tried again."""
    workspace = work.workspace
    undone: dict[str, list[str]] = {}
    while True:
        if attempt.refused:
            reasons = dict(attempt.refused)
            for name, files in work.one("undo", lambda: attempt.undo(work.versions)).items():
                undone[name] = files
                work.say("undone", domains=[name], files=files, reason=reasons[name])
        touched = attempt.touched(workspace)
        if not touched:   # nothing is left of it: back to what the champion is made of, out of DVC's cache
            _raise(work.build(release=False))
            attempt.end(workspace)
            return {"state": "refused", "undone": undone}
        facts = _try(work, attempt, touched)
        if facts is not None:
            attempt.end(workspace)
            work.one("prune", lambda: starts.prune(work.versions))
            return {**facts, "undone": undone}


def _try(work: Work, attempt: Attempt, touched: Sequence[str]) -> Facts | None:
    """One build with what is taken in now; None when some of it has to be undone first, as `attempt` then says."""
    workspace = work.workspace
    try:
        for name in touched:
            _start(work, attempt, name)
        result = work.build()
    except PipelineError as error:
        _blame(work, attempt, {f"prepare@{name}": error for name in touched
                               if f"prepare@{name} failed" in str(error)}, error)
        return None
    _say_trained(work, result)
    errors = {name: outcome.error for name in result.named("failed") if (outcome := result.outcomes[name]).error}
    if errors:
        _blame(work, attempt, errors, result.failure() or PipelineError("The build failed."))
        return None
    facts = _say_released(work, result.release)
    if facts["state"] == "refused":
        failed = set(facts["worse"]) & set(touched)
        attempt.refuse(workspace, sorted(failed or touched), f"the gate refused it: {facts['reason']}")
        return None
    return facts


def _blame(work: Work, attempt: Attempt, errors: dict[str, Any], otherwise: Exception) -> None:
    """Refuse the domains whose own steps cannot use their rows. Raises `otherwise` when anything else went wrong."""
    touched = attempt.touched(work.workspace)
    blamed = {name: str(error) for stage, error in errors.items() for name in touched
              if stage in (f"prepare@{name}", f"train@{name}") and not any(word in str(error) for word in ENVIRONMENT)}
    if not blamed or len(blamed) < len(errors):
        raise otherwise
    for name, reason in blamed.items():
        attempt.refuse(work.workspace, [name], reason)


def _start(work: Work, attempt: Attempt, name: str) -> None:
    """Decide, once, where the expert of `name` begins: at itself, at another domain's expert, or afresh."""
    workspace = work.workspace
    if name in attempt.started:
        return
    if attempt.before[name].known:
        if (workspace.expert(name) / MANIFEST).is_file():
            work.one(f"start {name}", lambda: starts.use(work.versions, name, name))
            work.say("start-chosen", domain=name, parent=name, reason="its expert continues")
    else:
        for stage in work.versions.stale(["base", f"prepare@{name}"]):
            work.one(stage, partial(work.versions.reproduce, stage, lambda _: None))
        if work.config.adapt.candidates:
            found = work.one(f"parent {name}", lambda: _candidates(workspace, name))
            if found["chosen"] is not None:
                work.one(f"start {name}", lambda: starts.use(work.versions, name, found["chosen"]))
            work.say("start-chosen", domain=name, parent=found["chosen"], reason=found["reason"], table=found["table"])
    attempt.started.append(name)
    attempt.save(workspace)


def _candidates(workspace: Workspace, name: str) -> Facts:
    command = [sys.executable, "-m", "moa", "parent", "--domain", name, "--json"]
    return _json_of(workspace, command, f"No start for {name} could be chosen")


def _json_of(workspace: Workspace, command: list[str], otherwise: str) -> Facts:
    """What a step in a process of its own prints. Raises PipelineError with that process's own words."""
    done = subprocess.run(command, cwd=workspace.root, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise PipelineError(f"{otherwise}: {last_error((done.stdout + done.stderr).splitlines(), done.returncode)}")
    found: Facts = json.loads(done.stdout)
    return found


# Retraining.

def retrain(workspace: Workspace, runner: Runner, trigger: str, *, from_scratch: bool | None = None,
            verbose: bool = False, after: After = _nothing) -> Facts:
    """Train again what is stale, or everything afresh; the gate compares it with the champion. What was done.

    Waits for a run that is at work. A refused training from scratch is undone: the experts stay the continued ones.
    """
    began = time.monotonic()
    with _at_work(workspace, runner, verbose, after, wait=RETRAIN_WAIT) as work:
        if Attempt.load(workspace) is not None:
            _adapt(work, "an adaptation that was interrupted", True, began)
        afresh = work.config.retrain.from_scratch if from_scratch is None else from_scratch
        continued = starts.read(workspace) if afresh else {}
        if continued:
            work.one("forget starts", lambda: starts.forget(work.versions, sorted(continued)))
        stale = work.versions.snapshot().affected
        if not stale:
            work.say("skipped", trigger=trigger, reason="nothing is stale")
            return {"state": "skipped", "reason": "nothing is stale"}
        work.say("started", flow="retrain", trigger=trigger, resumed=False,
                 reason=f"{len(stale)} stages are stale" + (", every expert begins afresh" if afresh else ""))
        with _failures_told(work, "retraining", began):
            result = work.build()
            _say_trained(work, result)
            _raise(result)
            facts = _say_released(work, result.release)
            if continued and facts["state"] in ("refused", "kept"):
                work.one("restore starts", lambda: starts.restore(work.versions, continued))
                _raise(work.build(release=False))
                work.say("undone", domains=sorted(continued), reason=facts["reason"])
            return _finished(work, "retraining", facts, began)


# Both.

class _Busy(PipelineError):
    """Another run is at work."""


@contextlib.contextmanager
def _at_work(workspace: Workspace, runner: Runner, verbose: bool, after: After, wait: float) -> Iterator[Work]:
    versions = Versions(workspace)
    with contextlib.ExitStack() as stack:
        try:
            abandoned = stack.enter_context(versions.lock(wait))
        except PipelineError as error:
            raise _Busy(str(error)) from None
        if abandoned is not None:
            ledger.append(workspace, "taken-over", pid=abandoned["pid"], since=abandoned["since"])
        yield Work(workspace, versions, runner, verbose, after)


@contextlib.contextmanager
def _failures_told(work: Work, what: str, began: float) -> Iterator[None]:
    try:
        yield
    except (MoaError, OSError, sqlite3.OperationalError) as error:   # the last is a full disk's, in DVC's databases
        with contextlib.suppress(OSError, MoaError):   # a full disk takes no more lines
            work.say("failed", step=what, reason=str(error), seconds=round(time.monotonic() - began, 1))
        raise
    except KeyboardInterrupt:
        work.say("failed", step=what, reason="interrupted; the next run continues")
        raise


def _finished(work: Work, what: str, facts: Facts, began: float) -> Facts:
    seconds = round(time.monotonic() - began, 1)
    work.say("finished", result=f"{what} {facts['state']}", seconds=seconds)
    return {**facts, "seconds": seconds}


def _raise(result: Result) -> None:
    if failure := result.failure():
        raise failure


def _say_trained(work: Work, result: Result) -> None:
    if trained := [name.partition("@")[2] for name in result.named("done") if name.startswith("train@")]:
        seconds = max(result.outcomes[f"train@{name}"].seconds for name in trained)   # those of a group share theirs
        work.say("trained", domains=trained, seconds=round(seconds, 1))


def _forgetting(work: Work, old: int | None, new: int) -> Facts | None:
    """What the new champion kept of the old one. It goes back where an expert that nobody touched answers otherwise."""
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
                            f"forgetting --old {old} --new {new}`.")
    return found


def _say_released(work: Work, release: Facts) -> Facts:
    """What the release steps came to, for people and for the policy: released, waiting, kept or refused."""
    decision, version = release["decision"], release["version"]
    facts: Facts = {"version": version, "reason": decision["reason"], "champion": release["champion"],
                    "worse": decision.get("worse", [])}
    work.say("gate", version=version, verdict="pass" if decision["promote"] else "refused", reason=decision["reason"],
             against=decision.get("against"))
    if release["waiting"]:
        return {**facts, "state": "waiting"}
    if decision["promote"] or release["champion"] == version:
        told = ledger.read(work.workspace, last=1, kinds=["released"])
        if not told or told[0]["version"] != version:   # a run that was killed may have said it
            work.say("released", version=version, instead_of=decision.get("against"))
        return {**facts, "state": "released", "instead_of": decision.get("against"),
                "forgetting": _forgetting(work, decision.get("against"), version)}
    if decision.get("harm"):
        return {**facts, "state": "refused"}
    return {**facts, "state": "kept"}
