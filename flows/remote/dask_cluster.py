"""The engine of payloads on Dask. Knows no order, no policy and no ML; imports Dask when an engine is made.

Dask would itself give a lost worker's tasks to another one, and a task to a busy worker that has threads left. So each
payload is bound to one worker here, and is lost with it.
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
    """The task of a worker: `flows.remote.worker.work`, ended early if the driver has cancelled it."""
    from distributed import get_worker
    from distributed import print as print_at_driver

    worker = get_worker()
    key = worker.get_current_task()

    def given_up() -> bool:   # Dask cannot end a task that runs, but removes a cancelled one from its state
        task = worker.state.tasks.get(key)
        return task is None or task.state not in ("executing", "long-running")

    # Dask sets OMP_NUM_THREADS to 1 for its workers.
    return work(files, base, print_at_driver, given_up, worker.state.nthreads)


class DaskEngine:
    """Dask as an `Engine`. A place is a worker; `dask-cuda` starts one for each GPU."""

    def __init__(self, address: str | None, workers: int, base: Files | None) -> None:
        """Connect to the scheduler at `address`, or start `workers` on loopback. `base` is sent to each worker once.

        Raises ConfigError when no scheduler answers.
        """
        import dask
        from distributed import Client, LocalCluster

        logging.getLogger("distributed").setLevel(logging.CRITICAL)   # `flows.remote.train` reports lost workers
        dask.config.set({"distributed.scheduler.allowed-failures": 0})
        self._cluster = None
        if address is None:
            self._cluster = LocalCluster(n_workers=workers, threads_per_worker=cores_per_worker(workers),
                                         host="127.0.0.1", dashboard_address=None)
        try:
            self._client = Client(self._cluster or address, timeout=60)
        except OSError as error:
            raise refused("dask", str(address), sentence(str(error))[:200]) from None
        self._base, self._bases = base, dict[str, Any]()   # by worker: its copy of the base, as a future
        self._busy: dict[Any, str] = {}   # by ticket: its worker

    def _workers(self) -> list[str]:
        try:
            return sorted(self._client.nthreads())
        except OSError:
            return []   # the scheduler does not answer

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
        future, = self._client.scatter([files], workers=[place], hash=False)   # a dict alone is sent item by item
        return future

    def ready(self, tickets: Sequence[Any], seconds: float) -> Sequence[Any]:
        from distributed import wait

        with contextlib.suppress(OSError, CancelledError):   # a timeout, or a payload lost with its worker
            wait(list(tickets), timeout=seconds, return_when="FIRST_COMPLETED")
        workers = self._workers()
        return [ticket for ticket in tickets if ticket.done() or self._busy[ticket] not in workers]

    def result(self, ticket: Any) -> Files:
        from distributed import KilledWorker

        place = self._busy.pop(ticket)
        if ticket.status == "pending":   # bound to a worker that is gone
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
