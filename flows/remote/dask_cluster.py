"""Payloads on Dask. Knows no order, no policy and no ML; Dask is imported when a cluster is asked for.

Dask would hand a lost worker's tasks to the next one by itself, and a task to a busy worker that has threads left. So
each payload is bound to one worker here, and is lost with it.
"""

import contextlib
import logging
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import Any

from flows.remote.cluster import WorkerLost, cores_per_worker, refused
from flows.remote.payload import Files
from flows.remote.worker import work
from moa.core.errors import PipelineError
from moa.core.text import sentence


def _work(files: Files, base: Files | None) -> Files:
    from distributed import get_worker
    from distributed import print as tell  # at the driver, too

    worker = get_worker()
    key = worker.get_current_task()

    def given_up() -> bool:   # Dask cannot end a running task, but forgets it
        task = worker.state.tasks.get(key)
        return task is None or task.state not in ("executing", "long-running")

    return work(files, base, tell, given_up, worker.state.nthreads)   # Dask tells its workers' libraries: one


class DaskEngine:
    """A place is a worker, of which there is one for each GPU where `dask-cuda` starts them."""

    def __init__(self, address: str | None, workers: int, base: Files | None) -> None:
        import dask
        from distributed import Client, LocalCluster

        logging.getLogger("distributed").setLevel(logging.CRITICAL)   # lost workers are our news
        dask.config.set({"distributed.scheduler.allowed-failures": 0})
        self._cluster = None
        if address is None:
            self._cluster = LocalCluster(n_workers=workers, threads_per_worker=cores_per_worker(workers),
                                         host="127.0.0.1",
                                         dashboard_address=None)
        try:
            self._client = Client(self._cluster or address, timeout=60)
        except OSError as error:
            raise refused("dask", str(address), sentence(str(error))[:200]) from None
        self._base, self._bases = base, dict[str, Any]()   # as scattered to each worker
        self._busy: dict[Any, str] = {}

    def _workers(self) -> list[str]:
        try:
            return sorted(self._client.nthreads())
        except OSError:
            return []   # the scheduler is gone

    def places(self) -> int:
        return len(self._workers())

    def submit(self, files: Files) -> Any:
        place = next(worker for worker in self._workers() if worker not in self._busy.values())
        if self._base is not None and place not in self._bases:
            self._bases[place] = self._send(self._base, place)
        ticket = self._client.submit(_work, self._send(files, place), self._bases.get(place), workers=[place],
                                     pure=False)
        self._busy[ticket] = place
        return ticket

    def _send(self, files: Files, place: str) -> Any:
        found, = self._client.scatter([files], workers=[place], hash=False)   # a dict would be sent piece by piece
        return found

    def ready(self, tickets: Sequence[Any], seconds: float) -> Sequence[Any]:
        from distributed import wait

        with contextlib.suppress(OSError, CancelledError):   # a timeout, or what was sent went with its worker
            wait(list(tickets), timeout=seconds, return_when="FIRST_COMPLETED")
        there = self._workers()
        return [ticket for ticket in tickets if ticket.done() or self._busy[ticket] not in there]

    def result(self, ticket: Any) -> Files:
        from distributed import KilledWorker

        place = self._busy.pop(ticket)
        if ticket.status == "pending":   # waits for a worker that is gone
            ticket.cancel()
            raise WorkerLost(f"{place} is gone.")
        try:
            files: Files = ticket.result(timeout=60)
        except (KilledWorker, CancelledError, OSError) as error:   # a timeout is an OSError
            raise WorkerLost(f"{place} is gone.") from error
        except Exception as error:
            raise PipelineError(f"The Dask worker {place} could not begin: {sentence(repr(error))}") from error
        return files

    def close(self) -> None:
        self._client.cancel(list(self._busy))
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()
