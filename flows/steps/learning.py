"""The order and policy of adaptation: what is learned now, where it starts, what a refusal means.

Everything that waits in data/incoming, in one run:

    taken in -> a start for each expert -> build, register, gate, promote (flows/steps/stage_order.py)
    a domain that would get worse: undone, and its files go to data/incoming/.rejected
    a domain that cannot be judged yet, or a new one that is no better: undone, and its files wait in data/incoming
    the others are tried again without these
    nothing is better: the rows of known domains stay, for the next ones to join them

Written once for every runner; knows no ML, and not whether Prefect watches. Each decision is a line of the ledger.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from flows.steps import adapt_policy, deferral, event_log
from flows.steps import release as releasing
from flows.steps.adaptation_state import AdaptationState
from flows.steps.deferral import Deferral
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
from moa.core.errors import PipelineError, UsageError, blames_rows
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.core.subprocesses import moa_json
from moa.evaluation import power
from moa.workspace import domains, incoming, warm_starts
from moa.workspace.incoming import Arrival

SPARE = 1.25   # rows share sides by chance: the test split may be smaller than its share
MOST_WAITS = 15   # times `adapt.settle` that an adaptation by hand waits for files that are being written


def adapt(workspace: Workspace, runner: Runner, trigger: str, *, now: bool = False, accept: str | None = None,
          reason: str = "", verbose: bool = False, after: After = do_nothing) -> Facts:
    """Learn everything that is due, or with `accept` what was refused of one domain.

    While another run works here this one is skipped, because what is pending stays pending, and the sensor asks again.

    Args:
        trigger: what started the run, for the event log.
        now: leave out debounce, cool-down and fewest rows: a person asks, so files that were just written are waited
            for.
        accept: a domain whose refused rows are taken in again and released although the gate objects; all other files
            wait.
        reason: why, for the history of champions.

    Returns:
        What was done, `state` first: skipped, released, waiting, kept, deferred or refused.

    Raises UsageError for `accept` without a reason, or without refused rows.
    """
    began = time.monotonic()
    reason = check_acceptance(workspace, accept, reason)
    try:
        with run_context(workspace, runner, verbose, after, wait=0.0) as work:
            if accept is not None:
                return _accept(work, accept, reason, trigger, began)
            if now:
                wait_until_settled(workspace, work.config.adapt.settle)
            return reconcile(work, trigger, now, began)
    except Busy as busy:
        event_log.append(workspace, "skipped", trigger=trigger, reason=str(busy))
        return {"state": "skipped", "reason": str(busy)}


def check_acceptance(workspace: Workspace, name: str | None, reason: str) -> str:
    """The reason, stripped. Raises UsageError unless it is given for exactly a domain that has refused rows."""
    reason = reason.strip()
    if name is None and reason:
        raise UsageError("--reason TEXT goes with --accept NAME: it says why the gate is overruled.")
    if name is not None:
        if not reason:
            raise UsageError("--accept NAME needs --reason TEXT: the history must say why the gate was overruled.")
        incoming.refused_files(workspace, name)
    return reason


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
        outcome = {"outcome": deferral.NOT_ENOUGH} if found.lacking and not decision.domains else {}
        return {"state": "skipped", "reason": decision.reason, "wait": decision.wait, **outcome}
    wanted = [each for each in found.arrivals if each.domain in decision.domains] if decision.run else []
    work.say("started", flow="adapt", trigger=trigger, reason=decision.reason if decision.run else None,
             domains=sorted({*decision.domains} if decision.run else attempt.before if attempt else ()),
             resumed=attempt is not None)
    return _run(work, attempt or AdaptationState.begin(trigger), wanted, began)


def _accept(work: RunContext, name: str, reason: str, trigger: str, began: float) -> Facts:
    """Take in what was refused of one domain, and release it although the gate objects."""
    workspace = work.workspace
    if AdaptationState.load(workspace) is not None:
        raise UsageError("An adaptation was interrupted: run `moa adapt` to finish it, then accept.")
    arrivals = incoming.take_back(workspace, name, incoming.refused_files(workspace, name))
    work.say("started", flow="adapt", trigger=trigger, domains=[name], resumed=False)
    work.say("accepted", domain=name, reason=reason, files=[each.path.name for each in arrivals])
    attempt = AdaptationState.begin(trigger)
    attempt.accepted[name] = reason
    return _run(work, attempt, arrivals, began)


def _run(work: RunContext, attempt: AdaptationState, wanted: Sequence[Arrival], began: float) -> Facts:
    """Take in the wanted files, learn what has changed, and log the end."""
    with log_failures(work, "adaptation", began):
        _take_in(work, attempt, wanted)
        if not attempt.touched(work.workspace) and not attempt.refused and not attempt.deferred:
            attempt.end(work.workspace)
            facts = {"state": "skipped", "reason": "no new rows among what arrived"}
            return log_finished(work, "adaptation", facts, began)
        return log_finished(work, "adaptation", _learn(work, attempt), began)


@dataclass(frozen=True)
class PendingFiles:
    """What lies still in data/incoming."""

    arrivals: list[Arrival]
    hopeless: list[Arrival]            # those without a usable row
    due: adapt_policy.AdaptDecision    # whether the others are learned now
    lacking: bool = False              # some wait because the gate had not enough data to tell


def pending_rows(workspace: Workspace, config: Config, *, now: bool = False) -> PendingFiles:
    params = config.adapt
    if now:
        params = params.model_copy(update={"min_rows": 1, "debounce": 0.0, "cooldown": 0.0})
    clock = time.time()
    arrivals = incoming.settled_files(incoming.waiting_files(workspace), params.settle, clock)
    rows = {each.path: incoming.usable_row_count(config, each) for each in arrivals}
    waits = deferral.read(workspace, config)
    groups = [_pending(workspace, config, arrivals, rows, name, waits.get(name))
              for name in sorted({each.domain for each in arrivals})]
    return PendingFiles(arrivals, [each for each in arrivals if not rows[each.path]],
                        adapt_policy.decide(groups, params, clock, _last_end(workspace), min_new_rows(config)),
                        any(each.waits and each.why == deferral.NOT_ENOUGH for each in groups))


def _pending(workspace: Workspace, config: Config, arrivals: Sequence[Arrival], rows: Mapping[Path, int], name: str,
             deferred: Deferral | None) -> adapt_policy.PendingRows:
    """What waits for one domain. `rows`: usable rows by file."""
    def waiting(domain: str) -> int:
        return sum(rows[each.path] for each in arrivals if each.domain == domain)

    files = [each for each in arrivals if each.domain == name]
    pending = adapt_policy.PendingRows(name, name in config.domains, waiting(name),
                                       max(each.modified for each in files), len(files))
    if deferred is None:
        return pending
    kept = 0
    if deferred.of:
        with suppress(OSError, ValueError, KeyError):   # a domain without a corpus has no rows
            kept = read_json(workspace.corpus(deferred.of) / MANIFEST)["rows"]["kept"]
    return replace(pending, lacking=deferred.lacks(pending.rows, waiting(deferred.of), kept), why=deferred.why,
                   of=deferred.of or name)


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
        deferral.forget(work.workspace, work.config, [each.domain for each in wanted])
    for taken in work.one("take in", lambda: incoming.ingest(work.versions, wanted)):
        if taken.files or taken.already_there:
            work.say("arrived", domain=taken.domain, rows=sum(each["rows"] for each in taken.files), new=taken.new,
                     files=taken.files, already_there=taken.already_there)
        for each in taken.rejected:
            work.say("rejected", domain=taken.domain, file=each["file"], reason=each["reason"])


def _learn(work: RunContext, attempt: AdaptationState) -> Facts:
    """Build and release what was taken in; what cannot be released is undone, and the rest tried again."""
    workspace = work.workspace
    undone: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    waits: dict[str, Deferral] = {}
    while True:
        if attempt.refused or attempt.deferred:
            reasons.update(attempt.refused)
            waits.update(attempt.deferred)
            for name, files in work.one("undo", lambda: attempt.undo(work.versions)).items():
                if name in reasons:
                    undone[name] = files
                    work.say("undone", domains=[name], files=files, reason=reasons[name])
                else:
                    work.say("deferred", domain=name, files=files, reason=deferral.reason(name, waits[name]))
        deferred = {name: f"{name} waits: {deferral.reason(name, each)}" for name, each in sorted(waits.items())}
        touched = attempt.touched(workspace)
        if not touched:   # nothing is left of it: back to what the champion is made of, out of DVC's cache
            require_success(work.build(release=False))
            attempt.end(workspace)
            said = "; ".join(dict.fromkeys([*reasons.values(), *deferred.values()]))
            short = any(each.why == deferral.NOT_ENOUGH for each in waits.values())
            return {"state": "refused" if reasons else "deferred", "undone": undone, "deferred": deferred,
                    "reason": said, "outcome": "worse" if reasons else deferral.NOT_ENOUGH if short else "no better"}
        facts = _try(work, attempt, touched)
        if facts is not None:
            attempt.end(workspace)
            work.one("prune", lambda: warm_starts.prune(work.versions))
            return {**facts, "undone": undone, "deferred": deferred}


def _try(work: RunContext, attempt: AdaptationState, touched: Sequence[str]) -> Facts | None:
    """One build with what is taken in now; None when some of it has to be undone first, as `attempt` then says."""
    workspace = work.workspace
    try:
        for name in touched:
            _start(work, attempt, name)
        if attempt.deferred:   # some have too few test rows, which is known before any training
            return None
        result = work.build(touched=touched, accepted=bool(attempt.accepted))
    except PipelineError as error:
        _blame(work, attempt, {error.stage: error} if error.stage else {}, error)
        return None
    log_trained(work, result)
    errors = {name: outcome.error for name in result.named("failed") if (outcome := result.outcomes[name]).error}
    if errors:
        _blame(work, attempt, errors, result.failure() or PipelineError("The build failed."))
        return None
    release = result.release
    refused, deferred = blamed(release["decision"], touched, [name for name in touched
                                                              if not attempt.before[name].known])
    refused = [name for name in refused if name not in attempt.accepted]
    deferred = {name: of for name, of in deferred.items() if name not in attempt.accepted}
    if attempt.accepted and not refused and not deferred:
        release = _overruled(work, attempt, release)
    facts = log_released(work, release)
    if facts["state"] == "refused" and refused:
        attempt.refuse(workspace, refused, f"the gate refused it: {facts['reason']}")
        return None
    if facts["state"] in ("refused", "kept") and deferred:
        for name, of in deferred.items():
            _defer(work, attempt, name, release["decision"]["domains"][of].get("more_groups", 0), of)
        return None
    return facts


def blamed(decision: Mapping[str, Any], touched: Sequence[str], new: Sequence[str]
           ) -> tuple[list[str], dict[str, str]]:
    """Which of the touched domains keep a release from being promoted.

    Where something would get worse, the domains to blame are refused: those that fail themselves, else new ones that
    prompts of other domains go to, else all. Otherwise those are deferred that cannot be judged yet, and new ones that
    are no better than what answers today. Where only untouched domains cannot be judged, the new domains are deferred:
    with them the router has changed.

    Args:
        decision: the gate's, as `Decision.as_dict` gives it.
        touched: the domains that have new rows.
        new: those of them that the workspace lacked before.

    Returns:
        The domains that are refused; and those that are deferred, each with the domain whose rows are lacking.
    """
    if decision["promote"]:
        return [], {}
    if decision.get("harm"):
        failed = set(decision.get("worse", ())) & set(touched)
        routes = decision.get("routing", {}).get("domains", {})
        takers = {guess for each in routes.values() for guess in each["lost"]} & set(new)
        return sorted(failed or takers or touched), {}
    verdicts = {name: each["verdict"] for name, each in decision.get("domains", {}).items()}
    unclear = [name for name, verdict in sorted(verdicts.items()) if verdict == "not enough data"]
    deferred = {name: name for name in sorted(touched)
                if name in unclear or (name in new and verdicts.get(name) == "no better")}
    return [], deferred or {name: unclear[0] for name in sorted(new) if unclear}


def _defer(work: RunContext, attempt: AdaptationState, name: str, groups: int, of: str) -> None:
    """Let the rows of a domain wait for the rows of domain `of` that bring about so many more test groups.

    0 groups = it is no better, and waits for a quarter of its new rows.
    """
    workspace = work.workspace
    if groups:
        rows = power.rows_for(groups, read_json(workspace.corpus(of) / MANIFEST), work.config.prepare.test)
        attempt.defer(workspace, name, deferral.NOT_ENOUGH, rows, of)
    else:
        rows = max(math.ceil(attempt.new_rows(workspace, name) / 4), 1)
        attempt.defer(workspace, name, deferral.NO_BETTER, rows, name)


def _overruled(work: RunContext, attempt: AdaptationState, release: Facts) -> Facts:
    """Promote a release that a person has accepted. Returns its facts as those of a champion."""
    decision, version = release["decision"], release["version"]
    if decision["reason"] == releasing.ALREADY:
        return release
    reason = "; ".join(f"accepted {name}: {why}" for name, why in sorted(attempt.accepted.items()))
    work.one("promote", lambda: releasing.promote(work.workspace, work.config, version, reason,
                                                  instead_of=decision["against"]))
    return {**release, "champion": version, "waiting": False, "accepted": f"{reason}."}


def _blame(work: RunContext, attempt: AdaptationState, errors: Mapping[str, Exception], otherwise: Exception) -> None:
    """Refuse the domains whose own stages cannot use their rows. Raises `otherwise` when anything else went wrong.

    `errors`: by failed stage.
    """
    touched = attempt.touched(work.workspace)
    blamed = {name: str(error) for stage, error in errors.items() for name in touched
              if stage in (f"prepare@{name}", f"train@{name}") and blames_rows(error)}
    if not blamed or len(blamed) < len(errors):
        raise otherwise
    for name, reason in blamed.items():
        attempt.refuse(work.workspace, [name], reason)


def _start(work: RunContext, attempt: AdaptationState, name: str) -> None:
    """Prepare the corpus of `name`, and decide where its expert begins: at itself, at another domain's, or afresh.

    Done once for each domain. One whose corpus has too few test groups for any verdict is deferred instead.
    """
    workspace = work.workspace
    if name in attempt.started:
        return
    for stage in work.versions.stale(["base", f"prepare@{name}"]):
        work.one(stage, partial(work.versions.reproduce, stage, lambda _: None))
    lacking = power.lacking_groups(read_json(workspace.corpus(name) / MANIFEST), work.config.release)
    if lacking and name not in attempt.accepted:
        _defer(work, attempt, name, lacking, name)
        return
    if attempt.before[name].known:
        if (workspace.expert(name) / MANIFEST).is_file():
            work.one(f"start {name}", lambda: warm_starts.use(work.versions, name, name))
            work.say("start-chosen", domain=name, parent=name, reason="its expert continues")
    elif work.config.adapt.candidates:
        found = work.one(f"parent {name}", lambda: _candidates(workspace, name))
        if found["chosen"] is not None:
            work.one(f"start {name}", lambda: warm_starts.use(work.versions, name, found["chosen"]))
        work.say("start-chosen", domain=name, parent=found["chosen"], reason=found["reason"], table=found["table"])
    attempt.started.append(name)
    attempt.save(workspace)


def _candidates(workspace: Workspace, name: str) -> Facts:
    found, problem = moa_json(workspace, "parent", "--domain", name)
    if problem:
        raise PipelineError(f"No start for {name} could be chosen: {problem}", cause=problem)
    return found
