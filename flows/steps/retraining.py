"""The order and policy of retraining: what is stale by data, parameters, code or base, or every expert afresh.

Knows no ML, and not which runner runs it. Each decision is an entry of the event log.
"""

import time

from flows.steps.adaptation_state import AdaptationState
from flows.steps.learning import reconcile
from flows.steps.run_context import (
    After,
    Facts,
    do_nothing,
    forget_starts,
    keep_fresh,
    log_failures,
    log_finished,
    log_released,
    log_trained,
    require_success,
    restore_starts,
    run_context,
)
from flows.steps.runner import Runner
from moa.core.paths import Workspace

WAIT = 3600.0   # seconds for another run to end


def retrain(workspace: Workspace, runner: Runner, trigger: str, *, from_scratch: bool | None = None,
            verbose: bool = False, after: After = do_nothing) -> Facts:
    """Train again what is stale, or every expert afresh, and release the result if the gate passes it.

    Waits for another run to end, and finishes an interrupted adaptation first. A training from scratch that is refused
    or interrupted is undone: the experts are then again the continued ones.

    Args:
        trigger: what started the run, for the event log.
        from_scratch: whether every expert begins afresh; None = as `retrain.from_scratch` of params.yaml says.
        after: called with the session and the result of each build that releases.

    Returns:
        Facts of the run: `state` (skipped, released, waiting, kept or refused), `reason`, and `version` of a release.

    Raises:
        Busy: another run works longer than `WAIT`.
        PipelineError: the build failed.
    """
    began = time.monotonic()
    with run_context(workspace, runner, verbose, after, wait=WAIT) as work:
        if AdaptationState.load(workspace) is not None:
            reconcile(work, "an adaptation that was interrupted", True, began)
        afresh = work.config.retrain.from_scratch if from_scratch is None else from_scratch
        with log_failures(work, "retraining", began):
            if afresh:
                forget_starts(work)
            stale = work.versions.snapshot().affected
            if not stale:
                work.say("skipped", trigger=trigger, reason="nothing is stale")
                return {"state": "skipped", "reason": "nothing is stale"}
            work.say("started", flow="retrain", trigger=trigger, resumed=False,
                     reason=f"{len(stale)} stages are stale" + (", every expert begins afresh" if afresh else ""))
            result = work.build()
            log_trained(work, result)
            require_success(result)
            facts = log_released(work, result.release)
            if facts["state"] not in ("refused", "kept"):
                keep_fresh(work)
            elif undone := restore_starts(work):
                work.say("undone", domains=undone, reason=facts["reason"])
            return log_finished(work, "retraining", facts, began)
