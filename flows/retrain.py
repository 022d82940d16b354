"""Retraining as a Prefect flow, which `moa up` serves on a schedule. Its order is in `flows.steps.retraining`."""

from typing import Any

from prefect import flow

from flows import artifacts
from flows.build import flow_context
from flows.steps import retraining


@flow(name="retrain", persist_result=False, validate_parameters=False)
def retrain(root: str = ".", trigger: str = "the schedule", from_scratch: bool | None = None) -> dict[str, Any]:
    """Train again what is stale, or every expert afresh, and release it if the gate lets it."""
    workspace, runner, before = flow_context(root)
    facts = retraining.retrain(workspace, runner, trigger, from_scratch=from_scratch, after=artifacts.store_build)
    artifacts.store_learning(workspace, before, facts)
    return facts
