"""Runs independent calls side by side, with an outcome for each.

`LocalRunner` uses threads alone; `flows.build` has the runner that makes each call a Prefect task. Both take the
same calls and give the same outcomes, so `flows.steps` does not depend on which one runs.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from moa.core.errors import StageInterrupted
from moa.core.supervisor import stop_all


class Mark(Enum):
    """What the work of a call returns when there was nothing to do; its value is the state of the outcome."""

    CACHED = "cached"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Call:
    """A piece of work and its name, which users see."""

    name: str
    work: Callable[[], Any]


@dataclass(frozen=True)
class Outcome:
    """How a call ended: the value that its work returned, or the error that it raised."""

    name: str
    state: str   # done, cached, skipped or failed
    value: Any = None
    error: Exception | None = None
    seconds: float = 0.0


class Runner(Protocol):
    """Runs calls; how is up to the implementation."""

    def run_all(self, calls: Sequence[Call]) -> list[Outcome]:
        """Run every call, even when others fail; outcomes in the order of the calls."""
        ...


def run_call(call: Call, interrupted: threading.Event) -> Outcome:
    """Run one call in this thread; an exception becomes a failed outcome, and so does a call after `interrupted`."""
    began = time.monotonic()
    try:
        if interrupted.is_set():
            raise StageInterrupted(f"{call.name} did not start: the run was interrupted.")
        value = call.work()
    except Exception as error:
        return Outcome(call.name, "failed", error=error, seconds=time.monotonic() - began)
    state = value.value if isinstance(value, Mark) else "done"
    return Outcome(call.name, state, None if isinstance(value, Mark) else value, seconds=time.monotonic() - began)


class LocalRunner:
    """Runs calls on threads of this process, without Prefect."""

    def __init__(self, workers: int) -> None:
        """`workers`: most calls side by side."""
        self.workers = workers
        self.interrupted = threading.Event()

    def run_all(self, calls: Sequence[Call]) -> list[Outcome]:
        """Run every call, even when others fail; outcomes in the order of the calls."""
        if not calls:
            return []
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                return list(pool.map(lambda call: run_call(call, self.interrupted), calls))
            except BaseException:   # Ctrl-C: end the steps, or leaving the pool would wait for them
                self.interrupted.set()
                stop_all()
                raise
