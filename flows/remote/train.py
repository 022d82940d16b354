"""The training of experts on a cluster, as a command with the results of `moa train`: order and policy. Knows no ML.

    experts that are missing -> groups, one for each place -> payloads -> answers -> data/experts
    a lost worker            -> its group goes to the next free place, `TRIES` times in all
    an error of the training -> its group fails with the error's sentence; the others go on
    no worker for `PATIENCE` -> every group that waits fails

The command is a process of its own, which ends with the run that started it, so that no thread or server of Ray or Dask
runs in a flow's process. Only the driver of the run writes dvc.lock, after this command has ended.
"""

import argparse
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flows.remote import payload
from flows.remote.cluster import Engine, WorkerLost, check_reachable, require_engine, split_evenly
from flows.remote.payload import Files
from moa.core.config import Config, ExecutionParams, load
from moa.core.errors import ErrorRecord, MoaError, PipelineError, decisive, report
from moa.core.paths import Workspace
from moa.experts.train import finished

TRIES = 3          # of a group whose worker was lost
PATIENCE = 300.0   # seconds without a worker; one takes minutes to begin on a slow machine, or one yet to be allocated
TICK = 1.0         # seconds between two checks of the cluster


@dataclass
class Group:
    """Domains whose experts are trained in one process, and how often that was begun."""

    domains: list[str]
    tries: int = 0

    def __str__(self) -> str:
        return ", ".join(self.domains[:4]) + (f" and {len(self.domains) - 4} more" if len(self.domains) > 4 else "")


def train(workspace: Workspace, config: Config, domains: Sequence[str], command: str, engine: Engine,
          say: Callable[[str], object]) -> None:
    """Train the experts of `domains` on the workers of a cluster; those that fit the present inputs are left alone.

    Args:
        command: what a worker runs, with `--domain NAME` for each domain behind it.
        say: gets each line for the user.

    Raises:
        ConfigError: params.yaml lacks a domain.
        PipelineError: some experts failed; the others are in data/experts.
    """
    for domain in domains:
        config.require_domain(domain)
    todo = [domain for domain in domains if not finished(workspace, config, domain)]
    if not todo:
        return
    waiting = deque(map(Group, split_evenly(todo, _first_places(engine), config.execution.group)))
    running: dict[Any, Group] = {}
    failed: dict[ErrorRecord, str] = {}   # by reason: the groups that failed for it
    idle = 0.0                    # seconds without a worker
    while waiting or running:
        while waiting and len(running) < engine.places():
            group = waiting.popleft()
            group.tries += 1
            running[engine.submit(payload.pack(workspace, config, group.domains, command))] = group
        idle = 0.0 if running else idle + TICK
        if idle > PATIENCE:
            raise _failure({**failed, ErrorRecord("no worker is left"): ", ".join(map(str, waiting))})
        if not running:
            time.sleep(TICK)
        for ticket in engine.ready(list(running), TICK) if running else ():
            group = running.pop(ticket)
            if reason := _receive(workspace, config, engine, ticket, group, waiting, say):
                failed[reason] = f"{failed[reason]}, {group}" if reason in failed else str(group)
    if failed:
        raise _failure(failed)


def _first_places(engine: Engine) -> int:
    """Wait until the cluster has a place; how many it has. Raises PipelineError after `PATIENCE`."""
    began = time.monotonic()
    while not (places := engine.places()):
        if time.monotonic() - began > PATIENCE:
            raise PipelineError("The cluster has no worker: start some, or set execution.address to null.")
        time.sleep(TICK)
    return places


def _receive(workspace: Workspace, config: Config, engine: Engine, ticket: Any, group: Group, waiting: deque[Group],
             say: Callable[[str], object]) -> ErrorRecord | None:
    """Install a worker's experts, or queue the group again if the worker was lost; why experts are missing, or None."""
    try:
        return payload.install_answer(workspace, config, engine.result(ticket))
    except WorkerLost as lost:
        if group.tries == TRIES:
            return ErrorRecord(f"{TRIES} workers were lost with it, the last one because: {lost}")
        say(f"The worker that trained {group} was lost ({lost}) It goes to the next one.")
        waiting.append(group)
        return None
    except MoaError as error:
        return ErrorRecord.of(error)


def _failure(failed: dict[ErrorRecord, str]) -> PipelineError:
    reasons = "; ".join(f"{groups}: {reason}" for reason, groups in failed.items())
    return PipelineError(f"No expert from a worker ({reasons.rstrip('.')}).", cause=decisive(failed))


def connect(execution: ExecutionParams, base: Files | None) -> Engine:
    """The engine that `execution` names, connected to its address or to a cluster that it starts on this machine.

    Args:
        base: files of a base that workers cannot fetch, as of `payload.pack_base`.

    Raises:
        ConfigError: the engine is not installed, or its cluster does not answer.
    """
    require_engine(execution)
    if execution.address is not None and execution.address != "auto":
        check_reachable(execution.runner, execution.address)
    if execution.runner == "ray":
        from flows.remote.ray_cluster import RayEngine

        return RayEngine(execution.address, execution.workers, base)
    from flows.remote.dask_cluster import DaskEngine

    return DaskEngine(execution.address, execution.workers, base)


def main() -> None:
    """Run the command line, in the workspace of the current folder."""
    parser = argparse.ArgumentParser(prog="python -m flows.remote.train", description="Train experts on a cluster.")
    parser.add_argument("--command", default="moa train", help="what a worker runs, with --domain NAME behind it")
    parser.add_argument("--domain", action="append", required=True, metavar="NAME")
    options = parser.parse_args()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        workspace = Workspace.find()
        config = load(workspace.params)
        engine = connect(config.execution, payload.pack_base(workspace, config))
        try:
            train(workspace, config, options.domain, options.command, engine, lambda text: print(text, flush=True))
        finally:
            engine.close()
    except MoaError as error:
        report(error)
        print(f"moa: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
