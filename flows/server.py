"""The Prefect server of a run: the one that is there, or one of our own for as long as we need it.

Must be asked before the first `import prefect`, which reads its settings once. Our own server keeps its history in
the workspace, listens on the loopback interface only, and ends with us, whatever ends us.
"""

import base64
import importlib
import os
import socket
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moa.commands import QUIET, environment
from moa.errors import PipelineError
from moa.leash import Leash
from moa.workspace import Workspace

START_SECONDS = 120.0
SETTLE_SECONDS = 5.0


class Server:
    """Where Prefect is, once `ready` has returned."""

    def __init__(self, url: str, begin: Callable[[], Leash] | None = None, log: Path | None = None) -> None:
        """`begin` starts one of our own; None = somebody else's."""
        self.url = url
        self._begin, self._log = begin, log
        self._leash = begin() if begin is not None else None

    @property
    def own(self) -> bool:
        return self._leash is not None

    def ready(self) -> str:
        """Wait until the server answers and make it the one that `prefect` will use; its URL."""
        os.environ["PREFECT_API_URL"] = self.url
        deadline = time.monotonic() + START_SECONDS
        importlib.import_module("prefect.flows")   # a second of work for us, while the server is at its own
        while self._leash is not None and not answers(self.url):
            if self._leash.ended or time.monotonic() > deadline:
                raise PipelineError(f"The Prefect server did not start (its output: {self._log}); "
                                    "`moa run --local` does the same work without one.")
            time.sleep(0.1)
        return self.url

    @property
    def ended(self) -> bool:
        """Whether it was ours and ended by itself."""
        return self._leash is not None and self._leash.ended

    def restart(self) -> None:
        """Start our own again, with its history, at the same address."""
        assert self._begin is not None, "only our own server can be started again"
        self.stop()   # what the server started may be left, and hold the port
        self._leash = self._begin()

    def settle(self) -> None:
        """Let the last task states and log lines arrive: they are sent in the background."""
        if "prefect" in sys.modules:
            from prefect.events.worker import EventsWorker
            from prefect.logging.handlers import APILogWorker

            for worker in (EventsWorker, APILogWorker):
                with suppress(Exception):   # history may lack a line; the build itself is done
                    worker.drain_all(timeout=SETTLE_SECONDS, at_exit=False)

    def stop(self) -> None:
        if self._leash is not None:
            self._leash.stop()


def headers() -> dict[str, str]:
    """What an API with a key, or behind a password, asks for."""
    if key := os.environ.get("PREFECT_API_KEY"):
        return {"Authorization": f"Bearer {key}"}
    if words := os.environ.get("PREFECT_API_AUTH_STRING"):
        return {"Authorization": f"Basic {base64.b64encode(words.encode()).decode()}"}
    return {}


def answers(url: str) -> bool:
    """Whether a Prefect API at `url` is healthy."""
    request = urllib.request.Request(f"{url.rstrip('/')}/health", headers=headers())   # noqa: S310 - own setting, or ours
    with suppress(OSError, ValueError), urllib.request.urlopen(request, timeout=3) as reply:   # noqa: S310
        return bool(reply.status == 200)
    return False


def configured() -> str | None:
    """The API that the environment or the active Prefect profile names, read without importing Prefect."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    path = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser() / "profiles.toml"
    with suppress(OSError, tomllib.TOMLDecodeError, AttributeError):
        profiles = tomllib.loads(path.read_text(encoding="utf-8"))
        active = os.environ.get("PREFECT_PROFILE") or profiles.get("active")
        return profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")
    return None


@contextmanager
def running(workspace: Workspace, *, verbose: bool = False, ui: bool = False) -> Iterator[Server]:
    """A server for the block. It may still be starting: do other work first, then call `ready`.

    One of our own has pages for people if `ui`.
    """
    os.environ.update(QUIET)
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    if not verbose:   # stages tell their own story; Prefect's is in its history
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    url = configured()
    if url and answers(url):
        yield Server(url)
        return
    before = os.environ.get("PREFECT_API_URL")
    server = _start(workspace, ui)
    try:
        yield server
    finally:
        server.settle()
        server.stop()
        if before is None:
            os.environ.pop("PREFECT_API_URL", None)
        else:
            os.environ["PREFECT_API_URL"] = before


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(workspace: Workspace, ui: bool) -> Server:
    workspace.prefect.mkdir(parents=True, exist_ok=True)
    os.environ["PREFECT_HOME"] = str(workspace.prefect)
    port = free_port()
    log = workspace.logs / "prefect-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    env = environment({"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "NOTSET"})
    env.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "prefect", "server", "start", "--ui" if ui else "--no-ui", "--host", "127.0.0.1",
               "--port", str(port)]
    log.unlink(missing_ok=True)

    def begin() -> Leash:
        with log.open("a", encoding="utf-8") as file:
            return Leash(command, cwd=workspace.root, env=env, stdout=file, step=False)

    return Server(f"http://127.0.0.1:{port}/api", begin, log)
