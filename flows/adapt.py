"""Adaptation as a Prefect flow, which `moa up` starts on events. Order and policy are in `flows.steps.learning`."""

from typing import Any

from prefect import flow

from flows import artifacts
from flows.build import flow_context
from flows.retrain import retrain as retrain  # deployments made by earlier versions name `flows.adapt.retrain`
from flows.steps import learning


@flow(name="adapt", persist_result=False, validate_parameters=False)
def adapt(root: str = ".", trigger: str = "an event", now: bool = False, accept: str | None = None,
          reason: str = "") -> dict[str, Any]:
    """Learn everything that waits in data/incoming of the workspace at `root`, and release it if the gate lets it.

    Args:
        trigger: what started the run, for the event log.
        now: ignore `adapt.min_rows`, `adapt.debounce` and `adapt.cooldown`.
        accept, reason: a domain whose refused rows are released although the gate objects, and why.

    Returns:
        The facts of `flows.steps.learning.adapt`.
    """
    workspace, runner, logged = flow_context(root)
    facts = learning.adapt(workspace, runner, trigger, now=now, accept=accept, reason=reason,
                           after=artifacts.store_build)
    artifacts.store_learning(workspace, logged, facts)
    return facts
