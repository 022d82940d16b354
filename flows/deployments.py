"""Prefect deployments of a workspace's flows: names, schedules, triggers. prefect.yaml has the same for a work pool.

Imports Prefect, so PREFECT_API_URL must be set before this module is imported.
"""

from datetime import timedelta
from typing import Any

from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.events import DeploymentEventTrigger
from prefect.flows import EntrypointType, Flow

from flows.adapt import adapt
from flows.drift import drift
from flows.retrain import retrain
from flows.sensor import ARRIVED, related_resources
from moa.core.config import Config, DriftParams, RetrainParams
from moa.core.paths import Workspace
from moa.core.project import Names, deployment_name, former_deployment_names

TAGS = ["moa"]


def deployments(workspace: Workspace, config: Config) -> list[Any]:
    """The deployments that `moa up` serves: `adapt` on events, `retrain` and `drift` by schedules of params.yaml.

    Returns:
        Prefect's `RunnerDeployment` objects, as `prefect.serve` takes them.
    """
    arrived = DeploymentEventTrigger(
        name=f"rows arrived in {workspace.root.name}", expect={ARRIVED},
        match={"prefect.resource.id": Names.of(config).resource("domain", "*")},
        match_related=related_resources(workspace, config) or {},
        parameters={"trigger": "rows of {{ event.payload.domain }} arrived"})
    return [_deployment(workspace, config, adapt, triggers=[arrived]),
            _deployment(workspace, config, retrain, schedules=_schedules(config.retrain)),
            _deployment(workspace, config, drift, schedules=_schedules(config.drift))]


def delete_former(workspace: Workspace, config: Config) -> None:
    """Delete this workspace's deployments under former names, which would run beside those that are served now."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    former = DeploymentFilter(name=DeploymentFilterName(any_=sorted(former_deployment_names(workspace, config))))
    with get_client(sync_client=True) as client:
        for deployment in client.read_deployments(deployment_filter=former):
            if deployment.parameters.get("root") == str(workspace.root):
                client.delete_deployment(deployment.id)


def _deployment(workspace: Workspace, config: Config, flow: Flow, **options: Any) -> Any:
    return flow.to_deployment(name=deployment_name(workspace, config), tags=TAGS,
                              parameters={"root": str(workspace.root)},
                              entrypoint_type=EntrypointType.MODULE_PATH, enforce_parameter_schema=False, **options)


def _schedules(params: RetrainParams | DriftParams) -> list[Any]:
    schedules: list[Any] = []
    if params.cron:
        schedules.append(CronSchedule(cron=params.cron, timezone=getattr(params, "timezone", "UTC")))
    if interval := getattr(params, "interval", None):
        schedules.append(IntervalSchedule(interval=timedelta(seconds=interval)))
    return schedules
