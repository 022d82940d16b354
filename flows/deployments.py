"""What Prefect is told of a workspace's flows: names, schedules, triggers. prefect.yaml says the same for a work pool.

Imports Prefect: whoever imports this has set PREFECT_API_URL.
"""

from datetime import timedelta
from typing import Any

from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.events import DeploymentEventTrigger
from prefect.flows import EntrypointType, Flow

from flows.adapt import adapt, retrain
from flows.drift import drift
from flows.sensor import ARRIVED, RESOURCE
from moa.config import Config, DriftParams, RetrainParams
from moa.workspace import Workspace

TAGS = ["moa"]


def deployments(workspace: Workspace, config: Config) -> list[Any]:
    """`adapt`, by event; `retrain` and `drift`, by their schedules in params.yaml."""
    arrived = DeploymentEventTrigger(
        name=f"rows arrived in {workspace.root.name}", expect={ARRIVED},
        match={"prefect.resource.id": f"{RESOURCE}*"},
        parameters={"trigger": "rows of {{ event.payload.domain }} arrived"})
    return [_deployed(workspace, adapt, triggers=[arrived]),
            _deployed(workspace, retrain, schedules=_schedules(config.retrain)),
            _deployed(workspace, drift, schedules=_schedules(config.drift))]


def _deployed(workspace: Workspace, flow: Flow, **how: Any) -> Any:
    return flow.to_deployment(name="moa", tags=TAGS, parameters={"root": str(workspace.root)},
                              entrypoint_type=EntrypointType.MODULE_PATH, enforce_parameter_schema=False, **how)


def _schedules(params: RetrainParams | DriftParams) -> list[Any]:
    found: list[Any] = []
    if params.cron:
        found.append(CronSchedule(cron=params.cron, timezone=getattr(params, "timezone", "UTC")))
    if interval := getattr(params, "interval", None):
        found.append(IntervalSchedule(interval=timedelta(seconds=interval)))
    return found
