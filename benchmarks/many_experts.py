"""A mixture of 1,024 experts loads in seconds, holds few of them in memory, and answers about as fast as one of eight.

    .venv/bin/python benchmarks/many_experts.py --repeats 5

Random experts of rank 8 on all linear layers, in float32 as moa trains them, each a PEFT directory of its own. A
mixture of n has the first n of them, hard-linked, and a router of n labels of the size that assemble makes (random
heads, 48 kept prompts a label). At most --resident experts are in memory; the others are on disk, and mostly in the
system's file cache, but for `--cold`, which drops them from it before every batch.

Load: each mixture in a process of its own, on a base that is there already; memory is that process's own (anonymous)
and its mapped files. Throughput: `Mixture.generate` on batches of --rows conversations, labels forced, greedy, exactly
--tokens new tokens each; all mixtures in one process and in turn. `uniform` gives every batch a new random set of
distinct experts (a mixture of 8 has but 8), `zipf` draws every row's expert with weight 1 / place. Paging must not
change an answer: all mixtures answer one batch alike before anything is timed.

The last line is one JSON object.
"""

import argparse
import copy
import gc
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import finish, goal, interleave, machine, pick_device, ratio
from safetensors.torch import load_file, save_file
from shapes import CONFIGS, base_of

from moa.base.load import Base
from moa.core import digests
from moa.core.files import write_json
from moa.core.paths import MANIFEST
from moa.experts import peft_format
from moa.experts.lora import ExpertStack, LoraSpec
from moa.mixture import artifact
from moa.mixture.calibration import KEPT, WITHIN
from moa.mixture.mixture import Mixture
from moa.mixture.router import Router

SPEC = LoraSpec(rank=8, alpha=16)
SPREAD = 0.02          # of B's random values, as in mixed_batch.py
FEWEST, MOST = 8, 1024
WANTED = 0.9
WORDS = ("river", "stone", "ledger", "kettle", "orbit", "garden", "signal", "paper", "window", "market", "engine")


