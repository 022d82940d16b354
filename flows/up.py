"""`moa up`: everything that keeps a workspace current, in one process group that ends as one.

A Prefect server (the configured one, or our own), the served flows with their schedules and triggers, the sensor, and
if asked the pages of MLflow and `moa serve`. Nothing in here is needed for a result: it only asks for runs.
"""

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flows import server
from flows.sensor import Sensor, nudge
from moa import ledger, tracking
from moa.commands import environment
from moa.config import load
from moa.errors import PipelineError
from moa.leash import Leash, stop_all
from moa.workspace import Workspace, write_json, write_private

Say = Callable[[str], None]


def _print(line: str) -> None:
    print(line, flush=True)


@dataclass(frozen=True)
class Also:
    """What else is started."""

    mlflow: int | None = None   # port of MLflow's pages; 0 = a free one, None = none
    serve: int | None = None    # port of `moa serve`; 0 = a free one, None = none
    ui: bool = True             # Prefect's pages


def up(workspace: Workspace, also: Also, say: Say = _print, *, verbose: bool = False) -> None:
    """Keep the workspace current until Ctrl-C or SIGTERM. Raises PipelineError when it already is."""
    config = load(workspace.params)
    os.environ["PREFECT_RUNNER_POLL_FREQUENCY"] = os.environ.get("PREFECT_RUNNER_POLL_FREQUENCY", "2")
    with _alone(workspace), contextlib.ExitStack() as stack:
        prefect = stack.enter_context(server.running(workspace, verbose=verbose, ui=also.ui))
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
        facts = {"pid": os.getpid(), "api": prefect.ready(), "since": _now()}
        if prefect.own:
            from flows.build import close_abandoned

            close_abandoned()
        say(f"Prefect   {prefect.url.removesuffix('/api')}   {stack.enter_context(_password(workspace, prefect))}")
        for name, port, command, extra in _others(workspace, also):
            stack.callback(Kept(workspace, name, command, extra).stop)
            facts[name] = f"http://127.0.0.1:{port}"
            say(f"{name:<9} {facts[name]}")
        write_json(workspace.up, facts)
        stack.callback(workspace.up.unlink, missing_ok=True)
        ledger.append(workspace, "up", pid=os.getpid(), url=prefect.url)
        stack.callback(ledger.append, workspace, "down", pid=os.getpid())
        sensor = Sensor(workspace, lambda names: nudge(workspace, names, prefect.api))
        thread = threading.Thread(target=sensor.run, name="moa-sensor", daemon=True)
        stack.callback(thread.join, 10)
        stack.callback(sensor.stop)
        thread.start()
        say(f"Watching  {workspace.relative(workspace.incoming)}/NAME/   "
            f"(retraining: {config.retrain.cron or 'by hand'}; drift: {config.drift.cron or 'by hand'})")
        say("Ctrl-C ends everything.")
        _serve(workspace, config)


@contextlib.contextmanager
def _password(workspace: Workspace, prefect: server.Server) -> Iterator[str]:
    """Keep our own server's password where the owner and `moa ingest` find it; yields what is said of it.

    Only the file's name is printed: what `moa up` prints may end in a log that other people read.
    """
    path = workspace.prefect_password
    if prefect.own and prefect.api.password:
        write_private(path, f"{prefect.api.password}\n")
        said = f"(password: in {workspace.relative(path)})"
    else:
        path.unlink(missing_ok=True)   # of a `moa up` that was killed
        said = "(already running)"
    try:
        yield said
    finally:
        path.unlink(missing_ok=True)


def _serve(workspace: Workspace, config: Any) -> None:
    """Serve the flows until a signal. Prefect ends the runs that are under way, and their steps end with them."""
    from prefect import serve

    from flows.deployments import delete_former, deployments

    delete_former(workspace, config)
    warnings.filterwarnings("ignore", message="coroutine 'Runner.astop' was never awaited")   # its way of stopping
    with contextlib.suppress(KeyboardInterrupt):
        serve(*deployments(workspace, config), print_starting_message=False, pause_on_shutdown=False)
    stop_all()


def _others(workspace: Workspace, also: Also) -> Iterator[tuple[str, int, list[str], dict[str, str]]]:
    """Name, port, command and environment of what else is asked for."""
    if also.mlflow is not None:
        port = also.mlflow or server.free_port()
        if found := tracking.pages(workspace, port):
            yield "mlflow", port, *found
    if also.serve is not None:
        port = also.serve or server.free_port()
        yield "serve", port, [sys.executable, "-m", "moa", "serve", "--port", str(port)], {}


class Kept:
    """A command that is started again when it ends, until `stop`: `moa serve` before there is a champion, for one."""

    PAUSE = 10.0   # seconds before it is started again

    def __init__(self, workspace: Workspace, name: str, command: Sequence[str], extra: dict[str, str]) -> None:
        self.workspace, self.command, self.extra = workspace, command, extra
        self.log = workspace.logs / f"up-{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._ended = threading.Event()
        self._leash = self._start()
        self._thread = threading.Thread(target=self._keep, name=f"moa-{name}", daemon=True)
        self._thread.start()

    def _start(self) -> Leash:
        with self.log.open("a", encoding="utf-8") as file:
            return Leash(self.command, cwd=self.workspace.root, env=environment(self.extra), stdout=file, step=False)

    def _keep(self) -> None:
        while not self._ended.wait(1.0):
            if self._leash.ended and not self._ended.wait(self.PAUSE):
                self._leash = self._start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        self._leash.stop()


@contextlib.contextmanager
def _alone(workspace: Workspace) -> Iterator[None]:
    from filelock import FileLock, Timeout

    path = workspace.local / "up.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout:
        raise PipelineError("`moa up` runs here already: see `moa status`.") from None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
