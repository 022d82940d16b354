"""Measures again, in about a quarter of an hour on two cores, the ratios that the benchmarks claim.

    .venv/bin/python benchmarks/quick.py [--only decoding serve] [--list]

`make bench-quick` runs it. Each benchmark of `PLAN` runs in a process of its own, one after the other, with few repeats
and small sizes; one that fails does not stop the rest. The table at the end has every goal beside the stored result of
the same name, which is of another day and perhaps of another machine. Nothing is stored. A missed goal is shown, and is
no error: one repeat on a busy machine says little.

Left out are the benchmarks that need corpora, hours or a built workspace, and those whose figures are no ratios.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import render

from moa.core.text import table

FOLDER = Path(__file__).resolve().parent
ELSEWHERE = "MOA_BENCH_RESULTS"   # as common.finish reads it; importing that would load torch
# Options by benchmark. The names of goals are those of the full call, but where a size is part of the name.
PLAN: Mapping[str, str] = {
    "training": "--systems floor-4 ours-4 trl-4 trl-fast-4 --rows 8 --repeats 1",
    "decoding": "--repeats 3",
    "mixed_batch": "--tokens 16 --repeats 1 --no-xlora",
    "many_experts": "--no-load --traffic uniform --experts 8 128 --repeats 1",   # 1.3 GB on the disk
    "many_labels": "--labels 64 256 --repeats 3",
    "routing": "--settings many --repeats 2",
    "serve": "--clients 64 --seconds 10",
    "orchestration": "--domains 64 --systems 'moa --local' 'dvc repro' --repeats 1",
    "start": "--prepares 7 --domains 8 --repeats 1",
}
HEAD = ["benchmark", "ratio", "now", "stored", "goal", ""]


def command(name: str, options: str, folder: Path = FOLDER) -> list[str]:
    return [sys.executable, str(folder / f"{name}.py"), *shlex.split(options)]


def measure(plan: Mapping[str, str], results: Path, folder: Path = FOLDER) -> dict[str, tuple[int, float]]:
    """Run the benchmarks of `plan`, scripts in `folder`; their results go to `results`, their output to stderr.

    Returns:
        Exit code and seconds of each.
    """
    environment = {**os.environ, ELSEWHERE: str(results)}
    ended = {}
    for number, (name, options) in enumerate(plan.items(), 1):
        print(f"== {number} of {len(plan)}: {name} {options}", file=sys.stderr, flush=True)
        began = time.monotonic()
        done = subprocess.run(command(name, options, folder), env=environment, stdout=2, check=False)
        ended[name] = done.returncode, time.monotonic() - began
    return ended


def report(ended: Mapping[str, tuple[int, float]], now: Path, stored: Path) -> str:
    """The table of all goals of the benchmarks that ended, and a line on time; `now` and `stored` have the results."""
    rows = [row for name, (code, _) in ended.items() for row in rows_of(name, code, now, stored)]
    seconds = {name: spent for name, (_, spent) in ended.items()}
    each = ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items())
    return f"{table([HEAD, *rows], right=(2, 3))}\n\n{sum(seconds.values()) / 60:.1f} min: {each}"


def rows_of(name: str, code: int, now: Path, stored: Path) -> list[list[str]]:
    """Cells of each goal of a benchmark; of one that failed a single row."""
    found = goals(now / f"{name}.json")
    if code or found is None:
        return [[name, f"failed with exit code {code}" if code else "stored no result", "-", "-", "-", "failed"]]
    before = goals(stored / f"{name}.json") or {}
    return [[name, what, render.number(goal["value"], goal["goal"]),
             render.number(before[what]["value"]) if what in before else "-",
             render.wanted(goal), "met" if goal["met"] else "missed"] for what, goal in found.items()]


def goals(path: Path) -> dict[str, dict[str, Any]] | None:
    """The goals of a stored result by name, None if there is no such file."""
    if not path.is_file():
        return None
    return {goal["name"]: goal for goal in json.loads(path.read_text(encoding="utf-8"))["goals"]}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PLAN), default=list(PLAN), metavar="NAME",
                        help=f"these alone, of {', '.join(PLAN)}")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args(words)
    plan = {name: options for name, options in PLAN.items() if name in args.only}
    if args.list:
        print("\n".join(shlex.join(command(name, options)) for name, options in plan.items()))
        return 0
    with tempfile.TemporaryDirectory(prefix="moa-bench-") as folder:
        ended = measure(plan, Path(folder))
        print(report(ended, Path(folder), FOLDER / "results"))
        return int(any(code or not (Path(folder) / f"{name}.json").is_file() for name, (code, _) in ended.items()))


if __name__ == "__main__":
    sys.exit(main())
