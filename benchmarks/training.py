"""Experts that are co-trained cost little more than two forwards, and a fraction of TRL's time and of its memory.

    .venv/bin/python benchmarks/training.py --systems floor-4 ours-4 trl-4 --repeats 3

A system is NAME-EXPERTS: `ours` trains all experts in one process on one base; `trl` (SFTTrainer with its own
defaults, completion only), `trl-fast` (the same without gradient checkpointing) and `trainer` (transformers' Trainer
with PEFT) train them one after another on one loaded base; `side` is `trl-fast` with one process an expert, all at
once; `floor` is two forwards of the base over ours' batches. Rows (moa's quickstart), their order, batches, steps,
learning rates, ranks and dtype are the same for all. Every run is a process of its own, the systems in turn; seconds
are those of training alone, memory is the process's largest. Finished experts are read from their PEFT directories
and validated by one scorer: throughput may be compared where the losses agree.

The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import finish, goal, interleave, machine, pick_device, ratio
from shapes import CONFIGS, REAL_NAME
from training_process import SYSTEMS, Job

from moa.core.config import TrainParams

DEFAULT = ("floor-4", "ours-4", "ours-1", "ours-8", "trl-4", "trl-fast-4", "trainer-4", "side-4")
OVER_TRL, OF_FLOOR, MEMORY = 2.5, 0.8, 1.3     # goals on 2 cores
OVER_PEFT, MEMORY_CUDA = 1.8, 1.2              # goals for 8 experts on the 7B shape
SAME = 0.03                                    # relative difference of mean validation losses that counts as none
Sample = dict[str, float]                      # of one run: tokens/s, MiB


def main() -> None:
    args = arguments()
    device = pick_device(args.device, args.dtype)
    print(facts := machine(device) | {"trl": version("trl")}, f"\n{args.config}, {args.rows} rows an expert, "
          f"{args.repeats} repeats", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        samples = interleave({name: lambda name=name: run(name, args, Path(folder)) for name in args.systems},
                             args.repeats, warmups=0)
        losses = {name: scored(name, args, Path(folder)) for name in args.systems if not name.startswith("floor")}
    figures = table(samples, losses)
    goals = judged(samples, losses, args.config)
    for each in goals:
        print(f"{each['name']}: {each['value']:.3f} (goal {each['goal']}{'' if each['met'] else ', MISSED'})")
    settings = {key: getattr(args, key) for key in ("config", "rows", "repeats", "batch_tokens")}
    finish("training", {"machine": facts, **settings, "systems": figures}, goals)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(DEFAULT), metavar="NAME-EXPERTS",
                        help=f"names: {', '.join([*SYSTEMS, 'side'])}")
    parser.add_argument("--rows", type=int, default=16, help="of an expert, seen once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--config", default=REAL_NAME, choices=CONFIGS)
    parser.add_argument("--batch-tokens", type=int, default=TrainParams().batch_tokens,
                        help="padded tokens of one forward of ours; more where the device has room")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (default: the fastest one that is safe)")
    args = parser.parse_args()
    for system in args.systems:
        name, _, experts = system.rpartition("-")
        if name not in (*SYSTEMS, "side") or not experts.isdigit() or not int(experts):
            parser.error(f"--systems {system}: it is a name and a number of experts, such as ours-4.")
    return args


# The runs.

def split(system: str) -> tuple[str, list[int]]:
    name, _, experts = system.rpartition("-")
    return name, list(range(int(experts)))


def described(system: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What all jobs of a system share."""
    return {name: getattr(args, name) for name in ("rows", "config", "device", "dtype", "batch_tokens")} | {
        "folder": str(folder / system)}


