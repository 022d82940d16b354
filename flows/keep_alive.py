"""Keeps alive what `moa up` consists of, and writes down how each part is.

A part that ends is started again, after a pause that doubles with each end in a row. How each is stands in the file
that `moa up` keeps (`Workspace.up`), where `moa status` reads it in another process.
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

EVERY = 2.0               # seconds between two looks at the parts
PAUSES = (2.0, 60.0)      # seconds before a part is started again: the first time, and at most
CALM = 60.0               # seconds of work after which earlier ends are forgotten
WAIT = 10.0               # seconds before a part is started again that waits for something

States = Literal["starting", "up", "waiting", "down"]


class State(NamedTuple):
    """How a part is: up, still starting, down (it runs, but not well), or ended; and why.

    `waiting` has ended, too, because what it needs is not there yet.
    """

    name: Literal["up", "starting", "down", "ended", "waiting"]
    why: str = ""


class Service(Protocol):
    """One thing that should run as long as `moa up` does. It runs when it is handed to a keeper."""

    name: str

    def state(self) -> State: ...

    def start(self) -> None:
        """Run again, after an end. May raise."""

    def stop(self) -> None: ...


@dataclass
class ServiceRecord:
    """What is written down of a part. `why` it is not up; `restarts` since `moa up` began; `since` when it is so."""

    state: States
    since: str
    why: str = ""
    restarts: int = 0


class RestartingService:
    def __init__(self, part: Service, most: int | None) -> None:
        self.part, self.most = part, most
        self.ends = 0                        # in a row
        self.due: float | None = None        # when to start it again
        self.began = time.monotonic()


class ServiceKeeper:
    """Looks at its parts in a thread of its own, from `start` until `stop`.

    `say` is told of what ends and what comes back; `give_up`, once, of a part that ended more often in a row than it
    may.
    """

    def __init__(self, path: Path, facts: dict[str, Any], say: Callable[[str], None], give_up: Callable[[str], None]
                 ) -> None:
        self.path, self.facts, self.say, self.give_up = path, facts, say, give_up
        self._kept: list[RestartingService] = []
        self._records: dict[str, ServiceRecord] = {}
        self._guard = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moa-keeper", daemon=True)

    def keep(self, part: Service, most: int | None = None) -> None:
        """`most`: how often in a row it may end; None = however often."""
        self._kept.append(RestartingService(part, most))
        self.tell(part.name, "starting")

    def start(self) -> None:
        self._write()
        self._thread.start()

    def stop(self) -> None:
        """End the keeping, then the parts, the last one first."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        for kept in reversed(self._kept):
            kept.part.stop()
        self.path.unlink(missing_ok=True)

    def tell(self, name: str, state: States, why: str = "", *, restarted: bool = False) -> None:
        """Write down how `name` is; also of something that the caller itself keeps running."""
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
        """Look at each part once, and start again what is due."""
        for kept in self._kept:
            try:
                self._look_at(kept)
            except Exception as error:   # of a part: the others are looked at all the same
                self._end(kept, f"could not be started: {in_words(error)}")

    def _look_at(self, kept: RestartingService) -> None:
        part, now = kept.part, time.monotonic()
        if kept.due is not None:
            if now >= kept.due:
                part.start()
                kept.due, kept.began = None, time.monotonic()
                record = self._records[part.name]
                self.tell(part.name, record.state, record.why, restarted=True)
            return
        state = part.state()
        if state.name == "ended":
            self._end(kept, state.why)
        elif state.name == "waiting":
            kept.due = now + WAIT
            self.tell(part.name, "waiting", state.why)
        elif state.name != "starting":
            self.tell(part.name, state.name, state.why)
        if state.name == "up" and now - kept.began > CALM:
            kept.ends = 0

    def _end(self, kept: RestartingService, why: str) -> None:
        kept.ends += 1
        pause = min(PAUSES[0] * 2 ** (kept.ends - 1), PAUSES[1])
        kept.due = time.monotonic() + pause
        self.tell(kept.part.name, "down", f"{why}; it is started again in {pause:g} s")
        if kept.most is not None and kept.ends == kept.most + 1:
            self.give_up(f"{kept.part.name} {why}, {kept.ends} times in a row.")

    def _run(self) -> None:
        while not self._ended.wait(EVERY):
            self.look()

    def _write(self) -> None:
        with contextlib.suppress(OSError):   # a full disk must not end the keeping
            write_json(self.path, {**self.facts, "parts": {name: asdict(each) for name, each in self._records.items()}})

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):   # a terminal that is gone must not either
            self.say(line)


class CommandService:
    """A part that is a command in the workspace, which answers HTTP at a port of this machine once it works.

    `waits`: exit codes with which it says that what it needs is not there yet, and what that is.
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
        self._process.stop()   # what the command itself started may be left, and hold the port
        self._process, self._answered = self._begin(), False

    def stop(self) -> None:
        self._process.stop()

    def _begin(self) -> SupervisedProcess:
        with self.log.open("a", encoding="utf-8") as file:
            return SupervisedProcess(self.command, cwd=self.workspace.root, env=environment(self.extra), stdout=file,
                                     step=False)


def _answers(port: int) -> bool:
    """Whether something answers HTTP there, whatever it says: a server may listen before it can work."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
        with contextlib.closing(connection):
            connection.request("GET", "/healthz")
            connection.getresponse()
            return True
    return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
