"""The interface of a cluster that trains experts, and checks before one is used. Knows no ML.

`flows.remote.train` holds order and policy; `flows.remote.ray_cluster` and `flows.remote.dask_cluster` implement the
interface.
"""

import math
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol
from urllib.parse import urlsplit

from flows.remote.payload import Files
from moa.core import machine
from moa.core.config import ExecutionParams
from moa.core.errors import ConfigError

PACKAGES = {"ray": "ray", "dask": "distributed"}   # Python package of each engine
STARTS = {"ray": "ray start --head", "dask": "dask scheduler` and `dask worker"}   # commands that start a cluster
REACH_SECONDS = 5.0   # timeout of a connection


class WorkerLost(Exception):
    """A worker was lost while it worked on a payload; another worker may still do the work."""


class Engine(Protocol):
    """A cluster. It has places, each of which works on one payload at a time; a ticket is the handle of such a task."""

    def places(self) -> int:
        """How many payloads can be worked on at the same time now: one for each device."""
        ...

    def submit(self, files: Files) -> Any:
        """Hand a payload to a free place; its ticket. Call it only while there are fewer open tickets than places."""
        ...

    def ready(self, tickets: Sequence[Any], seconds: float) -> Sequence[Any]:
        """The `tickets` that have ended, in success or not. Waits for the first one, for `seconds` at most."""
        ...

    def result(self, ticket: Any) -> Files:
        """The answer to an ended ticket. Raises WorkerLost, or PipelineError when the worker could not begin."""
        ...

    def close(self) -> None:
        """Cancel every open ticket, and end the cluster if this engine started it."""
        ...


def split_evenly(domains: Sequence[str], places: int, most: int | None) -> list[list[str]]:
    """Split `domains` into groups of nearly equal size: one for each place, or more so that none exceeds `most`."""
    count = max(min(places, len(domains)), math.ceil(len(domains) / most) if most else 1)
    return [list(domains[number::count]) for number in range(count)]


def cores_per_worker(workers: int) -> int:
    """CPU cores that this process may use, for each of so many workers, at least 1."""
    return max(1, machine.cores().count // workers)


def require_engine(execution: ExecutionParams) -> None:
    """Raise ConfigError when the engine that `execution.runner` names is not installed."""
    package = PACKAGES.get(execution.runner)
    if package is not None and find_spec(package) is None:
        raise ConfigError(f"execution.runner is {execution.runner}, and the Python package {package} is not installed: "
                          f"run `pip install --constraint constraints.txt {package}`, or set it to threads.")


def check_reachable(runner: str, address: str) -> None:
    """Raise ConfigError when nothing listens at `address`: Ray and Dask themselves try for up to a minute."""
    url = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = url.hostname, url.port
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
    """The error for a cluster that does not answer, for the caller to raise."""
    return ConfigError(f"No {runner.capitalize()} cluster answers at execution.address {address} ({why}): start one "
                       f"with `{STARTS[runner]}`, or set execution.address to null for one on this machine.")
