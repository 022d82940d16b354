"""The Prefect server of a run: the one that is there, or one of our own for as long as we need it.

Must be asked before the first `import prefect`, which reads its settings once. Our own server keeps its history in
the workspace, listens on the loopback interface only, answers only clients that know its secret, and ends with us,
whatever ends us.
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

from flows.prefect_api import Api, configured_api
from flows.prefect_settings import setting
from moa.core.errors import PipelineError
from moa.core.loopback import bypass_proxies
from moa.core.paths import Workspace
from moa.core.subprocesses import QUIET, environment
from moa.core.supervisor import SupervisedProcess

START_SECONDS = 1200.0   # for one that neither answers nor ends; one that ends is noticed at once
SETTLE_SECONDS = 5.0
CLIENT = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY", "PREFECT_HOME")   # set while one is used


class Server:
    """Where Prefect is, once `ready` has returned."""

    def __init__(self, api: Api, begin: Callable[[], SupervisedProcess] | None = None, log: Path | None = None) -> None:
        """`begin` starts a server of our own; None = the server at `api` is not ours to start or stop."""
        self.api = api
        self._begin, self._log = begin, log
        self._process = begin() if begin is not None else None

    @property
    def own(self) -> bool:
        return self._process is not None

    @property
    def url(self) -> str:
        return self.api.url

    def ready(self) -> str:
        """Wait until the server answers and make it the one that `prefect` will use, here and in children; its URL.

        Raises PipelineError when it does not start.
        """
        os.environ.update(self.api.environment())
        deadline = time.monotonic() + START_SECONDS
        importlib.import_module("prefect.flows")   # a second of work for us, while the server is at its own
        while self._process is not None and not self.api.answers():
            if self._process.ended or time.monotonic() > deadline:
                raise PipelineError(f"The Prefect server did not start (its output: {self._log}); "
                                    "`moa run --local` does the same work without one.")
            time.sleep(0.1)
        return self.url

    @property
    def ended(self) -> bool:
        """Whether it was ours and ended by itself."""
        return self._process is not None and self._process.ended

    def restart(self) -> None:
        """Start our own again, with its history, at the same address."""
        assert self._begin is not None, "only our own server can be started again"
        self.stop()   # what the server started may be left, and hold the port
        self._process = self._begin()

    def settle(self) -> None:
        """Let the last task states and log lines arrive: they are sent in the background."""
        if "prefect" in sys.modules:
            from prefect.events.worker import EventsWorker
            from prefect.logging.handlers import APILogWorker

            for worker in (EventsWorker, APILogWorker):
                with suppress(Exception):   # history may lack a line; the build itself is done
                    worker.drain_all(timeout=SETTLE_SECONDS, at_exit=False)

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()


@contextmanager
def running(workspace: Workspace, *, verbose: bool = False, ui: bool = False) -> Iterator[Server]:
    """A server for the block. It may still be starting: do other work first, then call `ready`.

    One of our own has pages if `ui`. Raises PipelineError when the configured one refuses the user's
    password or key.
    """
    os.environ.update(QUIET)
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    if not verbose:   # stages tell their own story; Prefect's is in its history
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    bypass_proxies()
    found = configured_api()
    with _restored(CLIENT):
        if found and found.answers():
            if found.refuses():
                raise PipelineError(f"The Prefect server at {found.url} asks for a password or key, and there is none, "
                                    "or a wrong one: set PREFECT_API_AUTH_STRING (or PREFECT_API_KEY), or unset "
                                    "PREFECT_API_URL to let moa start a server of its own.")
            yield Server(found)
            return
        server = _start(workspace, ui)
        try:
            yield server
        finally:
            server.settle()
            server.stop()


@contextmanager
def _restored(names: Sequence[str]) -> Iterator[None]:
    """Put these variables of the environment back at the end."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(workspace: Workspace, ui: bool) -> Server:
    # The user may choose the secret; else there is a new one for each start. It travels in environments, which other
    # users of the machine cannot read, never on a command line.
    password = setting("PREFECT_SERVER_API_AUTH_STRING") or f"moa:{secrets.token_urlsafe(32)}"
    workspace.prefect.mkdir(parents=True, exist_ok=True)
    os.environ["PREFECT_HOME"] = str(workspace.prefect)
    port = free_port()
    api = Api(f"http://127.0.0.1:{port}/api", password)
    log = workspace.logs / "prefect-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # All that decides who reaches the API and where: a `.env` or a prefect.toml may say it for some other server.
    env = environment({
        **api.environment(), "PREFECT_SERVER_API_AUTH_STRING": password, "PREFECT_SERVER_API_BASE_PATH": "/api",
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port}",
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "false",   # its token is what the secret is
        "PREFECT_SERVER_UI_ENABLED": str(ui), "PREFECT_SERVER_UI_API_URL": "/api", "PREFECT_SERVER_UI_SERVE_BASE": "/",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "NOTSET"})
    command = [sys.executable, "-P", "-m", "flows.prefect_app", str(port)]
    log.unlink(missing_ok=True)

    def begin() -> SupervisedProcess:
        with log.open("a", encoding="utf-8") as file:
            return SupervisedProcess(command, cwd=workspace.root, env=env, stdout=file, step=False)

    return Server(api, begin, log)
