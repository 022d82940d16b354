"""Adaptation and retraining as Prefect flows: what `moa up` serves. Order and policy are in `flows.steps.learning`."""

import os
from pathlib import Path
from typing import Any

from prefect import flow

from flows import artifacts
from flows.build import PrefectRunner
from flows.steps import event_log, learning, retraining
from moa.core.config import load
from moa.core.paths import Workspace
from moa.core.supervisor import end_with_parent

if "PREFECT__FLOW_RUN_ID" in os.environ:   # a runner started this process for one flow run
    end_with_parent()                      # and when it is killed, it cannot end us


@flow(name="adapt", persist_result=False, validate_parameters=False)
def adapt(root: str = ".", trigger: str = "an event", now: bool = False) -> dict[str, Any]:
    """Learn everything that waits in data/incoming of the workspace at `root`, and release it if the gate lets it."""
    workspace, runner, before = _opened(root)
    facts = learning.adapt(workspace, runner, trigger, now=now, after=artifacts.store)
    artifacts.store_run(workspace, before, facts)
    return facts


@flow(name="retrain", persist_result=False, validate_parameters=False)
def retrain(root: str = ".", trigger: str = "the schedule", from_scratch: bool | None = None) -> dict[str, Any]:
    """Train again what is stale, or every expert afresh, and release it if the gate lets it."""
    workspace, runner, before = _opened(root)
    facts = retraining.retrain(workspace, runner, trigger, from_scratch=from_scratch, after=artifacts.store)
    artifacts.store_run(workspace, before, facts)
    return facts


def _opened(root: str) -> tuple[Workspace, PrefectRunner, int]:
    """The workspace, a runner for it, and how many lines its ledger has."""
    workspace = Workspace.find(Path(root))
    return workspace, PrefectRunner(load(workspace.params).execution.workers), len(event_log.read(workspace))
