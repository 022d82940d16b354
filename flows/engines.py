"""Where experts can be trained besides here: what a cluster must do for us, whichever it is. Knows no ML.

`flows.scaleout` holds the order and the policy; `flows.ray_engine` and `flows.dask_engine` do the same on Ray and Dask.
"""

import math
import os
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol
from urllib.parse import urlsplit

from moa.config import ExecutionParams
from moa.errors import ConfigError
from moa.parcel import Files

PACKAGES = {"ray": "ray", "dask": "distributed"}   # of each engine
STARTS = {"ray": "ray start --head", "dask": "dask scheduler` and `dask worker"}
REACH_SECONDS = 5.0


class Lost(Exception):
    """The worker is gone, not the work: it may be tried elsewhere."""


class Engine(Protocol):
    """A cluster. A ticket stands for one parcel that is being worked on."""

    def places(self) -> int:
        """Parcels that can be worked on at the same time now: one for each device."""
        ...

    def submit(self, files: Files) -> Any:
        """Hand a parcel to a free place; its ticket. Only while there are more places than open tickets."""
        ...

    def ready(self, tickets: Sequence[Any], seconds: float) -> Sequence[Any]:
        """Those of `tickets` that have ended, however they did; waits for the first one, but no longer than that."""
        ...

    def result(self, ticket: Any) -> Files:
        """The answer. Raises Lost when the worker is gone, PipelineError when it could not do the work at all."""
        ...

    def close(self) -> None:
        """End what is being worked on, and the cluster if it is ours."""
        ...


def share(domains: Sequence[str], places: int, most: int | None) -> list[list[str]]:
    """Groups of nearly equal size: one for each place, or more where they would have more than `most` members."""
    count = max(min(places, len(domains)), math.ceil(len(domains) / most) if most else 1)
    return [list(domains[number::count]) for number in range(count)]


def cores(workers: int) -> int:
    """Of this machine, for each of so many workers."""
    return max(1, (os.cpu_count() or 1) // workers)


def require(execution: ExecutionParams) -> None:
    """Raise ConfigError when the engine that `execution.runner` names is not installed."""
    package = PACKAGES.get(execution.runner)
    if package is not None and find_spec(package) is None:
        raise ConfigError(f"execution.runner is {execution.runner}, and the Python package {package} is not installed: "
                          f"run `pip install --constraint constraints.txt {package}`, or set it to threads.")


def connect(execution: ExecutionParams, base: Files | None) -> Engine:
    """The engine that params.yaml names, at its address or as a cluster of this machine. `base` is what its workers
    cannot fetch. Raises ConfigError when it is not installed or nobody answers."""
    require(execution)
    if execution.address is not None and execution.address != "auto":
        _reach(execution.runner, execution.address)
    if execution.runner == "ray":
        from flows.ray_engine import RayEngine

        return RayEngine(execution.address, execution.workers, base)
    from flows.dask_engine import DaskEngine

    return DaskEngine(execution.address, execution.workers, base)


def _reach(runner: str, address: str) -> None:
    """The engines' own attempts take up to a minute to give up."""
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
