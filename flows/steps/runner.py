"""Run independent calls side by side and say how each ended.

`LocalRunner` uses threads alone; `flows.build` has the runner that makes each call a Prefect task. Both take the
same calls and give the same outcomes, so order and policy are written once, in `flows.steps.stage_order`.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from moa.core.errors import PipelineError
from moa.core.supervisor import stop_all


class Mark(Enum):
    """What a call returns when it did not do any work."""

    CACHED = "cached"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Call:
    name: str
    work: Callable[[], Any]


@dataclass(frozen=True)
class Outcome:
    name: str
    state: str   # done, cached, skipped or failed
    value: Any = None
    error: Exception | None = None
    seconds: float = 0.0


class Runner(Protocol):
    def run_all(self, calls: Sequence[Call]) -> list[Outcome]:
        """Run every call, even when others fail; outcomes in the order of the calls."""
        ...


def run_call(call: Call, interrupted: threading.Event) -> Outcome:
    """Run one call; its failure is an outcome. Calls that had to wait do not begin after an interruption."""
    began = time.monotonic()
    try:
        if interrupted.is_set():
            raise PipelineError(f"{call.name} did not start: the run was interrupted.")
        value = call.work()
    except Exception as error:
        return Outcome(call.name, "failed", error=error, seconds=time.monotonic() - began)
    state = value.value if isinstance(value, Mark) else "done"
    return Outcome(call.name, state, None if isinstance(value, Mark) else value, seconds=time.monotonic() - began)


class LocalRunner:
    """Threads, no server."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.interrupted = threading.Event()

    def run_all(self, calls: Sequence[Call]) -> list[Outcome]:
        if not calls:
            return []
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                return list(pool.map(lambda call: run_call(call, self.interrupted), calls))
            except BaseException:   # Ctrl-C: without this the pool would wait for its steps to end by themselves
                self.interrupted.set()
                stop_all()
                raise
