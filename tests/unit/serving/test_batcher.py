"""Jobs into batches: what shares one, what is refused, and that nobody pays for a neighbour. No models."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any

import pytest

from moa.serving.batcher import Batcher, Closed, Full, Job, Limits

SOON = 120   # seconds, until a hanging test fails


class Work:
    """Doubles numbers, once it may; keeps what it got."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.begun, self.may = threading.Event(), threading.Event()

    def __call__(self, jobs: Sequence[Job]) -> list[Any]:
        self.batches.append([job.work for job in jobs])
        self.begun.set()
        assert self.may.wait(SOON)
        if any(job.work is None for job in jobs):
            raise ValueError("not a number")
        return [2 * job.work for job in jobs]


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def busy(work: Work) -> Iterator[Callable[..., Batcher]]:
    """A batcher whose worker is at its first job until `work.may` is set, so that what follows waits."""
    made: list[Batcher] = []

    def make(**limits: Any) -> Batcher:
        batcher = Batcher(work, Limits(pause=0, **limits))
        made.append(batcher)
        batcher.submit(Job("first", 1, 0))
        assert work.begun.wait(SOON)
        return batcher

    yield make
    work.may.set()
    for batcher in made:
        batcher.close()


def submit(batcher: Batcher, *jobs: Job) -> list[Job]:
    for job in jobs:
        batcher.submit(job)
    return list(jobs)


def test_what_waits_and_fits_is_worked_on_together(work: Work, busy: Callable[..., Batcher]) -> None:
    jobs = submit(busy(rows=3), *(Job("ab"[number % 2], 1, number) for number in range(1, 9)))
    work.may.set()
    assert [job.done.result(SOON) for job in jobs] == [2 * job.work for job in jobs]
    assert work.batches == [[0], [1, 3, 5], [2, 4, 6], [7], [8]]   # the oldest first, and its like beside it


def test_a_batch_is_as_wide_as_its_longest_row(work: Work, busy: Callable[..., Batcher]) -> None:
    jobs = submit(busy(size=10), *(Job("a", size, size) for size in (2, 3, 6, 3, 20)))
    work.may.set()
    for job in jobs:
        job.done.result(SOON)
    assert work.batches == [[0], [2, 3, 3], [6], [20]]   # a row that is too long alone is alone


def test_a_failure_is_nobody_elses(work: Work, busy: Callable[..., Batcher]) -> None:
    good, bad, other = submit(busy(), Job("a", 1, 1), Job("a", 1, None), Job("a", 1, 3))
    work.may.set()
    assert (good.done.result(SOON), other.done.result(SOON)) == (2, 6)
    with pytest.raises(ValueError, match="not a number"):
        bad.done.result(SOON)


def test_a_job_may_have_its_result_before_its_neighbours_and_keeps_it() -> None:
    early, ended = threading.Event(), threading.Event()
    batches: list[list[int]] = []

    def work(jobs: Sequence[Job]) -> list[int]:
        batches.append([job.work for job in jobs])
        if len(jobs) > 1:
            jobs[0].done.set_result(-1)
            early.set()
            assert ended.wait(SOON)
            raise ValueError("after the first was done")
        return [2 * job.work for job in jobs]

    batcher = Batcher(work, Limits(rows=2, pause=SOON))
    first, second = submit(batcher, Job("a", 1, 1), Job("a", 1, 2))
    assert early.wait(SOON) and first.done.result(SOON) == -1
    assert batcher.running == 1 and not second.done.done()
    ended.set()
    assert second.done.result(SOON) == 4 and batches == [[1, 2], [2]]   # the first is not tried again
    batcher.close()


def test_a_full_queue_refuses_until_somebody_leaves(work: Work, busy: Callable[..., Batcher]) -> None:
    batcher = busy(waiting=2)
    first, second = submit(batcher, Job("a", 1, 1), Job("a", 1, 2))
    with pytest.raises(Full):
        batcher.submit(Job("a", 1, 3))
    first.done.cancel()
    third, = submit(batcher, Job("a", 1, 3))
    work.may.set()
    assert (second.done.result(SOON), third.done.result(SOON)) == (4, 6)
    assert work.batches == [[0], [2, 3]]


def test_closing_cancels_what_waits_and_lets_the_rest_end(work: Work, busy: Callable[..., Batcher]) -> None:
    batcher = busy()
    waiting, = submit(batcher, Job("a", 1, 1))
    waiting.done.add_done_callback(lambda _: work.may.set())   # the first job ends once the other was cancelled
    batcher.close(SOON)
    assert not batcher.alive and work.batches == [[0]]
    with pytest.raises(CancelledError):
        waiting.done.result(SOON)
    with pytest.raises(Closed):
        batcher.submit(Job("a", 1, 2))


def test_those_who_come_together_are_one_batch(work: Work) -> None:
    work.may.set()
    batcher = Batcher(work, Limits(rows=8, pause=SOON))   # the eighth ends the pause
    jobs = submit(batcher, *(Job("a", 1, number) for number in range(8)))
    assert [job.done.result(SOON) for job in jobs] == [2 * number for number in range(8)]
    assert len(work.batches) == 1
    batcher.close()
