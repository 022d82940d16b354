"""`moa up`: the services that keep a workspace current, in one process group that ends as a whole.

They are a Prefect server (the configured one, or moa's own), the flows with their schedules and triggers, the sensor,
and on request MLflow's pages and `moa serve`. They only start runs, which give the same results without them.
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
from moa.core.progress import STAMP_LINES
from moa.core.supervisor import stop_all
from moa.release import mlflow_client
from moa.workspace.lock import LockHolder

Say = Callable[[str], None]
MOST_ENDS = 5   # ends of the Prefect server in a row; after one more `moa up` ends, for a service manager to restart
WAITS = {NothingReleased.exit_code: "nothing has been released yet"}   # exit codes of `moa serve`


def _print(line: str) -> None:
    print(line, flush=True)


@dataclass(frozen=True)
class ExtraServices:
    """Services that `moa up` starts on request."""

    mlflow: int | None = None   # port of MLflow's pages; 0 = a free one, None = none
    serve: int | None = None    # port of `moa serve`; 0 = a free one, None = none
    ui: bool = True             # Prefect's pages


def up(workspace: Workspace, extra: ExtraServices, say: Say = _print, *, verbose: bool = False) -> None:
    """Run the services that keep the workspace current, until Ctrl-C or SIGTERM.

    Args:
        say: gets each line for the user.
        verbose: let Prefect print its log lines.

    Raises:
        PipelineError: `moa up` runs here already, or the Prefect server did not start, or ended again and again.
    """
    config = load(workspace.params)
    os.environ[STAMP_LINES] = "1"   # flow processes inherit it, and their lines appear among those of `moa up`
    os.environ["PREFECT_RUNNER_POLL_FREQUENCY"] = os.environ.get("PREFECT_RUNNER_POLL_FREQUENCY", "2")
    with _locked(workspace), contextlib.ExitStack() as stack:
        prefect = stack.enter_context(prefect_server.running(workspace, verbose=verbose, ui=extra.ui))
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
        facts = {"pid": os.getpid(), "api": prefect.ready(), "since": _now()}
        # A run at work may have a server of its own on the same database; its flow runs are not abandoned.
        if prefect.own and not LockHolder.of(workspace).at_work():
            from flows.build import close_abandoned

            close_abandoned()
        note = stack.enter_context(_stored_password(workspace, prefect))
        say(f"Prefect   {prefect.url.removesuffix('/api')}   {note}")
        failures: list[str] = []   # why `moa up` cannot go on

        def give_up(why: str) -> None:
            failures.append(why)
            os.kill(os.getpid(), signal.SIGTERM)

        keeper = ServiceKeeper(workspace.up, facts, say, give_up)
        stack.callback(keeper.stop)
        keeper.keep(_PrefectService(prefect), most=MOST_ENDS)
        for name, port, command, env in _extra_commands(workspace, extra):
            keeper.keep(CommandService(workspace, name, command, port, env, WAITS))
            facts[name] = f"http://127.0.0.1:{port}"
            say(f"{name:<9} {facts[name]}")
        keeper.keep(_SensorService(Sensor(workspace, lambda names: send_arrival_event(workspace, names, prefect.api))))
        event_log.append(workspace, "up", pid=os.getpid(), url=prefect.url)
        stack.callback(event_log.append, workspace, "down", pid=os.getpid())
        keeper.start()
        say(f"Watching  {workspace.relative(workspace.incoming)}/NAME/   "
            f"(retraining: {config.retrain.cron or 'by hand'}; drift: {config.drift.cron or 'by hand'})")
        say("Ctrl-C ends everything.")
        with contextlib.suppress(KeyboardInterrupt):
            _serve(workspace, config, prefect, keeper)
        stop_all()
        if failures:
            raise PipelineError(f"`moa up` gave up: {failures[0]} What waits in data/incoming stays there.")


@contextlib.contextmanager
def _stored_password(workspace: Workspace, prefect: prefect_server.Server) -> Iterator[str]:
    """Write the password of moa's own server to a file for its owner and `moa ingest`; yields a note for the user.

    The note names only the file: what `moa up` prints may end in a log that other users can read.
    """
    path = workspace.prefect_password
    if prefect.own and prefect.api.password:
        write_private(path, f"{prefect.api.password}\n")
        note = f"(password: in {workspace.relative(path)})"
    else:
        path.unlink(missing_ok=True)   # a `moa up` that was killed may have left it
        note = "(already running)"
    try:
        yield note
    finally:
        path.unlink(missing_ok=True)


def _serve(workspace: Workspace, config: Any, prefect: prefect_server.Server, keeper: ServiceKeeper) -> None:
    """Serve the flows until a signal, on which Prefect ends the runs under way, and their steps with them.

    Prefect's runner ends by itself when the server does not answer for some seconds; it is started again as soon as the
    server answers.
    """
    from prefect import serve

    from flows.deployments import delete_former, deployments

    delete_former(workspace, config)
    warnings.filterwarnings("ignore", message="coroutine 'Runner.astop' was never awaited")   # harmless, as it stops
    ends = 0
    while True:
        began = time.monotonic()
        keeper.tell("flows", "up", restarted=ends > 0)
        try:
            with terminated_as_interrupted():   # until Prefect has set its own signal handler
                serve(*deployments(workspace, config), print_starting_message=False, pause_on_shutdown=False)
            return
        except SystemExit:   # Prefect's answer to SIGTERM
            return
        except Exception as error:   # Prefect's, its HTTP client's, or an exception group of these
            ends = 1 if time.monotonic() - began > CALM else ends + 1
            pause = min(PAUSES[0] * 2 ** (ends - 1), PAUSES[1])
            keeper.tell("flows", "down", f"no longer served ({in_words(error)}); again when Prefect answers")
        with terminated_as_interrupted():
            time.sleep(pause)
            while not prefect.api.answers():
                time.sleep(1.0)


class _PrefectService:
    """The Prefect server as a service: moa's own is started again, the configured one is only watched."""

    name = "prefect"

    def __init__(self, prefect: prefect_server.Server) -> None:
        self.prefect = prefect
        self._answered = True   # `Server.ready` has returned before

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
        """Nothing: `prefect_server.running` ends the server, after the last events have reached it."""


class _SensorService:
    """The sensor as a service, in a thread."""

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


def _extra_commands(workspace: Workspace, extra: ExtraServices
                    ) -> Iterator[tuple[str, int, list[str], dict[str, str]]]:
    """Name, port, command and environment of each extra service that is asked for."""
    if extra.mlflow is not None:
        port = extra.mlflow or prefect_server.free_port()
        if pages := mlflow_client.pages(workspace, port):
            yield "mlflow", port, *pages
    if extra.serve is not None:
        port = extra.serve or prefect_server.free_port()
        yield "serve", port, [sys.executable, "-P", "-m", "moa", "serve", "--port", str(port)], {}


@contextlib.contextmanager
def _locked(workspace: Workspace) -> Iterator[None]:
    """Hold the lock of `moa up`. Raises PipelineError when another one holds it."""
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
