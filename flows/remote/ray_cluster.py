"""The engine of payloads on Ray. Knows no order, no policy and no ML; imports Ray when an engine is made.

Ray's own retries are off: `flows.remote.train` decides whether a lost payload is tried again.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

from flows.remote.cluster import WorkerLost, cores_per_worker, refused
from flows.remote.payload import Files
from flows.remote.worker import work
from moa.core.errors import PipelineError
from moa.core.text import sentence

# Ray reads these when it is imported: no usage statistics, and each line of a worker is passed on unchanged.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0"}
# With this all of Ray listens on loopback alone, as it does on other systems than Linux.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
CLOSE_SECONDS = 4.0   # for the workers to end their tasks; `moa.core.supervisor` kills this process after five


def _work(files: Files, base: Files | None) -> Files:
    return work(files, base)   # Ray passes what it prints on to the driver's output


class RayEngine:
    """Ray as an `Engine`. A place is a GPU; without GPUs a node of the cluster, or one of `workers` on this machine."""

    def __init__(self, address: str | None, workers: int, base: Files | None) -> None:
        """Connect to the cluster at `address`, or start one on loopback. `base` is put into Ray's object store once.

        Raises ConfigError when no cluster answers.
        """
        os.environ.update(QUIET if address else {**QUIET, **LOOPBACK})
        import ray

        self._ray, self._folder = ray, None
        self._open: set[Any] = set()
        try:
            if address is None:
                self._folder = tempfile.mkdtemp(prefix="moa-ray-")
                ray.init(address="local", num_cpus=workers * cores_per_worker(workers), include_dashboard=False,
                         logging_level="error", _temp_dir=self._folder)
            else:
                ray.init(address=address, logging_level="error")
        except (ConnectionError, RuntimeError, TimeoutError) as error:
            self.close()
            raise refused("ray", address or "null", sentence(str(error))[:200]) from None
        cpus = [node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        self._on_gpus = bool(ray.cluster_resources().get("GPU"))
        share = cores_per_worker(workers) if address is None else min(cpus, default=1)   # becomes OMP_NUM_THREADS
        needs = {"num_gpus": 1} if self._on_gpus else {"num_cpus": share}
        self._per_node = workers if address is None else 1
        self._task = ray.remote(max_retries=0, scheduling_strategy="SPREAD", **needs)(_work)
        self._base = None if base is None else ray.put(base)

    def places(self) -> int:
        if self._on_gpus:
            return int(self._ray.cluster_resources().get("GPU", 0))
        return self._per_node * sum(bool(node["Alive"] and node["Resources"].get("CPU")) for node in self._ray.nodes())

    def submit(self, files: Files) -> Any:
        ticket = self._task.remote(files, self._base)
        self._open.add(ticket)
        return ticket

    def ready(self, tickets: Sequence[Any], seconds: float) -> Sequence[Any]:
        ended: Sequence[Any] = self._ray.wait(list(tickets), num_returns=1, timeout=seconds)[0]
        return ended

    def result(self, ticket: Any) -> Files:
        self._open.discard(ticket)
        try:
            files: Files = self._ray.get(ticket)
        except self._ray.exceptions.RayTaskError as error:   # raised by `work`, or by the worker's environment
            raise PipelineError(f"A Ray worker could not begin: {sentence(repr(error.cause))}") from error
        except self._ray.exceptions.RayError as error:
            raise WorkerLost(sentence(str(error).splitlines()[0])) from error
        return files

    def close(self) -> None:
        for ticket in self._open:
            self._ray.cancel(ticket)   # `force` would kill the supervisor, and the training would go on without it
        if self._open:
            self._ray.wait(list(self._open), num_returns=len(self._open), timeout=CLOSE_SECONDS)
        self._ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
