"""The build's order and policy: which stages run when, side by side with what, and what a failure means.

Written once for both runners. It knows neither what a stage computes nor whether Prefect watches.

    every generation of the stale part of the graph, in topological order:
        ask DVC again which are really stale     an upstream stage may have run without changing its output
        stale `train` stages                     one process per device, or on a cluster; recorded together
        all other stale stages                   a process each, side by side, or back from DVC's cache
        below a failed stage                     skipped; everything else goes on, and the run fails at its end
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from flows.remote.cluster import split_evenly
from flows.steps.runner import Call, Mark, Outcome, Runner
from flows.steps.session import Result, Session
from moa.core.config import Config, ExecutionParams
from moa.core.errors import DataError, PipelineError
from moa.core.paths import MANIFEST
from moa.core.subprocesses import execute


def build(session: Session, runner: Runner) -> Result:
    """Bring every stage up to date, then release. Failures are in the result, not raised."""
    result = session.result = Result()
    _stages(session, runner, result)
    if not result.named("failed"):
        for name, work in session.hooks:
            outcome, = runner.run_all([Call(name, work)])
            _finish(session, result, [outcome])
            if outcome.error:
                break
            result.release = outcome.value
    return result


def _stages(session: Session, runner: Runner, result: Result) -> None:
    snapshot = session.snapshot
    graph, affected = snapshot.graph, snapshot.affected
    _finish(session, result, runner.run_all(
        [Call(name, lambda: Mark.CACHED) for names in graph.generations() for name in names
         if graph.stages[name].command and name not in affected | snapshot.left_out]))
    # Generations of the whole graph: those of the stale part alone would tear trainings apart that can share a process.
    for generation in graph.generations():
        todo = [name for name in generation if name in affected]
        if not todo:
            continue
        blocked = graph.descendants(result.named("failed"))
        calls = [Call(name, lambda: Mark.SKIPPED) for name in todo if name in blocked]
        ready = [name for name in todo if name not in blocked]
        stale = set(session.pipeline.stale(ready)) | {name for name in ready if session.forced(name)}
        calls += [Call(name, lambda: Mark.CACHED) for name in ready if name not in stale]
        groups, alone = _grouped(session, [name for name in ready if name in stale])
        calls += [Call(name, _work(session, name)) for name in alone]
        trainings = [Call(f"co-train {device}", _training(session, device, names)) for device, names in groups]
        outcomes = runner.run_all(trainings + calls)
        _finish(session, result, outcomes[len(trainings):])
        for (_, names), outcome in zip(groups, outcomes, strict=False):
            errors = outcome.value or {}
            fallback = outcome.error
            recorded = runner.run_all([Call(name, _reported(errors.get(name, fallback))) for name in names])
            _finish(session, result, [Outcome(each.name, each.state, None, each.error, outcome.seconds)
                                      for each in recorded], quiet=True)


def _finish(session: Session, result: Result, outcomes: Sequence[Outcome], *, quiet: bool = False) -> None:
    """Keep the outcomes and print a line for each that is news."""
    for outcome in outcomes:
        result.outcomes[outcome.name] = outcome
        if outcome.state == "skipped":
            session.screen.finish(outcome.name, "skipped", "a stage above it failed")
        elif outcome.state == "cached" and outcome.name in session.snapshot.affected:
            session.screen.finish(outcome.name, "unchanged")
        elif outcome.state == "done" and not quiet and outcome.name not in session.snapshot.graph.stages:
            session.screen.finish(outcome.name, "done")


def _work(session: Session, name: str) -> Callable[[], None]:
    """One stage through DVC."""
    def work() -> None:
        if name == "assemble":
            _require_experts(session)
        with _shown(session, name):
            session.pipeline.reproduce(name, lambda line: session.screen.line(name, line),
                                       force=session.forced(name))
    return work


def _require_experts(session: Session) -> None:
    missing = [domain for domain in session.config.domains if not session.workspace.expert(domain).exists()]
    if missing:
        raise DataError(f"assemble needs an expert of every domain, and {', '.join(missing)} "
                        f"{'has' if len(missing) == 1 else 'have'} none yet: run `moa run` without --domain.")


@contextmanager
def _shown(session: Session, name: str) -> Iterator[None]:
    session.screen.start(name)
    try:
        yield
    except Exception:
        session.screen.finish(name, "FAILED")
        raise
    session.screen.finish(name, "done")


def _grouped(session: Session, stale: Sequence[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Stale stages as (device, trainings that share it) and the stages that run alone.

    A training that DVC can restore from its cache runs alone: nothing will be trained.
    """
    stages = session.snapshot.graph.stages
    trainings = [name for name in stale if stages[name].step == "train" and _prefix(session, name) is not None]
    restored = session.pipeline.restorable([name for name in trainings if not session.forced(name)])
    together: dict[str, list[str]] = {}
    for name in trainings:
        if name not in restored:
            together.setdefault(_prefix(session, name) or "", []).append(name)
    devices = _devices(session.config)
    groups = [(device, share) for names in together.values()
              for number, device in enumerate(devices) if (share := names[number::len(devices)])]
    grouped = {name for _, names in groups for name in names}
    return groups, [name for name in stale if name not in grouped]


