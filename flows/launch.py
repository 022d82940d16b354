"""One build from a command line: under Prefect, or with no server at all. Knows signals, nothing of stages."""

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
    """Build. A failed stage is in the result, see `Result.failure`; KeyboardInterrupt when told to end."""
    load_configuration(workspace)   # before anything is started
    with terminated_as_interrupted():
        if not local:
            return _under_prefect(workspace, options, verbose)
        with open_session(workspace, options, verbose=verbose) as session:
            return build_stages(session, LocalRunner(session.config.execution.workers))


def _under_prefect(workspace: Workspace, options: BuildOptions, verbose: bool) -> Result:
    from flows import prefect_server

    # The session looks at the pipeline while the server starts.
    with (prefect_server.running(workspace, verbose=verbose) as prefect,
          open_session(workspace, options, verbose=verbose) as session):
        mlflow_client.load()   # the release needs it; Prefect's server takes as long to start
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


def learn(workspace: Workspace, what: str, *, local: bool = False, verbose: bool = False,
          **how: Any) -> dict[str, Any]:
    """One adaptation or retraining (`what`: adapt, retrain) from a command line; `how` goes to it."""
    from flows import prefect_server
    from flows.steps import learning, retraining

    workers = load(workspace.params).execution.workers
    with terminated_as_interrupted():
        if local:
            work: Any = learning.adapt if what == "adapt" else retraining.retrain
            found: dict[str, Any] = work(workspace, LocalRunner(workers), "a person", verbose=verbose, **how)
            return found
        with prefect_server.running(workspace, verbose=verbose) as prefect:
            prefect.ready()
            from flows import adapt

            done: dict[str, Any] = getattr(adapt, what)(root=str(workspace.root), trigger="a person", **how)
            return done


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, and neither leaves a step behind."""
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
