"""Dynamic batching: jobs that arrive while others are worked on are worked on together.

Knows nothing of models, releases or HTTP: what a batch is worked with is a function that the caller gives.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

PAUSES = 10   # that an idle worker waits at most, while newcomers keep coming


class Full(Exception):
    """As many jobs wait as may."""


class Closed(Exception):
    """No more jobs are taken."""


@dataclass(eq=False)
class Job:
    """Something to be worked on, and the place of its result. Jobs of one `key` may share a batch."""

    key: Hashable
    size: int                    # tokens of its row; a batch costs rows times the longest
    work: Any
    done: Future = field(default_factory=Future)


@dataclass(frozen=True)
class Limits:
    rows: int = 64               # of one batch
    size: int = 65_536           # rows times the longest row of one batch; a single row may be longer
    waiting: int = 256           # jobs that wait, without those being worked on
    pause: float = 0.005         # seconds without a newcomer after which an idle worker begins


class Batcher:
    """One thread that takes the oldest job and all that fit beside it, until `close`.

    `work` gets jobs of one key and returns a result for each; it may give a job its result before, which then stands.
    When it raises for several, each that has no result is tried alone, so that nobody pays for a neighbour.
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
        """Raises Full or Closed."""
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
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs being worked on."""
        return sum(not job.done.done() for job in self._started)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self, seconds: float = 10) -> None:
        """Take no more, cancel what waits, and give what is being worked on so long to end."""
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
                self._settle(self._started)
            self._started = ()

    def _next(self) -> list[Job]:
        """The next batch; empty once closed and nothing waits."""
        with self._changed:
            if not self._waiting:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._gather()
            return self._take()

    def _gather(self) -> None:
        """Nothing was waiting, so those who come along with this one, moments apart, need not wait for its end."""
        until = time.monotonic() + PAUSES * self.limits.pause
        seen = 0
        while seen < len(self._waiting) < self.limits.rows and time.monotonic() < until and not self._closed:
            seen = len(self._waiting)
            self._changed.wait(self.limits.pause)

    def _take(self) -> list[Job]:
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

    def _settle(self, jobs: Sequence[Job]) -> None:
        try:
            results = self.work(jobs)
        except BaseException as error:
            left = [job for job in jobs if not job.done.done()]
            if len(jobs) == 1 and left:
                left[0].done.set_exception(error)
            elif len(jobs) > 1:
                for job in left:
                    self._settle([job])
            return
        for job, result in zip(jobs, results, strict=True):
            if not job.done.done():
                job.done.set_result(result)
