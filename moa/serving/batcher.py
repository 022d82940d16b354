"""Dynamic batching: jobs that arrive while a batch is being processed become the next batch.

The caller provides the function that processes a batch.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

MAX_PAUSES = 10   # pauses that an idle worker waits at most while jobs keep arriving


class Full(Exception):
    """Raised for a job when the queue has reached its limit."""


class Closed(Exception):
    """Raised for a job after the batcher was closed."""


@dataclass(eq=False)
class Job:
    """One piece of work and the future of its result. Jobs with equal `key` may share a batch."""

    key: Hashable
    size: int                    # tokens of its row; a batch costs rows times the longest
    work: Any                    # for the function that processes batches
    done: Future = field(default_factory=Future)


@dataclass(frozen=True)
class Limits:
    """Bounds of batches and of the queue."""

    rows: int = 64               # of one batch
    size: int = 65_536           # rows times the longest row of one batch; a single row may be longer
    waiting: int = 256           # jobs in the queue, without those being processed
    pause: float = 0.005         # seconds without a new job after which an idle worker begins


class Batcher:
    """Processes jobs in one thread, until `close`: a batch is the oldest job and all others that fit.

    `work` gets jobs of one key and returns a result for each. It may set a job's result earlier; that result is kept.
    When `work` raises for several jobs, each one without a result is tried alone, so that a bad job fails only itself.
    """

    def __init__(self, work: Callable[[Sequence[Job]], Sequence[Any]], limits: Limits) -> None:
        self.work, self.limits = work, limits
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._started: Sequence[Job] = ()
        self._thread = threading.Thread(target=self._run, name="moa-batches", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Full or Closed."""
        with self._changed:
            if self._closed:
                raise Closed
            if len(self._waiting) >= self.limits.waiting:
                self._waiting = deque(each for each in self._waiting if not each.done.cancelled())
            if len(self._waiting) >= self.limits.waiting:
                raise Full
            self._waiting.append(job)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Number of jobs in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of jobs being processed."""
        return sum(not job.done.done() for job in self._started)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self, seconds: float = 10) -> None:
        """Take no more jobs, cancel those that wait, and wait up to `seconds` for the present batch."""
        with self._changed:
            self._closed = True
            for job in self._waiting:
                job.done.cancel()
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        while batch := self._next():
            self._started = [job for job in batch if job.done.set_running_or_notify_cancel()]
            if self._started:
                self._process(self._started)
            self._started = ()

    def _next(self) -> list[Job]:
        """The next batch; empty once the batcher is closed and no job waits."""
        with self._changed:
            if not self._waiting:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._gather()
            return self._take()

    def _gather(self) -> None:
        """After an idle time, wait briefly for jobs that arrive together with the first one and can share its batch."""
        until = time.monotonic() + MAX_PAUSES * self.limits.pause
        seen = 0
        while seen < len(self._waiting) < self.limits.rows and time.monotonic() < until and not self._closed:
            seen = len(self._waiting)
            self._changed.wait(self.limits.pause)

    def _take(self) -> list[Job]:
        """Remove the oldest job and all that fit into its batch from the queue. The caller holds the lock."""
        batch: list[Job] = []
        rest: deque[Job] = deque()
        longest = 0
        for job in self._waiting:
            wider = max(longest, job.size)
            fits = (len(batch) < self.limits.rows and job.key == batch[0].key
                    and wider * (len(batch) + 1) <= self.limits.size) if batch else True
            if fits:
                batch.append(job)
                longest = wider
            else:
                rest.append(job)
        self._waiting = rest
        return batch

    def _process(self, jobs: Sequence[Job]) -> None:
        """Set the results of a batch; after an error, those of each job by itself."""
        try:
            results = self.work(jobs)
        except BaseException as error:
            left = [job for job in jobs if not job.done.done()]
            if len(jobs) == 1 and left:
                left[0].done.set_exception(error)
            elif len(jobs) > 1:
                for job in left:
                    self._process([job])
            return
        for job, result in zip(jobs, results, strict=True):
            if not job.done.done():
                job.done.set_result(result)
