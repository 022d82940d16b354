"""`moa up`: everything that keeps a workspace current, in one process group that ends as one.

A Prefect server (the configured one, or our own), the served flows with their schedules and triggers, the sensor, and
if asked the pages of MLflow and `moa serve`. Nothing in here is needed for a result: it only asks for runs.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flows import prefect_server
from flows.keep_alive import CALM, PAUSES, CommandService, ServiceKeeper, State
from flows.launch import terminated_as_interrupted
from flows.sensor import Sensor, send_arrival_event
from flows.steps import event_log
from moa.core.config import load
from moa.core.errors import NothingReleased, PipelineError, in_words
from moa.core.files import write_private
from moa.core.paths import Workspace
from moa.core.supervisor import stop_all
from moa.release import mlflow_client

Say = Callable[[str], None]
MOST_ENDS = 5   # of the Prefect server in a row, before `moa up` ends: a service manager can start it afresh
WAITS = {NothingReleased.exit_code: "nothing has been released yet"}


def _print(line: str) -> None:
    print(line, flush=True)


@dataclass(frozen=True)
class ExtraServices:
    """What else is started."""

    mlflow: int | None = None   # port of MLflow's pages; 0 = a free one, None = none
    serve: int | None = None    # port of `moa serve`; 0 = a free one, None = none
    ui: bool = True             # Prefect's pages


def up(workspace: Workspace, also: ExtraServices, say: Say = _print, *, verbose: bool = False) -> None:
    """Keep the workspace current until Ctrl-C or SIGTERM.

    Raises PipelineError when it already is, and when the Prefect server ends again and again.
    """
    config = load(workspace.params)
    os.environ["PREFECT_RUNNER_POLL_FREQUENCY"] = os.environ.get("PREFECT_RUNNER_POLL_FREQUENCY", "2")
    with _alone(workspace), contextlib.ExitStack() as stack:
        prefect = stack.enter_context(prefect_server.running(workspace, verbose=verbose, ui=also.ui))
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
        facts = {"pid": os.getpid(), "api": prefect.ready(), "since": _now()}
        if prefect.own:
            from flows.build import close_abandoned

            close_abandoned()
        say(f"Prefect   {prefect.url.removesuffix('/api')}   {stack.enter_context(_password(workspace, prefect))}")
        hopeless: list[str] = []   # why nothing here can go on

        def give_up(why: str) -> None:
            hopeless.append(why)
            os.kill(os.getpid(), signal.SIGTERM)

        keeper = ServiceKeeper(workspace.up, facts, say, give_up)
        stack.callback(keeper.stop)
        keeper.keep(_Prefect(prefect), most=MOST_ENDS)
        for name, port, command, extra in _others(workspace, also):
            keeper.keep(CommandService(workspace, name, command, port, extra, WAITS))
            facts[name] = f"http://127.0.0.1:{port}"
            say(f"{name:<9} {facts[name]}")
        keeper.keep(_Watch(Sensor(workspace, lambda names: send_arrival_event(workspace, names, prefect.api))))
        event_log.append(workspace, "up", pid=os.getpid(), url=prefect.url)
        stack.callback(event_log.append, workspace, "down", pid=os.getpid())
        keeper.start()
        say(f"Watching  {workspace.relative(workspace.incoming)}/NAME/   "
            f"(retraining: {config.retrain.cron or 'by hand'}; drift: {config.drift.cron or 'by hand'})")
        say("Ctrl-C ends everything.")
        with contextlib.suppress(KeyboardInterrupt):
            _serve(workspace, config, prefect, keeper)
        stop_all()
        if hopeless:
            raise PipelineError(f"`moa up` gave up: {hopeless[0]} What waits in data/incoming stays there.")


@contextlib.contextmanager
def _password(workspace: Workspace, prefect: prefect_server.Server) -> Iterator[str]:
    """Keep our own server's password where the owner and `moa ingest` find it; yields what is said of it.

    Only the file's name is printed: what `moa up` prints may end in a log that other users can read.
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


def _serve(workspace: Workspace, config: Any, prefect: prefect_server.Server, keeper: ServiceKeeper) -> None:
    """Serve the flows until a signal. Prefect ends the runs that are under way, and their steps end with them.

    Prefect's runner ends by itself when its server does not answer for some seconds: it begins again when it does.
    """
    from prefect import serve

    from flows.deployments import delete_former, deployments

    delete_former(workspace, config)
    warnings.filterwarnings("ignore", message="coroutine 'Runner.astop' was never awaited")   # its way of stopping
    ends = 0
    while True:
        began = time.monotonic()
        keeper.tell("flows", "up", restarted=ends > 0)
        try:
            with terminated_as_interrupted():   # until Prefect has a handler of its own
                serve(*deployments(workspace, config), print_starting_message=False, pause_on_shutdown=False)
            return
        except SystemExit:   # Prefect's answer to SIGTERM
            return
        except Exception as error:   # of Prefect, of its HTTP client, or a group of these
            ends = 1 if time.monotonic() - began > CALM else ends + 1
            pause = min(PAUSES[0] * 2 ** (ends - 1), PAUSES[1])
            keeper.tell("flows", "down", f"no longer served ({in_words(error)}); again when Prefect answers")
        with terminated_as_interrupted():
            time.sleep(pause)
            while not prefect.api.answers():
                time.sleep(1.0)


class _Prefect:
    """The Prefect server as a part: our own is started again, another's is only looked at."""

    name = "prefect"

    def __init__(self, prefect: prefect_server.Server) -> None:
        self.prefect = prefect
        self._answered = True   # it was ready before

    def state(self) -> State:
        if self.prefect.ended:
            return State("ended", "ended (its output: .moa/logs/prefect-server.log)")
        if self.prefect.api.answers():
            self._answered = True
            return State("up")
        return State("down", "does not answer") if self._answered else State("starting")

    def start(self) -> None:
        self._answered = False
        self.prefect.restart()

    def stop(self) -> None:
        """`server.running` ends it, when the last lines of its history have arrived."""


class _Watch:
    """The sensor as a part, in a thread."""

    name = "sensor"

    def __init__(self, sensor: Sensor) -> None:
        self.sensor = sensor
        self.start()

    def state(self) -> State:
        if not self._thread.is_alive():
            return State("ended", "its thread ended")
        if self.sensor.trouble is not None:
            return State("down", self.sensor.trouble)
        return State("up" if self.sensor.looked else "starting")

    def start(self) -> None:
        self._thread = threading.Thread(target=self.sensor.run, name="moa-sensor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.sensor.stop()
        self._thread.join(10)


def _others(workspace: Workspace, also: ExtraServices) -> Iterator[tuple[str, int, list[str], dict[str, str]]]:
    """Name, port, command and environment of what else is asked for."""
    if also.mlflow is not None:
        port = also.mlflow or prefect_server.free_port()
        if found := mlflow_client.pages(workspace, port):
            yield "mlflow", port, *found
    if also.serve is not None:
        port = also.serve or prefect_server.free_port()
        yield "serve", port, [sys.executable, "-P", "-m", "moa", "serve", "--port", str(port)], {}


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
