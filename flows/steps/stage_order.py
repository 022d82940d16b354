"""The build's order and policy: which stages run when and side by side, and what a failure means.

Knows neither what a stage computes nor which runner runs it.

    every generation of the graph's affected stages, in topological order:
        ask DVC again which are stale     an upstream stage may have run without changing its output
        stale `train` stages              one process per device, or on a cluster; recorded together
        all other stale stages            a process each, side by side, or restored from DVC's cache
        stages below a failed one         skipped; all others go on, and the run fails at its end
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flows.remote.cluster import split_evenly
from flows.steps import release as releasing
from flows.steps.runner import Call, Mark, Outcome, Runner
from flows.steps.session import Result, Session
from moa.core.config import Config, ExecutionParams
from moa.core.errors import DataError, PipelineError, StageInterrupted
from moa.core.paths import MANIFEST
from moa.core.subprocesses import execute
from moa.reports.text import gate_line


def build(session: Session, runner: Runner) -> Result:
    """Bring every stage up to date, then run the session's release steps. Failures are in the result, not raised."""
    result = session.result = Result()
    _stages(session, runner, result)
    if not result.named("failed"):
        for name, work in session.hooks:
            outcome, = runner.run_all([Call(name, work)])
            _finish(session, result, [outcome], quiet=name in _HOOK_LINES)
            if outcome.error:
                break
            if name in _HOOK_LINES:
                session.screen.say(_HOOK_LINES[name](session, outcome.value))
            result.release = outcome.value
    return result


def _gate_line(session: Session, decision: Any) -> str:
    rows = releasing.lacking_rows(session.workspace, session.config, decision)
    waits = not session.options.promote or session.config.release.approval == "manual"
    return gate_line(decision, rows, touched=session.touched, accepted=session.accepted, waits=waits)


def _promote_line(_: Session, release: Any) -> str:
    champion = f"version {release['champion']} is champion" if release["champion"] else "there is no champion yet"
    return f"{'promote':<24} done  {champion}"


# Release steps that print a line of their own when they end.
_HOOK_LINES: dict[str, Callable[[Session, Any], str]] = {"gate": _gate_line, "promote": _promote_line}


def _stages(session: Session, runner: Runner, result: Result) -> None:
    snapshot = session.snapshot
    graph, affected = snapshot.graph, snapshot.affected
    _finish(session, result, runner.run_all(
        [Call(name, lambda: Mark.CACHED) for names in graph.generations() for name in names
         if graph.stages[name].command and name not in affected | snapshot.left_out]))
    # Generations of the whole graph: in those of the affected part alone, trainings that could share a process may lie
    # in different generations.
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
            members = runner.run_all([Call(name, _reported(errors.get(name, fallback))) for name in names])
            _finish(session, result, [Outcome(member.name, member.state, None, member.error, outcome.seconds)
                                      for member in members], quiet=True)


def _finish(session: Session, result: Result, outcomes: Sequence[Outcome], *, quiet: bool = False) -> None:
    """Record the outcomes, and print a line for each that the screen has not shown yet."""
    for outcome in outcomes:
        result.outcomes[outcome.name] = outcome
        if outcome.state == "skipped":
            session.screen.finish(outcome.name, "skipped", "a stage above it failed")
        elif outcome.state == "cached" and outcome.name in session.snapshot.affected:
            session.screen.finish(outcome.name, "unchanged")
        elif outcome.state == "done" and not quiet and outcome.name not in session.snapshot.graph.stages:
            session.screen.finish(outcome.name, "done")


def _work(session: Session, name: str) -> Callable[[], None]:
    """The work of a stage that runs alone: DVC runs its command, or restores its outputs."""
    def work() -> None:
        if name == "assemble":
            _require_experts(session)
        with _shown(session, name):
            session.pipeline.reproduce(name, lambda line: session.screen.line(name, line),
                                       force=session.forced(name))
    return work


