"""Keeps the services of `moa up` running, and records the state of each.

A service that ends is started again, after a pause that doubles with each end in a row. The states are in the file
`Workspace.up`, which `moa status` reads in another process.
"""

import contextlib
import http.client
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from moa.core.errors import in_words
from moa.core.files import write_json
from moa.core.paths import Workspace
from moa.core.subprocesses import environment
from moa.core.supervisor import SupervisedProcess

EVERY = 2.0               # seconds between two checks of the services
PAUSES = (2.0, 60.0)      # seconds before a service is started again: after its first end, and at most
CALM = 60.0               # seconds of work after which the count of ends begins anew
WAIT = 10.0               # seconds before a service is started again that waits for something

States = Literal["starting", "up", "waiting", "down"]


class State(NamedTuple):
    """The state of a service, and why it is not up.

    `down`: it runs and does not work. `waiting`: it ended because what it needs does not exist yet.
    """

    name: Literal["up", "starting", "down", "ended", "waiting"]
    why: str = ""


class Service(Protocol):
    """A service that should run as long as `moa up` does. It is already started when a keeper gets it."""

    name: str

    def state(self) -> State:
        """The state now. May raise, which counts as an end."""
        ...

    def start(self) -> None:
        """Start the service again after an end. May raise, which counts as another end."""

    def stop(self) -> None:
        """End the service for good."""


@dataclass
class ServiceRecord:
    """A service's entry in `Workspace.up`.

    `since`: when it got into this state (UTC, ISO 8601). `why`: why it is not up. `restarts`: since `moa up` began.
    """

    state: States
    since: str
    why: str = ""
    restarts: int = 0


class RestartingService:
    """A service and what the keeper counts for it. Times are those of `time.monotonic`."""

    def __init__(self, service: Service, most: int | None) -> None:
        self.service, self.most_ends = service, most
        self.ends = 0                            # in a row
        self.restart_at: float | None = None     # None = it has not ended
        self.began = time.monotonic()            # the last start


class ServiceKeeper:
    """Checks services in a thread of its own, from `start` until `stop`, and starts again those that ended.

    Args:
        path: file for the states, `Workspace.up`; `stop` deletes it.
        facts: what the file holds besides the states.
        say: gets a line when a service ends, or is up again.
        give_up: gets the reason, once, when a service ended more often in a row than `keep` allows.
    """

    def __init__(self, path: Path, facts: dict[str, Any], say: Callable[[str], None], give_up: Callable[[str], None]
                 ) -> None:
        self.path, self.facts, self.say, self.give_up = path, facts, say, give_up
        self._services: list[RestartingService] = []
        self._records: dict[str, ServiceRecord] = {}
        self._guard = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moa-keeper", daemon=True)

    def keep(self, service: Service, most: int | None = None) -> None:
        """Add a service that has been started. `most`: how often in a row it may end; None = without limit."""
        self._services.append(RestartingService(service, most))
        self.tell(service.name, "starting")

    def start(self) -> None:
        """Write the states, and begin to check the services."""
        self._write()
        self._thread.start()

    def stop(self) -> None:
        """End the checks, then the services, the last one first, and delete the file of states."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        for entry in reversed(self._services):
            entry.service.stop()
        self.path.unlink(missing_ok=True)

    def tell(self, name: str, state: States, why: str = "", *, restarted: bool = False) -> None:
        """Record the state of the service `name`, which may also be one that the caller itself keeps running."""
        with self._guard:
            before = self._records.get(name, ServiceRecord("starting", _now()))
            changed = (before.state, before.why) != (state, why) or name not in self._records
            record = ServiceRecord(state, _now() if before.state != state else before.since, why,
                                   before.restarts + restarted)
            self._records[name] = record
            if changed or restarted:
                self._write()
        if changed and (why or before.why):
            self._say(f"moa: {name}: {why or 'is up again'}")

    def look(self) -> None:
        """Check each service once, and start again those whose pause is over."""
        for entry in self._services:
            try:
                self._look_at(entry)
            except Exception as error:   # a service's failure must not keep the others from being checked
                self._schedule_restart(entry, f"could not be started: {in_words(error)}")

    def _look_at(self, entry: RestartingService) -> None:
        service, now = entry.service, time.monotonic()
        if entry.restart_at is not None:
            if now >= entry.restart_at:
                service.start()
                entry.restart_at, entry.began = None, time.monotonic()
                record = self._records[service.name]
                self.tell(service.name, record.state, record.why, restarted=True)
            return
        state = service.state()
        if state.name == "ended":
            self._schedule_restart(entry, state.why)
        elif state.name == "waiting":
            entry.restart_at = now + WAIT
            self.tell(service.name, "waiting", state.why)
        elif state.name != "starting":
            self.tell(service.name, state.name, state.why)
        if state.name == "up" and now - entry.began > CALM:
            entry.ends = 0

    def _schedule_restart(self, entry: RestartingService, why: str) -> None:
        entry.ends += 1
        pause = min(PAUSES[0] * 2 ** (entry.ends - 1), PAUSES[1])
        entry.restart_at = time.monotonic() + pause
        self.tell(entry.service.name, "down", f"{why}; it is started again in {pause:g} s")
        if entry.most_ends is not None and entry.ends == entry.most_ends + 1:
            self.give_up(f"{entry.service.name} {why}, {entry.ends} times in a row.")

    def _run(self) -> None:
        while not self._ended.wait(EVERY):
            self.look()

    def _write(self) -> None:
        with contextlib.suppress(OSError):   # a full disk must not end the checks
            write_json(self.path, {**self.facts,
                                   "parts": {name: asdict(record) for name, record in self._records.items()}})

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):   # a closed terminal must not end the checks
            self.say(line)


class CommandService:
    """A service that is a command in the workspace and answers HTTP at a loopback port once it works.

    Args:
        extra: environment variables for the command.
        waits: exit codes that mean that what the command needs does not exist yet, each with the reason to show.
    """

    def __init__(self, workspace: Workspace, name: str, command: Sequence[str], port: int, extra: dict[str, str],
                 waits: Mapping[int, str]) -> None:
        self.workspace, self.name, self.command, self.port, self.extra = workspace, name, command, port, extra
        self.waits = waits
        self.log = workspace.logs / f"up-{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._process = self._begin()
        self._answered = False

    def state(self) -> State:
        if self._process.ended:
            status = self._process.wait()
            if status in self.waits:
                return State("waiting", self.waits[status])
            return State("ended", f"ended with status {status} (its output: {self.workspace.relative(self.log)})")
        self._answered = self._answered or _answers(self.port)
        return State("up" if self._answered else "starting")

    def start(self) -> None:
        self._process.stop()   # a process that the command started may be left, and hold the port
        self._process, self._answered = self._begin(), False

    def stop(self) -> None:
        self._process.stop()

    def _begin(self) -> SupervisedProcess:
        with self.log.open("a", encoding="utf-8") as file:
            return SupervisedProcess(self.command, cwd=self.workspace.root, env=environment(self.extra), stdout=file,
                                     step=False)


def _answers(port: int) -> bool:
    """Whether a server answers HTTP at this loopback port, with any status: it may listen before it can answer."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
        with contextlib.closing(connection):
            connection.request("GET", "/healthz")
            connection.getresponse()
            return True
    return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
