"""The scheduled drift check of logged prompts as a Prefect flow: events, an artifact, and a line in the event log.

The check itself runs in a process of its own, so that the process that serves the flows holds no model.
"""

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event

from flows.steps import event_log
from moa.core import config
from moa.core.errors import PipelineError
from moa.core.paths import Workspace
from moa.core.project import Names
from moa.core.subprocesses import moa_json
from moa.release.registry import Registry
from moa.serving import drift as drift_report

ARTIFACT = "drift"   # end of the artifact's key, which begins with the project's name


@flow(name="drift", persist_result=False, validate_parameters=False)
def drift(root: str = ".") -> dict[str, Any] | None:
    """Check the prompts that `moa serve` logged for drift, log a changed verdict and send it to Prefect as events.

    Returns:
        The report of `moa.serving.drift.check`; None before the first release.

    Raises:
        PipelineError: the check failed.
    """
    workspace = Workspace.find(Path(root))
    settings = config.load(workspace.params)
    if Registry(workspace, settings).champion() is None:
        return None   # nothing was served, so no prompt was logged: a schedule may begin before the first release
    report = check(workspace)
    record_verdict(workspace, report)
    emit_events(report, Names.of(settings))
    return report


def check(workspace: Workspace) -> dict[str, Any]:
    """The report of `moa drift`, run in another process. Raises PipelineError with that process's error message."""
    report, problem = moa_json(workspace, "drift")
    if not report:
        raise PipelineError(f"The kept prompts could not be looked at: {problem}", cause=problem)
    return report   # the command exits with 3 when the drift needs attention


def record_verdict(workspace: Workspace, report: dict[str, Any]) -> dict[str, Any] | None:
    """Append the verdict to the event log if it differs from the last one there; the new entry, or None."""
    facts = drift_report.facts(report)
    last = event_log.read(workspace, last=1, kinds=["drift"])
    news = {name: facts[name] for name in drift_report.NEWS}
    if last and news == {name: last[0].get(name) for name in drift_report.NEWS}:
        return None
    return event_log.append(workspace, "drift", **facts)


def emit_events(report: dict[str, Any], names: Names) -> None:
    """Send Prefect the event `moa.drift`, an event `moa.domain.missing` for each missing domain, and an artifact."""
    resource = {"prefect.resource.id": names.resource("release", str(report["release"])),
                "prefect.resource.name": f"{report['name']} version {report['release']}"}
    create_markdown_artifact(key=names.artifact(ARTIFACT), markdown=drift_report.drift_markdown(report),
                             description=drift_report.headline(report))
    emit_event("moa.drift", resource=resource, payload=drift_report.facts(report))
    for group in report["missing"]:
        emit_event("moa.domain.missing", resource=resource, payload={**group, "reason": drift_report.sentence(group)})