def _require_experts(session: Session) -> None:
    """Raise DataError when a domain has no expert, as after a first run with --domain."""
    missing = [domain for domain in session.config.domains if not session.workspace.expert(domain).exists()]
    if missing:
        raise DataError(f"assemble needs an expert of every domain, and {', '.join(missing)} "
                        f"{'has' if len(missing) == 1 else 'have'} none yet: run `moa run` without --domain.")


@contextmanager
def _shown(session: Session, name: str) -> Iterator[None]:
    """Show the begin and the end of a stage on the screen."""
    session.screen.start(name)
    try:
        yield
    except Exception as error:
        session.screen.finish(name, _ending(error))
        raise
    session.screen.finish(name, "done")


def _ending(error: Exception | None) -> str:
    """The last word on a stage that did not finish."""
    return "interrupted" if isinstance(error, StageInterrupted) else "FAILED"


def _grouped(session: Session, stale: Sequence[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Split stale stages into groups of trainings, each with its device, and the stages that run alone.

    A training that DVC can restore from its cache runs alone, because it needs no device.
    """
    stages = session.snapshot.graph.stages
    trainings = [name for name in stale if stages[name].step == "train" and _prefix(session, name) is not None]
    restored = session.pipeline.restorable([name for name in trainings if not session.forced(name)])
    together: dict[str, list[str]] = {}   # by command without its --domain
    for name in trainings:
        if name not in restored:
            together.setdefault(_prefix(session, name) or "", []).append(name)
    devices = _devices(session.config)
    groups = [(device, share) for names in together.values()
              for number, device in enumerate(devices) if (share := names[number::len(devices)])]
    grouped = {name for _, names in groups for name in names}
    return groups, [name for name in stale if name not in grouped]


def _prefix(session: Session, name: str) -> str | None:
    """The command of a stage without its domain, `moa train` of `moa train --domain math`; None for other commands."""
    stage = session.snapshot.graph.stages[name]
    suffix = f" --domain {stage.domain}"
    return stage.command.removesuffix(suffix) if stage.command and stage.command.endswith(suffix) else None


def _devices(config: Config) -> list[str]:
    """One device for each process that may train at the same time. nvidia-smi counts GPUs: torch loads slowly."""
    if config.execution.runner != "threads":
        return [config.execution.runner]   # one process, in which flows.remote.train uses every place of the cluster
    if config.execution.devices != "auto":
        return list(config.execution.devices) or ["cpu"]
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        count = len([number for number in visible.split(",") if number.strip() not in ("", "-1")])
    elif tool := shutil.which("nvidia-smi"):
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
        count = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    else:
        count = 0
    return [f"cuda:{number}" for number in range(count)] if count > 1 else ["auto"]


def _training(session: Session, device: str, names: Sequence[str]) -> Callable[[], dict[str, Exception]]:
    """The work of a group: train it in one process and record every complete expert; it returns errors by stage."""
    def work() -> dict[str, Exception]:
        pipeline, stages = session.pipeline, session.snapshot.graph.stages
        domains = [stages[name].domain or "" for name in names]
        title = _title(domains)
        command, extra = _command(session.config.execution, device, _prefix(session, names[0]) or "", domains)
        for name in names:
            if session.forced(name):   # remove the outputs, as DVC does before it runs a stage
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
        session.screen.finish(title, _ending(failure) if errors else "done")
        return errors
    return work


def _command(execution: ExecutionParams, device: str, prefix: str, domains: Sequence[str]
             ) -> tuple[str, dict[str, str]]:
    """The shell command that trains `domains` on a device or a cluster, and environment variables for it.

    At most `execution.group` domains share a process; the others follow in further ones, even if an earlier one fails.
    """
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
    """The name of a group, on the screen and of its log file."""
    return f"train@{','.join(domains[:4])}{f'+{len(domains) - 4}' if len(domains) > 4 else ''}"


def _complete(session: Session, domain: str) -> bool:
    """Whether the expert of `domain` is on disk and was trained from its present inputs."""
    return (session.workspace.expert(domain) / MANIFEST).is_file() and session.finished(domain)


def _reported(error: Exception | None) -> Callable[[], None]:
    """Work that ends as a member of a group did: it raises `error`, if any."""
    def work() -> None:
        if error is not None:
            raise error
    return work
