"""The scheduled look at kept prompts as a Prefect flow: an event, an artifact, and a line in the event log.

The check itself runs in a process of its own, so that a server of flows holds no model.
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
from moa.serving import drift as looking

ARTIFACT = "drift"   # end of its key, which begins with the project's name


@flow(name="drift", persist_result=False, validate_parameters=False)
def drift(root: str = ".") -> dict[str, Any] | None:
    """Look at the prompts that `moa serve` kept; tell what was found. None before the first release."""
    workspace = Workspace.find(Path(root))
    settings = config.load(workspace.params)
    if Registry(workspace, settings).champion() is None:
        return None   # nothing served, so nothing kept: a schedule may begin before the first release
    report = check(workspace)
    record_verdict(workspace, report)
    emit_events(report, Names.of(settings))
    return report


def check(workspace: Workspace) -> dict[str, Any]:
    """What `moa drift` says, in another process. Raises PipelineError with that process's own words."""
    report, problem = moa_json(workspace, "drift")
    if not report:
        raise PipelineError(f"The kept prompts could not be looked at: {problem}")
    return report   # the command exits with 3 when the drift needs attention


def record_verdict(workspace: Workspace, report: dict[str, Any]) -> dict[str, Any] | None:
    """A line in the ledger where the check says something else than the last one did: what was added, or None."""
    facts = looking.facts(report)
    last = event_log.read(workspace, last=1, kinds=["drift"])
    told = {name: facts[name] for name in looking.NEWS}
    if last and told == {name: last[0].get(name) for name in looking.NEWS}:
        return None
    return event_log.append(workspace, "drift", **facts)


def emit_events(report: dict[str, Any], names: Names) -> None:
    """The events `moa.drift` and, for each group, `moa.domain.missing`; and a page in Prefect's own interface."""
    resource = {"prefect.resource.id": names.resource("release", str(report["release"])),
                "prefect.resource.name": f"{report['name']} version {report['release']}"}
    create_markdown_artifact(key=names.artifact(ARTIFACT), markdown=looking.drift_markdown(report),
                             description=looking.headline(report))
    emit_event("moa.drift", resource=resource, payload=looking.facts(report))
    for group in report["missing"]:
        emit_event("moa.domain.missing", resource=resource, payload={**group, "reason": looking.sentence(group)})
