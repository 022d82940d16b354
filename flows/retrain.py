"""Retraining as a Prefect flow, which `moa up` serves on a schedule. Its order is in `flows.steps.retraining`."""

from typing import Any

from prefect import flow

from flows import artifacts
from flows.build import flow_context
from flows.steps import retraining


@flow(name="retrain", persist_result=False, validate_parameters=False)
def retrain(root: str = ".", trigger: str = "the schedule", from_scratch: bool | None = None) -> dict[str, Any]:
    """Train again what is stale, or every expert afresh, and release it if the gate lets it.

    Args:
        trigger: what started the run, for the event log.
        from_scratch: whether every expert begins afresh; None = as `retrain.from_scratch` of params.yaml says.

    Returns:
        The facts of `flows.steps.retraining.retrain`.
    """
    workspace, runner, logged = flow_context(root)
    facts = retraining.retrain(workspace, runner, trigger, from_scratch=from_scratch, after=artifacts.store_build)
    artifacts.store_learning(workspace, logged, facts)
    return facts