def main() -> None:
    args = arguments()
    if args.load_only:
        print(json.dumps(loaded(args)))
        return
    folder = args.folder or Path(tempfile.mkdtemp(prefix="many-experts-"))
    try:
        run(args, folder)
    finally:
        if args.folder is None:
            shutil.rmtree(folder)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", default="smollm2", help=", ".join(CONFIGS))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", help="of the base (default: the fastest one that is safe)")
    parser.add_argument("--experts", type=int, nargs="+", default=[FEWEST, 16, 64, 256, MOST], help="mixtures' sizes")
    parser.add_argument("--resident", type=int, default=64, help="experts in memory: execution.resident")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--words", type=int, default=40, help="of each prompt, besides the chat template's")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to write after it")
    parser.add_argument("--batches", type=int, default=2, help="new batches in each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--traffic", nargs="*", default=["uniform", "zipf"], help="uniform, zipf; none = no throughput")
    parser.add_argument("--load", action=argparse.BooleanOptionalAction, default=True, help="load time and memory")
    parser.add_argument("--cold", action="store_true", help="no expert is in the system's file cache")
    parser.add_argument("--folder", type=Path, help="where the experts are made and kept (default: a temporary one)")
    parser.add_argument("--load-only", type=int, metavar="N", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(args: argparse.Namespace, folder: Path) -> None:
    device = pick_device(args.device, args.dtype)
    facts = machine(device)
    base = base_of(args.config, device)
    seconds = make(base, folder, max(args.experts))
    for count in args.experts:
        seal(base, folder, count)
    size = sum(path.stat().st_size for path in (folder / "pool" / "e0").iterdir())
    print(facts, f"\n{args.config}: experts of {size / 1e6:.1f} MB, the new ones made in {seconds:.0f} s; "
          f"{args.resident} resident", flush=True)
    figures: dict[str, Any] = {"machine": facts, "settings": {key: getattr(args, key) for key in (
        "config", "resident", "rows", "words", "tokens", "batches", "repeats", "cold")}, "expert bytes": size}
    if args.load:
        figures["load"] = {str(count): load_elsewhere(args, folder, count) for count in args.experts}
    goals = []
    if args.traffic:
        mixtures = {count: Mixture.load(folder / str(count), own(base), args.resident) for count in args.experts}
        for mixture in mixtures.values():
            never_ending(mixture.base)
        check(mixtures, args)
        figures["page-in"] = page_in(mixtures[max(mixtures)], folder, args)
        figures["throughput"] = {traffic: throughput(mixtures, folder, traffic, args) for traffic in args.traffic}
        most = max(args.experts)   # more than are resident, or nothing is read
        goals = [goal(f"{traffic}: tokens/s with {most} experts over {FEWEST}", found[str(most)][f"over {FEWEST}"],
                      WANTED, found[str(most)][f"over {FEWEST}"] >= WANTED)
                 for traffic, found in figures["throughput"].items() if str(FEWEST) in found and most > args.resident]
        for each in goals:
            print(f"{each['name']}: {each['value']:.3f} (goal {WANTED}, {'met' if each['met'] else 'missed'})")
    finish("many_experts", figures, goals)


# Mixtures on disk.

def make(base: Base, folder: Path, count: int) -> float:
    """PEFT directories `pool/e0`, `pool/e1`, ... of random experts whose B is not zero; those that are there stay."""
    start, pool = time.perf_counter(), folder / "pool"
    missing = [expert for expert in range(count) if not (pool / f"e{expert}" / peft_format.CONFIG).is_file()]
    if not missing:
        return 0.0
    stack = ExpertStack(own(base).model, [SPEC])
    stack.initialise(0, seed=0)
    peft_format.save(stack, 0, folder / "pattern", base.pin.source)
    pattern = load_file(folder / "pattern" / peft_format.WEIGHTS)
    for expert in missing:   # each its own bytes: links would be read once for all
        generator = torch.Generator().manual_seed(expert)
        tensors = {name: torch.empty_like(tensor).uniform_(-1, 1, generator=generator).mul_(
            SPREAD if ".lora_B." in name else tensor.shape[1] ** -0.5) for name, tensor in pattern.items()}
        here = pool / f"e{expert}"
        here.mkdir(parents=True, exist_ok=True)
        save_file(tensors, here / peft_format.WEIGHTS, metadata={"format": "pt"})
        shutil.copyfile(folder / "pattern" / peft_format.CONFIG, here / peft_format.CONFIG)   # last: now it is complete
    os.sync()   # what is not written yet cannot be dropped from the file cache
    return time.perf_counter() - start


def seal(base: Base, folder: Path, count: int) -> None:
    """A mixture of the first `count` experts: what bundle.write would write, with links instead of copies."""
    place = folder / str(count)
    if (place / MANIFEST).is_file():
        return
    labels, pinned = [f"e{expert}" for expert in range(count)], {}
    known = folder / "digests.json"
    found = json.loads(known.read_text()) if known.is_file() else {}
    for label in labels:
        (place / artifact.EXPERTS / label).mkdir(parents=True)
        for file in (folder / "pool" / label).iterdir():
            os.link(file, place / artifact.EXPERTS / label / file.name)
        found[label] = found.get(label) or digests.of_expert(folder / "pool" / label)
        pinned[label] = {"digest": found[label]}
    known.write_text(json.dumps(found))
    router = random_router(base, labels)
    save_file(router.tensors(), place / artifact.ROUTER)
    manifest = {"kind": "mixture", "base": asdict(base.pin), "prompt": {"system": None, "max_tokens": 1024},
                "labels": labels, "experts": pinned,
                "router": {"digest": digests.of_file(place / artifact.ROUTER), **router.facts()}}
    write_json(place / MANIFEST, manifest | {"digest": digests.of_json(manifest)})


def random_router(base: Base, labels: list[str]) -> Router:
    """One of the size that assemble makes; it answers nothing here."""
    L, D, C = base.model.config.num_hidden_layers, base.model.config.hidden_size, len(labels)
    generator = torch.Generator().manual_seed(0)
    seen_MD = torch.nn.functional.normalize(torch.randn(KEPT * C, D, generator=generator), dim=-1)
    return Router(labels, torch.zeros(L, D), torch.ones(L, D), torch.randn(L, C, D, generator=generator),
                  torch.zeros(L, C), layer=L // 6, seen_MD=seen_MD, seen_M=torch.arange(C).repeat_interleave(KEPT),
                  threshold_C=torch.full((C,), -1.0), within_RD=torch.zeros(WITHIN, D))


def own(base: Base) -> Base:
    """Modules of its own over shared weights: every mixture changes the model it is put on."""
    shared = {id(tensor): tensor for tensor in (*base.model.parameters(), *base.model.buffers())}
    return replace(base, model=copy.deepcopy(base.model, shared))


# Load time and memory.

def load_elsewhere(args: argparse.Namespace, folder: Path, count: int) -> dict[str, float]:
    """Figures of a fresh process that loads the mixture of `count`: medians of three, for memory the last."""
    command = [sys.executable, __file__, "--load-only", str(count), "--config", args.config, "--device", args.device,
               "--resident", str(args.resident), "--rows", str(args.rows), "--folder", str(folder.resolve())]
    runs = [json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
            for _ in range(3)]
    found = runs[-1] | {"seconds": statistics.median(each["seconds"] for each in runs)}
    print(f"load {count:5}: {found['seconds']:6.2f} s; own memory {found['before']:.0f} MB before, "
          f"{found['loaded']:.0f} after, {found['used']:.0f} with its slots full; mapped files {found['mapped']:.0f} "
          "MB more", flush=True)
    return found


def loaded(args: argparse.Namespace) -> dict[str, float]:
    """In MB: own memory before and after loading, and after as many experts as there are slots were asked for."""
    base = base_of(args.config, pick_device(args.device, args.dtype))
    before = memory()
    start = time.perf_counter()
    mixture = Mixture.load(args.folder / str(args.load_only), base, args.resident)
    seconds = time.perf_counter() - start
    after = memory()
    bring(mixture, range(min(2 * args.resident, args.load_only)))
    full = memory()
    return {"seconds": seconds, "before": before[0], "loaded": after[0], "used": full[0], "mapped": full[1] - before[1]}


def bring(mixture: Mixture, experts: Sequence[int]) -> None:
    """Ask for each of these experts, and let them go again."""
    for part in mixture.pages.parts(experts):
        with mixture.pages.using([experts[place] for place in part]):
            pass


def memory() -> tuple[float, float]:
    """Anonymous and mapped MB of this process that are in memory. NaN where the system does not say (not Linux)."""
    gc.collect()
    status = Path("/proc/self/status")
    if not status.is_file():
        return float("nan"), float("nan")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1e3, int(lines["RssFile"].split()[0]) / 1e3


# Throughput.

@dataclass(frozen=True)
class Run:
    rate: float    # prompt and new tokens a second, over all rows
    share: float   # of the distinct experts of a batch, those that had to be read


def never_ending(base: Base) -> None:
    """No token ends an answer: random experts may like one, and every batch shall be the same work."""
    base.tokenizer.eos_token = None
    base.model.generation_config.eos_token_id = None


def conversations(rows: int, words: int, seed: object) -> list[list[dict[str, str]]]:
    draw = random.Random(f"{seed}")
    return [[{"role": "user", "content": " ".join(draw.choices(WORDS, k=words))}] for _ in range(rows)]


def experts_of(traffic: str, present: int, rows: int, seed: object) -> list[int]:
    """An expert a row: all different as far as there are as many, or the first ones mostly."""
    draw = random.Random(f"{traffic} {present} {seed}")
    if traffic == "zipf":
        return draw.choices(range(present), weights=[1 / place for place in range(1, present + 1)], k=rows)
    distinct = draw.sample(range(present), min(present, rows))
    return [distinct[row % len(distinct)] for row in range(rows)]


def answer(mixture: Mixture, picks: Sequence[int], args: argparse.Namespace, seed: object) -> list[Any]:
    answers = mixture.generate(conversations(len(picks), args.words, seed), [f"e{expert}" for expert in picks],
                               max_new_tokens=args.tokens)
    assert all(one.tokens == args.tokens for one in answers), "every answer has the same length, or nothing is compared"
    return answers


def check(mixtures: dict[int, Mixture], args: argparse.Namespace) -> None:
    """The first experts are in every mixture: all must answer alike, whatever they page."""
    picks = [row % min(mixtures) for row in range(args.rows)]
    said = []
    for mixture in mixtures.values():
        bring(mixture, range(len(mixture.labels))[-args.resident + 3:])   # so that slots and numbers differ
        said.append([one.answer for one in answer(mixture, picks, args, "check")])
    assert all(each == said[0] for each in said), "paging changed an answer"
    print(f"{len(said)} mixtures write the same {len(picks)} answers", flush=True)


def page_in(mixture: Mixture, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds to bring in one expert: the first time, which computes its digest, and again; and from the disk."""
    found: dict[str, float] = {}
    asked = range(len(mixture.labels) // 2, len(mixture.labels))[:2 * args.rows]
    if len(mixture.labels) < 2 * args.resident + len(asked):
        return found
    for name in ("first", "again", "again, from disk"):
        bring(mixture, range(args.resident))
        if name == "again, from disk":
            forget(folder)
        seconds = []
        for expert in asked:
            start = time.perf_counter()
            bring(mixture, [expert])
            seconds.append(time.perf_counter() - start)
        found[name] = statistics.median(seconds) * 1e3
    print("page-in of one expert, ms: " + ", ".join(f"{name} {value:.1f}" for name, value in found.items()), flush=True)
    return found


def forget(folder: Path) -> None:
    """Let the system drop every expert's file from its cache, where it can."""
    for path in (folder / "pool").glob(f"*/{peft_format.WEIGHTS}") if hasattr(os, "posix_fadvise") else ():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def throughput(mixtures: dict[int, Mixture], folder: Path, traffic: str, args: argparse.Namespace) -> dict[str, Any]:
    """Print the table of one kind of traffic, and return it."""
    turns = {count: itertools.count() for count in mixtures}

    def one(count: int) -> Run:
        mixture, tokens, seconds = mixtures[count], 0, 0.0
        asked, read = mixture.pages.asked, mixture.pages.loaded
        for _ in range(args.batches):
            seed = next(turns[count])
            if args.cold:
                forget(folder)
            start = time.perf_counter()
            answers = answer(mixture, experts_of(traffic, count, args.rows, seed), args, seed)
            seconds += time.perf_counter() - start
            tokens += sum(each.prompt_tokens + each.tokens for each in answers)
        return Run(tokens / seconds, (mixture.pages.loaded - read) / (mixture.pages.asked - asked))

    runs = interleave({str(count): partial(one, count) for count in mixtures}, args.repeats)
    few = [run.rate for run in runs.get(str(FEWEST), next(iter(runs.values())))]
    print(f"\n{traffic}: experts present, tokens/s (range), over {FEWEST}, share of a batch's experts read from disk")
    figures: dict[str, Any] = {}
    for name, kept in runs.items():
        rates = [run.rate for run in kept]
        figures[name] = {"tokens/s": statistics.median(rates), "range": [min(rates), max(rates)],
                         f"over {FEWEST}": ratio(rates, few), "read": statistics.mean(run.share for run in kept)}
        print(f"{name:>6} {statistics.median(rates):8.1f} ({min(rates):.1f} to {max(rates):.1f}) "
              f"{ratio(rates, few):7.3f} {figures[name]['read']:7.3f}", flush=True)
    return figures


if __name__ == "__main__":
    main()
