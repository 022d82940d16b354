"""The build as a Prefect flow: each stage is a task. `flows.steps.stage_order` has the order.

Prefect's task cache stays off: DVC alone knows which stages are fresh, and these end in a state named `Cached`.
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Cancelled, Completed, Crashed

from flows import artifacts
from flows.steps import event_log
from flows.steps.runner import Call, Outcome, run_call
from flows.steps.session import BuildOptions, open_session
from flows.steps.stage_order import build as build_stages
from moa.core.config import load
from moa.core.errors import PipelineError
from moa.core.paths import Workspace
from moa.core.supervisor import end_with_parent, stop_all

if "PREFECT__FLOW_RUN_ID" in os.environ:   # Prefect's runner started this process for one flow run
    end_with_parent()                      # a runner that is killed cannot end its flow runs itself


class PrefectRunner:
    """Runs each call as a task run of the current flow run."""

    def __init__(self, workers: int = 1_000_000) -> None:
        """`workers` bounds how many calls run side by side; by default the flow's own task runner does."""
        self.interrupted = threading.Event()
        self.slots = threading.BoundedSemaphore(workers)

    def run_all(self, calls: Sequence[Call]) -> list[Outcome]:
        """Run every call as a task, even when others fail; their outcomes in the order of `calls`."""
        outcomes: dict[str, Outcome] = {}

        def body(call: Call) -> Any:
            with self.slots:
                outcome = outcomes[call.name] = run_call(call, self.interrupted)
            if outcome.error is not None:
                raise outcome.error
            if outcome.state == "cached":
                return Completed(name="Cached", message="fresh, says DVC")
            if outcome.state == "skipped":
                return Cancelled(name="Skipped", message="a stage above it failed")
            return Completed()

        try:
            futures = [task(body, name=call.name, task_run_name=call.name, cache_policy=NO_CACHE,
                            persist_result=False).submit(call) for call in calls]
            for future in futures:
                future.wait()
        except BaseException:   # Ctrl-C or SIGTERM: end the steps, or the process would wait for their threads
            self.interrupted.set()
            stop_all()
            raise
        return [outcomes.get(call.name) or Outcome(call.name, "failed", error=PipelineError(
            f"{call.name} did not run: Prefect says {future.state.name}.")) for call, future in
            zip(calls, futures, strict=True)]


def close_abandoned() -> None:
    """Set every flow run that is running or pending on the server to `Crashed`: a killed process left it so.

    Only for a server of this workspace alone, and while no other process holds the workspace's lock: then no other flow
    run can be at work.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType

    running = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(
        any_=[StateType.RUNNING, StateType.PENDING])))
    with get_client(sync_client=True) as client:
        for flow_run in client.read_flow_runs(flow_run_filter=running):
            client.set_flow_run_state(flow_run.id, Crashed(message="its process was killed"), force=True)


@flow(name="build", persist_result=False, validate_parameters=False)
def build(root: str = ".", domains: list[str] | None = None, force: list[str] | None = None,
          promote: bool = True, recalibrate: bool = False) -> dict[str, Any]:
    """Bring every stage of the workspace at `root` up to date, then register the mixture, ask the gate and promote.

    Args:
        domains: only these domains' own stages; None = all.
        force: stages or steps to run although they are fresh.
        promote: whether a release that passes the gate becomes champion.
        recalibrate: whether the router is made anew, and not as the champion's successor.

    Returns:
        `Result.as_dict`: stages by how they ended, and the release.

    Raises:
        PipelineError: a stage or a release step failed; the others have ended.
    """
    options = BuildOptions(tuple(domains) if domains is not None else None, tuple(force or ()), promote, recalibrate)
    with open_session(Workspace.find(Path(root)), options) as session:
        result = build_stages(session, PrefectRunner())
        artifacts.store_build(session, result)
    if failure := result.failure():
        raise failure
    return result.as_dict()


def flow_context(root: str) -> tuple[Workspace, PrefectRunner, int]:
    """The workspace at `root`, a Prefect runner for its flow, and how many entries its event log has."""
    workspace = Workspace.find(Path(root))
    return workspace, PrefectRunner(load(workspace.params).execution.workers), len(event_log.read(workspace))
