"""What the benchmarks share: facts of the machine, repeats taken in turn, goals, and stored results.

Knows nothing of what any benchmark measures, and needs torch and NumPy alone (benchmarks/gpu.sh).
"""

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from moa.base import device as base_device
from moa.base.device import Device
from moa.core import git
from moa.core.files import write_atomic

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
ELSEWHERE = "MOA_BENCH_RESULTS"   # environment: the folder for results, where not RESULTS
MEASURED = ("moa", "flows", "benchmarks/*.py")   # what a result depends on
RESAMPLES = 10_000
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")   # those that decide how fast a dtype is


def pick_device(device: str = "auto", dtype: str | None = None) -> Device:
    """moa's own choice of device and dtype, unless `dtype` is named; every core computes, or OMP_NUM_THREADS of them:
    beside other work fewer threads are faster, because all wait for the slowest."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    picked = base_device.pick_device(device)
    return Device(picked.device, dtype, "--dtype says so") if dtype else picked


def machine(device: Device) -> dict[str, object]:
    """What a figure depends on: cores, CPU flags, device, dtype, versions."""
    accelerator = torch.cuda.get_device_name(device.device) if device.device.startswith("cuda") else None
    return {**host(), "threads": torch.get_num_threads(), "device": accelerator or device.device, "dtype": device.dtype}


def host() -> dict[str, object]:
    """The part of `machine` that is the same for every device."""
    cpuinfo = Path("/proc/cpuinfo")
    found = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return {"cores": os.cpu_count(), "cpu flags": [flag for flag in CPU_FLAGS if flag in found],
            "python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "peft")}}


def interleave(systems: Mapping[str, Callable[[], T]], repeats: int, warmups: int = 1) -> dict[str, list[T]]:
    """Run every system in turn, `repeats` times, the first one moving on each time; `warmups` rounds are not kept."""
    names = list(systems)
    results: dict[str, list[T]] = {name: [] for name in names}
    for repeat in range(-warmups, repeats):
        print(f"repeat {repeat + 1} of {repeats}" if repeat >= 0 else "warming up", file=sys.stderr, flush=True)
        start = repeat % len(names)
        for name in names[start:] + names[:start]:
            result = systems[name]()
            if repeat >= 0:
                results[name].append(result)
    return results


def medians(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median of each system's repeats."""
    return {name: statistics.median(values) for name, values in samples.items()}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over repeats of the ratio within a repeat, in which a slow moment of the machine cancels."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def interval(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Paired percentile bootstrap of the mean difference."""
    values = np.asarray(differences, dtype=float)
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def goal(name: str, value: float, wanted: float, met: bool, above: bool | None = None) -> dict[str, object]:
    """A goal as it is stored. `above` says whether the wanted value is a lower bound, where value and `met` alone do
    not: where the goal is met by more than its value."""
    return {"name": name, "value": value, "goal": wanted, "met": bool(met),
            **({} if above is None else {"above": above})}


# Results.

def code() -> dict[str, object]:
    """The commit that is checked out, and whether files that a result depends on differ from it; null without git."""
    try:
        changed = bool(git.run(REPOSITORY, "status", "--porcelain", "--", *MEASURED).strip())
        return {"commit": git.run(REPOSITORY, "rev-parse", "HEAD").strip(), "changed": changed}
    except git.GitError:
        return {"commit": None, "changed": None}


CODE = code()   # of when the benchmark began: it may run for an hour


def finish(name: str, figures: Mapping[str, Any], goals: Sequence[Mapping[str, object]],
           folder: Path | None = None) -> None:
    """Print a benchmark's last line, one JSON object, and store it as NAME.json in `folder`.

    Without `folder` that is the one that MOA_BENCH_RESULTS names, or benchmarks/results.

    The file also has the date, the commit, the machine and the command. An absolute path in the command is replaced by
    its last part, because other machines do not have it.
    """
    result = {"benchmark": name, "figures": figures, "goals": goals}
    print(json.dumps(result))
    words = [Path(sys.argv[0]).name, *(_without_folder(word) for word in sys.argv[1:])]
    facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **CODE, "command": words,
             "machine": figures.get("machine") or host()}
    text = json.dumps({**facts, **result}, ensure_ascii=False, indent=1)
    write_atomic((folder or Path(os.environ.get(ELSEWHERE) or RESULTS)) / f"{name}.json", f"{text}\n".encode())


def _without_folder(word: str) -> str:
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else word
