"""Adaptation as a Prefect flow: what `moa up` serves on events. Order and policy are in `flows.steps.learning`."""

from typing import Any

from prefect import flow

from flows import artifacts
from flows.build import flow_context
from flows.retrain import retrain as retrain  # deployments made by earlier versions name `flows.adapt.retrain`
from flows.steps import learning


@flow(name="adapt", persist_result=False, validate_parameters=False)
def adapt(root: str = ".", trigger: str = "an event", now: bool = False) -> dict[str, Any]:
    """Learn everything that waits in data/incoming of the workspace at `root`, and release it if the gate lets it."""
    workspace, runner, before = flow_context(root)
    facts = learning.adapt(workspace, runner, trigger, now=now, after=artifacts.store_build)
    artifacts.store_learning(workspace, before, facts)
    return facts
