"""One build, adaptation or retraining from a command line: under Prefect, or without a server."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flows.steps.runner import LocalRunner
from flows.steps.session import BuildOptions, Result, load_configuration, open_session
from flows.steps.stage_order import build as build_stages
from moa.core.config import load
from moa.core.errors import PipelineError
from moa.core.paths import Workspace
from moa.core.supervisor import stop_all
from moa.release import mlflow_client


def run(workspace: Workspace, options: BuildOptions, *, local: bool = False, verbose: bool = False) -> Result:
    """Build the workspace: every stale stage, then the release steps.

    Args:
        local: run the steps on threads, without Prefect.
        verbose: show what steps and Prefect print.

    Returns:
        How each stage ended; a failed one is in it and not raised, see `Result.failure`.

    Raises:
        ConfigError: params.yaml is wrong, or names no domain.
        PipelineError: the lock is held by another run, or Prefect's server cannot be used.
        KeyboardInterrupt: SIGINT or SIGTERM came; the steps have ended.
    """
    load_configuration(workspace)   # fail before a server is started
    with terminated_as_interrupted():
        if not local:
            return _under_prefect(workspace, options, verbose)
        with open_session(workspace, options, verbose=verbose) as session:
            return build_stages(session, LocalRunner(session.config.execution.workers))


def _under_prefect(workspace: Workspace, options: BuildOptions, verbose: bool) -> Result:
    from flows import prefect_server

    # The session takes a snapshot of the pipeline while the server starts.
    with (prefect_server.running(workspace, verbose=verbose) as prefect,
          open_session(workspace, options, verbose=verbose) as session):
        mlflow_client.load()   # importing MLflow, for the release, takes as long as the server needs to start
        prefect.ready()
        from prefect.task_runners import ThreadPoolTaskRunner

        from flows.build import build, close_abandoned

        if prefect.own:
            close_abandoned()
        workers = ThreadPoolTaskRunner(max_workers=session.config.execution.workers)
        domains = list(options.domains) if options.domains is not None else None
        try:
            build.with_options(task_runner=workers)(
                root=str(workspace.root), domains=domains, force=list(options.force), promote=options.promote)
        except PipelineError:
            if session.result is None or not session.result.named("failed"):
                raise
        assert session.result is not None
        return session.result


def learn(workspace: Workspace, flow_name: str, *, local: bool = False, verbose: bool = False,
          **options: Any) -> dict[str, Any]:
    """Run one adaptation or retraining.

    Args:
        flow_name: `adapt` or `retrain`.
        local: run it on threads, without Prefect.
        verbose: show what steps and Prefect print.
        options: of `flows.steps.learning.adapt` or `flows.steps.retraining.retrain`.

    Returns:
        The facts of that function.
    """
    from flows import prefect_server
    from flows.steps import learning, retraining

    workers = load(workspace.params).execution.workers
    with terminated_as_interrupted():
        if local:
            function: Any = learning.adapt if flow_name == "adapt" else retraining.retrain
            facts: dict[str, Any] = function(workspace, LocalRunner(workers), "a person", verbose=verbose, **options)
        else:
            with prefect_server.running(workspace, verbose=verbose) as prefect:
                prefect.ready()
                from flows import adapt

                facts = getattr(adapt, flow_name)(root=str(workspace.root), trigger="a person", **options)
    return facts


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Within the block SIGTERM raises KeyboardInterrupt, as Ctrl-C does; afterwards every step's process is stopped."""
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield   # only the main thread may set signal handlers
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        stop_all()