def start(job: Job, threads: int | None = None) -> subprocess.Popen[str]:
    environment = dict(os.environ, TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    return subprocess.Popen([sys.executable, Path(__file__).with_name("training_process.py"), json.dumps(asdict(job))],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                            env=environment)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The last line that a run prints; trainers print others."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"A run failed with exit code {process.returncode}: {' '.join(map(str, process.args[1:]))}.")
    return json.loads(output.strip().splitlines()[-1])


def run(system: str, args: argparse.Namespace, folder: Path) -> Sample:
    name, experts = split(system)
    where = described(system, args, folder)
    if name != "side":
        taken = result(start(Job(system=name, experts=experts, **where)))
        sample = {"rate": taken["tokens"] / taken["seconds"], "peak": taken["peak"]}
    else:
        cores = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        processes = [start(Job(system="trl-fast", experts=[expert], waits=True, **where),
                           max(1, cores // len(experts))) for expert in experts]
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        began = time.time()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        found = [result(process) for process in processes]
        sample = {"rate": sum(each["tokens"] for each in found) / (max(each["ended"] for each in found) - began),
                  "peak": sum(each["peak"] for each in found)}
    print(f"{system:<12} {sample['rate']:7.0f} tokens/s {sample['peak']:8.0f} MiB", flush=True)
    return sample


def scored(system: str, args: argparse.Namespace, folder: Path) -> float:
    """Mean over the first four experts, or all there are, of their validation losses."""
    _, experts = split(system)
    losses = result(start(Job(system="score", experts=experts[:4], **described(system, args, folder))))
    return statistics.mean(losses.values())


# The findings.

def table(samples: Mapping[str, Sequence[Sample]], losses: Mapping[str, float]) -> dict[str, Any]:
    """Print the table, and return it."""
    print(f"\n{'system-experts':<14} {'tokens/s':>9} {'range':>13} {'peak MiB':>9}  validation loss, and ours over it")
    figures: dict[str, Any] = {}
    for name, runs in samples.items():
        rates = [each["rate"] for each in runs]
        figures[name] = {"tokens/s": statistics.median(rates), "range": [min(rates), max(rates)],
                         "peak MiB": statistics.median(each["peak"] for each in runs),
                         **({"validation loss": losses[name]} if name in losses else {})}
        ours = f"ours-{name.rpartition('-')[2]}"
        if ours in samples and name != ours:
            figures[name]["ours over it"] = ratio([each["rate"] for each in samples[ours]], rates)
        print(f"{name:<14} {figures[name]['tokens/s']:9.0f} {min(rates):6.0f}-{max(rates):<6.0f} "
              f"{figures[name]['peak MiB']:9.0f}  {losses.get(name, float('nan')):.4f} "
              f"{figures[name].get('ours over it', 1.0):.2f}")
    return figures


def judged(samples: Mapping[str, Sequence[Sample]], losses: Mapping[str, float],
           config: str) -> list[dict[str, object]]:
    """Every goal whose two systems ran, within the repeats of this call. Weights that are random have no losses to
    speak of; else a rate is compared only where the losses agree."""
    def over(ours: str, theirs: str, what: str) -> float | None:
        if ours not in samples or theirs not in samples:
            return None
        return ratio(*([each[what] for each in samples[name]] for name in (ours, theirs)))

    goals = []
    large = config == "qwen2.5-7b"
    rates = ([("ours-8", "trainer-8", OVER_PEFT)] if large else
             [("ours-4", name, OVER_TRL) for name in ("trl-4", "trl-fast-4")])
    for ours, theirs, wanted in [*rates, ("ours-4", "floor-4", OF_FLOOR)]:
        if (value := over(ours, theirs, "rate")) is None:
            continue
        same = config != REAL_NAME or theirs not in losses or losses[ours] <= losses[theirs] * (1 + SAME)
        goals.append(goal(f"tokens/s: {ours} over {theirs}" + ("" if same else ", at a worse loss"), value, wanted,
                          value >= wanted and same, above=True))
    if (value := over("ours-8", "ours-1", "peak")) is not None:
        wanted = MEMORY_CUDA if large else MEMORY
        goals.append(goal("peak memory: ours-8 over ours-1", value, wanted, value <= wanted))
    return goals


if __name__ == "__main__":
    main()