def _prefix(session: Session, name: str) -> str | None:
    """`moa train` of `moa train --domain math`; None when a stage's command is of another kind."""
    stage = session.snapshot.graph.stages[name]
    suffix = f" --domain {stage.domain}"
    return stage.command.removesuffix(suffix) if stage.command and stage.command.endswith(suffix) else None


def _devices(config: Config) -> list[str]:
    """One entry for each process that may train at the same time. Asks the driver's tools, not torch."""
    if config.execution.runner != "threads":
        return [config.execution.runner]   # flows.remote.train finds out how many places a cluster has
    if config.execution.devices != "auto":
        return list(config.execution.devices) or ["cpu"]
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        count = len([one for one in visible.split(",") if one.strip() not in ("", "-1")])
    elif tool := shutil.which("nvidia-smi"):
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
        count = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    else:
        count = 0
    return [f"cuda:{number}" for number in range(count)] if count > 1 else ["auto"]


def _training(session: Session, device: str, names: Sequence[str]) -> Callable[[], dict[str, Exception]]:
    """Train a group in one process and record every expert that is complete; errors of the others by stage."""
    def work() -> dict[str, Exception]:
        pipeline, stages = session.pipeline, session.snapshot.graph.stages
        domains = [stages[name].domain or "" for name in names]
        title = _title(domains)
        command, extra = _command(session.config.execution, device, _prefix(session, names[0]) or "", domains)
        for name in names:
            if session.forced(name):   # DVC, too, removes the outputs of what it runs
                for output in stages[name].outputs:
                    shutil.rmtree(session.workspace.root / output, ignore_errors=True)
        before = pipeline.inputs(names)
        failure: Exception | None = None
        session.screen.start(title)
        try:
            execute(session.workspace, title, ["/bin/sh", "-c", command],
                    lambda line: session.screen.line(title, line), extra)
        except PipelineError as error:
            failure = error
        errors = {name: failure for name in names
                  if failure and not _complete(session, stages[name].domain or "")}
        for name in pipeline.record([name for name in names if name not in errors], before):
            errors[name] = PipelineError(f"{name}: its inputs changed while it was running; run again.")
        session.screen.finish(title, "FAILED" if errors else "done")
        return errors
    return work


def _command(execution: ExecutionParams, device: str, prefix: str, domains: Sequence[str]
             ) -> tuple[str, dict[str, str]]:
    """What trains `domains` on a device, or on the workers of a cluster, and its environment. No more than
    `execution.group` of them share a process: the others follow in another one, whatever became of the first."""
    if device == execution.runner:
        prefix = shlex.join([sys.executable, "-P", "-m", "flows.remote.train", "--command", prefix])
        turns = [list(domains)]
    else:
        turns = split_evenly(domains, 1, execution.group)
    commands = [f"{prefix} {' '.join(f'--domain {shlex.quote(domain)}' for domain in turn)}" for turn in turns]
    extra = {} if device in ("auto", execution.runner) else {"MOA_DEVICE": device}
    if len(commands) == 1:
        return commands[0], extra
    return "; ".join([*(f"{command} || failed=1" for command in commands), "exit ${failed:-0}"]), extra


def _title(domains: Sequence[str]) -> str:
    """What a group is called, in a line and as a file."""
    return f"train@{','.join(domains[:4])}{f'+{len(domains) - 4}' if len(domains) > 4 else ''}"


def _complete(session: Session, domain: str) -> bool:
    return (session.workspace.expert(domain) / MANIFEST).is_file() and session.finished(domain)


def _reported(error: Exception | None) -> Callable[[], None]:
    """A call that ends as a stage did that ran as part of a group."""
    def work() -> None:
        if error is not None:
            raise error
    return work
