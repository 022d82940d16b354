"""The order and policy of adaptation: what is learned now, where it starts, what a refusal means.

Everything that waits in data/incoming, in one run:

    taken in -> a start for each expert -> build, register, gate, promote (flows/steps/stage_order.py)
    refused because a domain would get worse: undone, and the files go to data/incoming/.rejected
    refused because nothing is better: the rows stay, for the next ones to join them

Written once for every runner; knows no ML, and not whether Prefect watches. Each decision is a line of the ledger.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from flows.steps import adapt_policy, event_log
from flows.steps.adaptation_state import AdaptationState
from flows.steps.run_context import (
    After,
    Busy,
    Facts,
    RunContext,
    do_nothing,
    log_failures,
    log_finished,
    log_released,
    log_trained,
    require_success,
    run_context,
)
from flows.steps.runner import Runner
from moa.core.config import Config
from moa.core.errors import PipelineError
from moa.core.paths import MANIFEST, Workspace
from moa.core.subprocesses import moa_json
from moa.workspace import domains, incoming, warm_starts
from moa.workspace.incoming import Arrival

SPARE = 1.25   # rows share sides by chance: the test split may be smaller than its share
MOST_WAITS = 15   # times `adapt.settle` that an adaptation by hand waits for files that are being written
ENVIRONMENT = ("No space left", "was interrupted", "Cannot allocate", "Input/output error")   # not the rows' fault


def adapt(workspace: Workspace, runner: Runner, trigger: str, *, now: bool = False, verbose: bool = False,
          after: After = do_nothing) -> Facts:
    """Learn everything that is due; what was done, `state` first: skipped, released, waiting, kept or refused.

    `now` leaves out debounce, cool-down and fewest rows: a person asks, so files that were just written are waited for.
    While another run works here this one is skipped, because what is pending stays pending, and the sensor asks again.
    """
    began = time.monotonic()
    try:
        with run_context(workspace, runner, verbose, after, wait=0.0) as work:
            if now:
                wait_until_settled(workspace, work.config.adapt.settle)
            return reconcile(work, trigger, now, began)
    except Busy as busy:
        event_log.append(workspace, "skipped", trigger=trigger, reason=str(busy))
        return {"state": "skipped", "reason": str(busy)}


def wait_until_settled(workspace: Workspace, seconds: float) -> None:
    """Wait until every file in data/incoming was last written so many seconds ago: half a copy cannot be learned.

    A file that keeps growing is waited for MOST_WAITS times as long, and then left to the next run.
    """
    end = time.monotonic() + MOST_WAITS * seconds
    while time.monotonic() < end:
        arrivals = incoming.waiting_files(workspace)
        if len(incoming.settled_files(arrivals, seconds, time.time())) == len(arrivals):
            return
        time.sleep(min(0.1, seconds))


def reconcile(work: RunContext, trigger: str, now: bool, began: float) -> Facts:
    """The same, under the lock."""
    workspace, attempt = work.workspace, AdaptationState.load(work.workspace)
    found = pending_rows(workspace, work.config, now=now)
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
    attempt = attempt or AdaptationState.begin(trigger)
    with log_failures(work, "adaptation", began):
        _take_in(work, attempt, wanted)
        if not attempt.touched(workspace) and not attempt.refused:
            attempt.end(workspace)
            facts = {"state": "skipped", "reason": "no new rows among what arrived"}
            return log_finished(work, "adaptation", facts, began)
        return log_finished(work, "adaptation", _learn(work, attempt), began)


@dataclass(frozen=True)
class PendingFiles:
    """What lies still in data/incoming; the part of it without a row; and whether the rest is learned now."""

    arrivals: list[Arrival]
    hopeless: list[Arrival]
    due: adapt_policy.AdaptDecision


def pending_rows(workspace: Workspace, config: Config, *, now: bool = False) -> PendingFiles:
    params = config.adapt
    if now:
        params = params.model_copy(update={"min_rows": 1, "debounce": 0.0, "cooldown": 0.0})
    clock = time.time()
    arrivals = incoming.settled_files(incoming.waiting_files(workspace), params.settle, clock)
    rows = {each.path: incoming.usable_row_count(config, each) for each in arrivals}
    groups = [adapt_policy.PendingRows(name, name in config.domains, sum(rows[each.path] for each in files),
                                       max(each.modified for each in files), len(files))
              for name in sorted({each.domain for each in arrivals})
              for files in [[each for each in arrivals if each.domain == name]]]
    return PendingFiles(arrivals, [each for each in arrivals if not rows[each.path]],
                        adapt_policy.decide(groups, params, clock, _last_end(workspace), min_new_rows(config)))


def min_new_rows(config: Config) -> int:
    """Rows that a new domain needs: with fewer test rows the gate has no verdict, which holds up every other domain."""
    return max(config.prepare.min_rows, math.ceil(SPARE * config.release.min_rows / config.prepare.test))


def _last_end(workspace: Workspace) -> float | None:
    ended = event_log.read(workspace, last=1, kinds=["finished"])
    return datetime.fromisoformat(ended[-1]["at"]).timestamp() if ended else None


def _take_in(work: RunContext, attempt: AdaptationState | None, wanted: Sequence[Arrival]) -> None:
    """Take files in, or reject them; without an attempt, when all of them will be rejected."""
    if not wanted:
        return
    known = work.config.domains
    if attempt is not None:
        for name in sorted({each.domain for each in wanted} & known.keys()):
            domains.version_rows(work.versions, name)
        attempt.note(work.workspace, {each.domain: each.domain in known for each in wanted})
    for taken in work.one("take in", lambda: incoming.ingest(work.versions, wanted)):
        if taken.files or taken.already_there:
            work.say("arrived", domain=taken.domain, rows=sum(each["rows"] for each in taken.files), new=taken.new,
                     files=taken.files, already_there=taken.already_there)
        for each in taken.rejected:
            work.say("rejected", domain=taken.domain, file=each["file"], reason=each["reason"])


def _learn(work: RunContext, attempt: AdaptationState) -> Facts:
    """Build and release what was taken in; what would make a domain worse is undone, and the rest tried again."""
    workspace = work.workspace
    undone: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    while True:
        if attempt.refused:
            reasons.update(attempt.refused)
            for name, files in work.one("undo", lambda: attempt.undo(work.versions)).items():
                undone[name] = files
                work.say("undone", domains=[name], files=files, reason=reasons[name])
        touched = attempt.touched(workspace)
        if not touched:   # nothing is left of it: back to what the champion is made of, out of DVC's cache
            require_success(work.build(release=False))
            attempt.end(workspace)
            return {"state": "refused", "undone": undone, "reason": "; ".join(dict.fromkeys(reasons.values()))}
        facts = _try(work, attempt, touched)
        if facts is not None:
            attempt.end(workspace)
            work.one("prune", lambda: warm_starts.prune(work.versions))
            return {**facts, "undone": undone}


def _try(work: RunContext, attempt: AdaptationState, touched: Sequence[str]) -> Facts | None:
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
    log_trained(work, result)
    errors = {name: outcome.error for name in result.named("failed") if (outcome := result.outcomes[name]).error}
    if errors:
        _blame(work, attempt, errors, result.failure() or PipelineError("The build failed."))
        return None
    facts = log_released(work, result.release)
    if facts["state"] == "refused":
        failed = set(facts["worse"]) & set(touched)
        attempt.refuse(workspace, sorted(failed or touched), f"the gate refused it: {facts['reason']}")
        return None
    return facts


def _blame(work: RunContext, attempt: AdaptationState, errors: dict[str, Any], otherwise: Exception) -> None:
    """Refuse the domains whose own steps cannot use their rows. Raises `otherwise` when anything else went wrong."""
    touched = attempt.touched(work.workspace)
    blamed = {name: str(error) for stage, error in errors.items() for name in touched
              if stage in (f"prepare@{name}", f"train@{name}") and not any(word in str(error) for word in ENVIRONMENT)}
    if not blamed or len(blamed) < len(errors):
        raise otherwise
    for name, reason in blamed.items():
        attempt.refuse(work.workspace, [name], reason)


def _start(work: RunContext, attempt: AdaptationState, name: str) -> None:
    """Decide, once, where the expert of `name` begins: at itself, at another domain's expert, or afresh."""
    workspace = work.workspace
    if name in attempt.started:
        return
    if attempt.before[name].known:
        if (workspace.expert(name) / MANIFEST).is_file():
            work.one(f"start {name}", lambda: warm_starts.use(work.versions, name, name))
            work.say("start-chosen", domain=name, parent=name, reason="its expert continues")
    else:
        for stage in work.versions.stale(["base", f"prepare@{name}"]):
            work.one(stage, partial(work.versions.reproduce, stage, lambda _: None))
        if work.config.adapt.candidates:
            found = work.one(f"parent {name}", lambda: _candidates(workspace, name))
            if found["chosen"] is not None:
                work.one(f"start {name}", lambda: warm_starts.use(work.versions, name, found["chosen"]))
            work.say("start-chosen", domain=name, parent=found["chosen"], reason=found["reason"], table=found["table"])
    attempt.started.append(name)
    attempt.save(workspace)


def _candidates(workspace: Workspace, name: str) -> Facts:
    found, problem = moa_json(workspace, "parent", "--domain", name)
    if problem:
        raise PipelineError(f"No start for {name} could be chosen: {problem}")
    return found
