"""The order and policy of retraining: whatever is stale by data, parameters, code or base, or every expert afresh.

Knows no ML, and not whether Prefect watches. Each decision is a line of the ledger.
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
    """Train again what is stale, or everything afresh; the gate compares it with the champion. What was done.

    Waits for a run that is at work. A training from scratch that is refused or interrupted is undone: the experts stay
    the continued ones.
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
