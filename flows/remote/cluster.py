"""Where experts can be trained besides here: what a cluster must do for us, whichever it is. Knows no ML.

`flows.remote.train` holds order and policy; `flows.remote.ray_cluster` and `flows.remote.dask_cluster` are the
clusters.
"""

import math
import os
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol
from urllib.parse import urlsplit

from flows.remote.payload import Files
from moa.core.config import ExecutionParams
from moa.core.errors import ConfigError

PACKAGES = {"ray": "ray", "dask": "distributed"}   # of each engine
STARTS = {"ray": "ray start --head", "dask": "dask scheduler` and `dask worker"}
REACH_SECONDS = 5.0


class WorkerLost(Exception):
    """The worker is gone, not the work: it may be tried elsewhere."""


class Engine(Protocol):
    """A cluster. A ticket stands for one payload that is being worked on."""

    def places(self) -> int:
        """Parcels that can be worked on at the same time now: one for each device."""
        ...

    def submit(self, files: Files) -> Any:
        """Hand a payload to a free place; its ticket. Only while there are more places than open tickets."""
        ...

    def ready(self, tickets: Sequence[Any], seconds: float) -> Sequence[Any]:
        """Those of `tickets` that have ended, however they did; waits for the first one, but no longer than that."""
        ...

    def result(self, ticket: Any) -> Files:
        """The answer. Raises WorkerLost when the worker is gone, PipelineError when it could not do the work at all."""
        ...

    def close(self) -> None:
        """End what is being worked on, and the cluster if it is ours."""
        ...


def split_evenly(domains: Sequence[str], places: int, most: int | None) -> list[list[str]]:
    """Groups of nearly equal size: one for each place, or more where they would have more than `most` members."""
    count = max(min(places, len(domains)), math.ceil(len(domains) / most) if most else 1)
    return [list(domains[number::count]) for number in range(count)]


def cores_per_worker(workers: int) -> int:
    """Of this machine, for each of so many workers."""
    return max(1, (os.cpu_count() or 1) // workers)


def require_engine(execution: ExecutionParams) -> None:
    """Raise ConfigError when the engine that `execution.runner` names is not installed."""
    package = PACKAGES.get(execution.runner)
    if package is not None and find_spec(package) is None:
        raise ConfigError(f"execution.runner is {execution.runner}, and the Python package {package} is not installed: "
                          f"run `pip install --constraint constraints.txt {package}`, or set it to threads.")


def check_reachable(runner: str, address: str) -> None:
    """Raise ConfigError where nothing listens at `address`: Ray's and Dask's own attempts take up to a minute."""
    found = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = found.hostname, found.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise ConfigError(f"execution.address {address!r} has no host and port: write "
                          f"{'HOST:6379 or ray://HOST:10001' if runner == 'ray' else 'tcp://HOST:8786'}.")
    try:
        socket.create_connection((host, port), REACH_SECONDS).close()
    except OSError as error:
        raise refused(runner, address, error.strerror or str(error)) from None


def refused(runner: str, address: str, why: str) -> ConfigError:
    return ConfigError(f"No {runner.capitalize()} cluster answers at execution.address {address} ({why}): start one "
                       f"with `{STARTS[runner]}`, or set execution.address to null for one on this machine.")
