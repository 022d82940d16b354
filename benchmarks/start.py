"""How long moa takes to start: `--help`, small steps with and without the fork server, and a run with nothing to do.

    .venv/bin/python benchmarks/start.py

A base of a few thousand parameters and domains of some rows: what `prepare` then takes is its start. Each repeat forces
all prepares of one workspace with `moa run --local`, as many side by side as it has workers, once with steps forked
(moa.core.fork_server) and once with MOA_FORK_SERVER=0:

    seconds of a prepare = (run that forces all prepares - run with nothing to do) / prepares

The last run is one over many domains with nothing to do, its steps replaced as in orchestration.py: Prefect's server,
MLflow and DVC are what it takes. The last line is one JSON object.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import orchestration
from common import REPOSITORY, finish, goal, interleave, machine, pick_device, ratio

from moa.core.paths import Workspace

HELP_SECONDS, NO_OP_SECONDS, FORKED_OVER_STARTED = 0.3, 8.0, 0.5
HELP, NOTHING, FORKED, STARTED = "help", "nothing to do", "forked", "started"
ROWS = 40
MOA = [sys.executable, "-P", "-m", "moa"]


def main() -> None:
    args = arguments()
    facts = machine(pick_device("cpu"))
    print(facts, flush=True)
    with tempfile.TemporaryDirectory(prefix="moa-start-") as folder:
        os.environ["DVC_SITE_CACHE_DIR"] = str(Path(folder) / "site")
        found = {**small_steps(Path(folder), args.prepares, args.repeats),
                 **nothing_to_do(Path(folder), args.domains, args.repeats)}
    goals = judge(found, args)
    finish("start", {"machine": facts, "prepares": args.prepares, "domains": args.domains, "seconds": found}, goals)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--prepares", type=int, default=31, help="domains whose prepare is timed")
    parser.add_argument("--domains", type=int, default=64, help="of the run with nothing to do")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def small_steps(folder: Path, count: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of `moa --help`, of a local run with nothing to prepare, and of one with all prepares, both ways."""
    workspace = make(folder / "small", count)

    def run(fork: bool) -> float:
        return seconds(workspace, [sys.executable, "-c", DRIVER, "prepare"], MOA_FORK_SERVER="1" if fork else "0")

    run(True)   # base, and what is read from the disk for the first time
    return interleave({
        HELP: lambda: seconds(workspace, [*MOA, "--help"]),
        NOTHING: lambda: seconds(workspace, [sys.executable, "-c", DRIVER]),
        FORKED: lambda: run(True), STARTED: lambda: run(False)}, repeats, warmups=0)


# `moa run --local`, but without a release: there is none to make where prepare is the last stage.
DRIVER = """
import pathlib, sys, flows.steps.session
from flows.launch import run
from moa.core.paths import Workspace
flows.steps.session._release_hooks = lambda *_: []
options = flows.steps.session.BuildOptions(force=tuple(sys.argv[1:]))
if failure := run(Workspace(pathlib.Path.cwd()), options, local=True).failure():
    raise failure
"""


def names(count: int) -> list[str]:
    return [f"domain-{number:03}" for number in range(count)]


def make(root: Path, count: int) -> Workspace:
    """A workspace in git and DVC whose pipeline ends with prepare."""
    sys.path.insert(0, str(REPOSITORY))
    from tests import tiny

    workspace = tiny.workspace(root, tuple(names(count)), ROWS, execution={"workers": orchestration.WORKERS})
    pipeline = root / "dvc.yaml"
    pipeline.write_text(pipeline.read_text().partition("  train:\n")[0])
    (root / ".gitignore").write_text(".moa/\n")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"],
                    [sys.executable, "-m", "dvc", "add", "-q", *(f"data/raw/{name}" for name in names(count))]):
        orchestration.call(workspace, command)
    return workspace


def nothing_to_do(folder: Path, count: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of `moa run` with Prefect and MLflow where everything is fresh."""
    workspace, _ = orchestration.make(folder / "many", count)
    command = orchestration.commands([orchestration.RELEASED])[orchestration.RELEASED]
    orchestration.call(workspace, command)
    return {f"nothing to do, {count} domains": [orchestration.call(workspace, command) for _ in range(repeats)]}


def seconds(workspace: Workspace, command: Sequence[str], **env: str) -> float:
    """Of a process that must succeed, with these variables added."""
    os.environ.update(env)
    try:
        return orchestration.call(workspace, command)
    finally:
        for name in env:
            del os.environ[name]


def judge(found: dict[str, list[float]], args: argparse.Namespace) -> list[dict[str, object]]:
    """Print the medians, and give the goals."""
    shown = {name: statistics.median(values) for name, values in found.items()}
    for name, value in shown.items():
        print(f"  {value:7.2f} s  {name}")
    nothing = found[NOTHING]
    each = {way: [(run - idle) / args.prepares for run, idle in zip(found[way], nothing, strict=True)]
            for way in (FORKED, STARTED)}
    for way, values in each.items():
        print(f"  {statistics.median(values):7.2f} s  a prepare of {args.prepares}, {way}")
    faster, no_op = ratio(each[FORKED], each[STARTED]), shown[f"nothing to do, {args.domains} domains"]
    return [goal("moa --help: seconds", shown[HELP], HELP_SECONDS, shown[HELP] < HELP_SECONDS),
            goal("a small prepare, forked over started", faster, FORKED_OVER_STARTED, faster <= FORKED_OVER_STARTED),
            goal(f"{args.domains} domains, no-op: seconds", no_op, NO_OP_SECONDS, no_op < NO_OP_SECONDS)]


if __name__ == "__main__":
    main()
