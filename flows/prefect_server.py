"""The Prefect server of a run: the configured one if it answers, else one of moa's own for as long as the run.

`running` must be entered before the first `import prefect`, which reads its settings once. moa's own server keeps its
history in the workspace, listens on loopback only, answers only clients that know its password, and ends with this
process, whatever ends that. No other module uses the server's code, or private parts of Prefect.
"""

import importlib
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flows.prefect_api import Api, configured_api, refusal
from flows.prefect_settings import setting
from moa.core.errors import PipelineError
from moa.core.loopback import bypass_proxies
from moa.core.paths import Workspace
from moa.core.progress import notice, stamped
from moa.core.subprocesses import QUIET, environment
from moa.core.supervisor import SupervisedProcess

START_SECONDS = 1200.0   # for a server that neither answers nor ends; an end is noticed at once
SETTLE_SECONDS = 5.0     # for the last events and log lines to reach the server
CLIENT = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY", "PREFECT_HOME")   # set within `running`


class Server:
    """A Prefect server: the configured one, or moa's own in a child process. It answers once `ready` has returned."""

    def __init__(self, api: Api, begin: Callable[[], SupervisedProcess] | None = None, log: Path | None = None) -> None:
        """`begin` starts moa's own server, whose output is in `log`; None = the server at `api` is not moa's own."""
        self.api = api
        self._begin, self._log = begin, log
        self._process = begin() if begin is not None else None

    @property
    def own(self) -> bool:
        """Whether this is moa's own server, which ends with this process."""
        return self._process is not None

    @property
    def url(self) -> str:
        """The URL of the API, which ends with `/api`."""
        return self.api.url

    def ready(self) -> str:
        """Wait until the server answers; its URL. From now on `prefect` uses it, in this process and its children.

        Raises PipelineError when the server does not start.
        """
        os.environ.update(self.api.environment())
        deadline = time.monotonic() + START_SECONDS
        importlib.import_module("prefect.flows")   # takes a second, in which the server can start
        while self._process is not None and not self.api.answers():
            if self._process.ended or time.monotonic() > deadline:
                raise PipelineError(f"The Prefect server did not start (its output: {self._log}); "
                                    "`moa run --local` does the same work without one.")
            time.sleep(0.1)
        return self.url

    @property
    def ended(self) -> bool:
        """Whether this is moa's own server and its process has ended."""
        return self._process is not None and self._process.ended

    def restart(self) -> None:
        """Start moa's own server again, with its history, at the same address."""
        assert self._begin is not None, "only moa's own server can be started again"
        self.stop()   # a process that the server started may be left, and hold the port
        self._process = self._begin()

    def settle(self) -> None:
        """Wait until the last events and log lines have reached the server: Prefect sends them in the background."""
        if "prefect" in sys.modules:
            from prefect.events.worker import EventsWorker
            from prefect.logging.handlers import APILogWorker

            for worker in (EventsWorker, APILogWorker):
                with suppress(Exception):   # Prefect's history may lack a line; the build has ended
                    worker.drain_all(timeout=SETTLE_SECONDS, at_exit=False)

    def stop(self) -> None:
        """End moa's own server; another one goes on."""
        if self._process is not None:
            self._process.stop()


@contextmanager
def running(workspace: Workspace, *, verbose: bool = False, ui: bool = False) -> Iterator[Server]:
    """A Prefect server for the block. It may still be starting: do other work first, then call `ready`.

    Args:
        verbose: let Prefect print its log lines.
        ui: moa's own server also serves Prefect's pages.

    Raises:
        PipelineError: the configured server refuses the user's password or key.
    """
    os.environ.update(QUIET)
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    if not verbose:   # moa prints what its stages do; Prefect's log lines are in its history
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    bypass_proxies()
    configured = configured_api()
    with _restored(CLIENT):
        if configured and configured.answers():
            if configured.refuses():
                raise PipelineError(refusal(configured))
            yield Server(configured)
            return
        server = _start(workspace, ui)
        try:
            yield server
        finally:
            server.settle()
            server.stop()


@contextmanager
def _restored(names: Sequence[str]) -> Iterator[None]:
    """Restore these environment variables after the block."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def application() -> tuple[Any, Any]:
    """Prefect's server as an ASGI application, and its settings: for a process of its own."""
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    return create_app(final=True), get_current_settings().server


def free_port() -> int:
    """A TCP port of loopback that is free now; another process may take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(workspace: Workspace, ui: bool) -> Server:
    # The user may choose the password; else each start has a new one. It is handed on in environment variables, which
    # other users of the machine cannot read, never on a command line.
    password = setting("PREFECT_SERVER_API_AUTH_STRING") or f"moa:{secrets.token_urlsafe(32)}"
    if not (workspace.prefect / "prefect.db").exists():
        notice(stamped("Prefect's server makes this workspace's database, which takes up to a minute, once."))
    workspace.prefect.mkdir(parents=True, exist_ok=True)
    os.environ["PREFECT_HOME"] = str(workspace.prefect)
    port = free_port()
    api = Api(f"http://127.0.0.1:{port}/api", password)
    log = workspace.logs / "prefect-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # Every setting that decides who can reach the API: a `.env` or prefect.toml here may be meant for another server.
    env = environment({
        **api.environment(), "PREFECT_SERVER_API_AUTH_STRING": password, "PREFECT_SERVER_API_BASE_PATH": "/api",
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port}",
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "false",   # the password does what its token would do
        "PREFECT_SERVER_UI_ENABLED": str(ui), "PREFECT_SERVER_UI_API_URL": "/api", "PREFECT_SERVER_UI_SERVE_BASE": "/",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "NOTSET"})
    command = [sys.executable, "-P", "-m", "flows.prefect_app", str(port)]
    log.unlink(missing_ok=True)

    def begin() -> SupervisedProcess:
        with log.open("a", encoding="utf-8") as file:
            return SupervisedProcess(command, cwd=workspace.root, env=env, stdout=file, step=False)

    return Server(api, begin, log)
