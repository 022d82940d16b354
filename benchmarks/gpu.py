"""On a GPU: tests, then training, decoding, a quantised base and a profile, each against what else does the same.

    benchmarks/gpu.sh

runs every part in a process of its own, in order of worth, within five minutes; names of parts run these alone. A part
that fails does not stop the others. The table and one JSON object lie in the folder that OUT names (default: .moa/gpu)
after every part. Without a GPU the parts run the same code on tiny shapes, which shows that they run and nothing else:
no goal is judged.

tests       tests/cuda: equal to the CPU, to PEFT, to experts alone; resumed; mixed decoding
training    8 experts of rank 16 co-trained on random weights of the 7B shape, against PEFT one expert after another on
            the same base; the share of the card's matrix rate; memory of 8 experts over that of one
decoding    64 rows under 16 experts, against the base alone and against PEFT's `adapter_names`; the prompts' forward
quantised   the 7B shape in nf4 with 8 experts: its memory
profile     the longest kernels of a training step and of a decoding step
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import REPOSITORY, finish, goal, interleave, machine, pick_device, ratio
from shapes import byte_tokenizer, random_model
from torch import Tensor, nn

from moa.base.device import Device
from moa.base.encoding import Encoded
from moa.experts.cotraining import Learner, cotrain
from moa.experts.lora import ExpertStack, LoraSpec
from moa.mixture.generation.engine import GenerationConfig, GenerationRequest, generate_batch

SECONDS = {"tests": 75, "training": 110, "decoding": 60, "quantised": 30, "profile": 25}   # at most, by part
ON_CARD = torch.cuda.is_available()
SHAPE = "qwen2.5-7b" if ON_CARD else "tiny"
EXPERTS, SPEC = 8, LoraSpec(16, 32.0)
ROWS, LENGTH = (8, 512) if ON_CARD else (2, 24)   # of one expert's step, and tokens of each
BATCH_TOKENS = 8192 if ON_CARD else 128
DECODED, DECODING_EXPERTS = 64, 16
PROMPT, NEW = (256, 32) if ON_CARD else (16, 4)
OVER_PEFT, OF_RATE, MEMORY = 1.8, 0.5, 1.2
OF_BASE, OVER_NAMES, OF_PREFILL, QUANTISED_GIB = 0.8, 3.0, 0.9, 24.0
Result = dict[str, Any]   # figures, and goals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(SECONDS), metavar="PART", help=", ".join(SECONDS))
    parser.add_argument("--run", choices=SECONDS, help="run this part in this process, and print its JSON")
    args = parser.parse_args()
    if args.run:
        print(json.dumps(PARTS[args.run]()))
    elif unknown := set(args.parts) - set(SECONDS):
        parser.error(f"there is no part {unknown.pop()}; there are {', '.join(SECONDS)}.")
    else:
        drive(args.parts)


# The parts, each in a process.

def drive(parts: Sequence[str]) -> None:
    folder = Path(os.environ.get("OUT") or REPOSITORY / ".moa" / "gpu")
    folder.mkdir(parents=True, exist_ok=True)
    figures: Result = {"machine": machine(pick_device()), "shape": SHAPE}
    goals: list[Mapping[str, object]] = []
    for part in parts:
        found = run(part, folder)
        judged = found.pop("goals", [])
        goals += judged if ON_CARD else []
        figures[part] = found
        (folder / "gpu.txt").write_text(table(figures, goals), encoding="utf-8")
        print(table({part: found}, []), flush=True)
        finish("gpu", figures, goals, folder)


def run(part: str, folder: Path) -> Result:
    """Result of one part; `failed` says why there is none."""
    began = time.monotonic()
    log = folder / f"{part}.log"
    with log.open("w", encoding="utf-8") as errors:
        try:
            done = subprocess.run([sys.executable, __file__, "--run", part], stdout=subprocess.PIPE, stderr=errors,
                                  text=True, timeout=SECONDS[part], env={**os.environ, "HF_HUB_OFFLINE": "1"})
            found: Result = json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            found = {"failed": f"not done after {SECONDS[part]} s"}
        except (IndexError, ValueError):
            said = log.read_text(encoding="utf-8").strip().splitlines()
            found = {"failed": said[-1] if said else "it said nothing"}
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def table(figures: Mapping[str, Any], goals: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for name, found in figures.items():
        if name in SECONDS:
            lines += [name, *(f"  {key:<52} {value:.3f}" if isinstance(value, float) else f"  {key:<52} {value}"
                              for key, value in found.items() if not isinstance(value, list | dict))]
        else:
            lines.append(f"{name}: {found}")
    lines += [f"{each['name']}: {each['value']:.3f} (goal {each['goal']}, {'met' if each['met'] else 'MISSED'})"
              for each in goals]
    return "\n".join(lines) + "\n"


def tests() -> Result:
    command = [sys.executable, "-m", "pytest", "-c", "tests/cuda/pytest.ini", "--rootdir=.", "--confcutdir=tests/cuda",
               "tests/cuda", "-rfE", "--tb=short"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True,
                          env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    print(done.stdout, done.stderr, file=sys.stderr)
    failed = [line.split(" ")[1].partition("::")[2] for line in done.stdout.splitlines()
              if line.startswith(("FAILED", "ERROR"))]
    return {"exit code": done.returncode, "failed tests": ", ".join(failed) or "none"}


# Training.

def training() -> Result:
    device = pick_device()
    model = random_model(SHAPE, byte_tokenizer(), device)
    tokens = EXPERTS * ROWS * LENGTH
    rate = matmul_rate(device)
    clear()
    own = [timed_training(model, EXPERTS, keep) for keep in (False, True)][1]   # the first one warms up
    alone = timed_training(model, 1, True)
    seconds = interleave({"moa": lambda: timed_training(model, EXPERTS, True)["seconds"],
                          "peft": lambda: sum(peft_training(model, device) for _ in range(EXPERTS))}, 2, warmups=0)
    parameters = sum(parameter.numel() for name, parameter in model.named_parameters() if "embed_tokens" not in name)
    # A frozen weight takes part in two products a token: in the forward, and in the gradient of its input.
    share = 4 * parameters * tokens / min(seconds["moa"]) / rate
    faster, memory = ratio(seconds["peft"], seconds["moa"]), own["peak"] / alone["peak"]
    return {"tokens/s, 8 experts": tokens / statistics.median(seconds["moa"]),
            "tokens/s, PEFT one after another": tokens / statistics.median(seconds["peft"]),
            "over PEFT": faster, "matrix products of the card, TFLOP/s": rate / 1e12, "share of them": share,
            "peak GiB, 8 experts": own["peak"], "peak GiB, 1 expert": alone["peak"], "peak over one": memory,
            "goals": [goal("training: over PEFT one after another", faster, OVER_PEFT, faster >= OVER_PEFT, above=True),
                      goal("training: share of the card's matrix rate", share, OF_RATE, share >= OF_RATE, above=True),
                      goal("training: memory of 8 experts over one", memory, MEMORY, memory <= MEMORY, above=False)]}


def rows_of(expert: int, count: int) -> list[Encoded]:
    """Rows of random bytes, the second half of each an answer."""
    draw = torch.Generator().manual_seed(expert)
    return [Encoded(torch.randint(3, 250, (LENGTH,), generator=draw).tolist(),
                    [False] * (LENGTH // 2) + [True] * (LENGTH - LENGTH // 2)) for _ in range(count)]


def timed_training(model: Any, experts: int, keep: bool) -> dict[str, float]:
    """Seconds and peak memory in GiB of one step of so many experts; without `keep` of one that is thrown away."""
    params = SimpleNamespace(epochs=1, batch_rows=ROWS, rows_per_epoch=0, validation_rows=1, patience=0,
                             learning_rate=1e-4, warmup=0.0, weight_decay=0.0, max_grad_norm=1.0, seed=0)
    stack = ExpertStack(model, [SPEC] * experts).trainable(True)
    learners = []
    for expert in range(experts):
        stack.initialise(expert, seed=expert)
        learners.append(Learner(str(expert), expert, stack, rows_of(expert, ROWS), rows_of(expert, 1), params))
    stamps: list[float] = []
    reset_peak()
    start = now()
    cotrain(model, stack, learners, BATCH_TOKENS, lambda _: stamps.append(now()))
    measured = {"seconds": now() - start, "peak": peak_gib()}
    assert all(learner.progress.failure is None for learner in learners) and (keep or stamps)
    stack.remove()
    del learners, stack
    clear()
    return measured


def peft_training(model: Any, device: Device) -> float:
    """Seconds of the same step for one expert, by PEFT in the base's dtype and torch's AdamW, with its validation."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=SPEC.rank, lora_alpha=SPEC.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped: Any = get_peft_model(model, config, autocast_adapter_dtype=False)
    optimizer = torch.optim.AdamW([one for one in wrapped.parameters() if one.requires_grad], lr=1e-4, fused=True)
    rows = rows_of(0, ROWS)
    start = now()
    for at in range(0, ROWS, max(BATCH_TOKENS // LENGTH, 1)):
        ids, labels = padded(rows[at:at + max(BATCH_TOKENS // LENGTH, 1)], device)
        wrapped(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    nn.utils.clip_grad_norm_([one for one in wrapped.parameters() if one.requires_grad], 1.0)
    optimizer.step()
    with torch.no_grad():
        ids, labels = padded(rows[:1], device)
        wrapped(input_ids=ids, labels=labels, use_cache=False).loss.item()
    seconds = now() - start
    wrapped.unload()
    model.requires_grad_(False)
    del wrapped, optimizer
    clear()
    return seconds


def padded(rows: Sequence[Encoded], device: Device) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([row.ids for row in rows])
    targets = torch.tensor([row.targets for row in rows])
    return ids.to(device.device), ids.masked_fill(~targets, -100).to(device.device)


def matmul_rate(device: Device) -> float:
    """Operations a second of a large product in the base's dtype."""
    size = 8192 if ON_CARD else 256
    one, other = (torch.randn(size, size, device=device.device, dtype=getattr(torch, device.dtype)) for _ in range(2))
    times = []
    for _ in range(8):
        start = now()
        one @ other
        times.append(now() - start)
    return 2 * size ** 3 / min(times)


# Decoding.

def decoding() -> Result:
    device = pick_device()
    tokenizer = byte_tokenizer()
    model = random_model(SHAPE, tokenizer, device)
    stack = random_experts(model, DECODING_EXPERTS)
    experts = [row % DECODING_EXPERTS for row in range(DECODED)]
    order = sorted(range(DECODED), key=lambda row: experts[row])   # as `Mixture` sorts the rows of a batch
    prompts = torch.randint(3, 250, (DECODED, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()

    def moa(chosen: Sequence[int] | None) -> Callable[[], dict[str, float]]:
        return lambda: decoded(model, tokenizer, [prompts[row] for row in order],
                               lambda rows: stack.select(None if chosen is None else [chosen[row] for row in rows]))

    samples = interleave({"experts": moa([experts[row] for row in order]), "base": moa(None)}, 3)
    stack.remove()
    clear()
    names = peft_decoding(model, prompts, experts)
    step, base, prefill = ([each[key] for each in samples[name]] for name, key in (
        ("experts", "step"), ("base", "step"), ("experts", "prefill")))
    alone = ratio(base, step)
    over_names = names / statistics.median(step)
    of_prefill = ratio([each["prefill"] for each in samples["base"]], prefill)
    return {"tokens/s, 64 rows, 16 experts": DECODED / statistics.median(step),
            "tokens/s, base alone": DECODED / statistics.median(base), "of the base alone": alone,
            "tokens/s, PEFT's adapter_names": DECODED / names, "over PEFT's adapter_names": over_names,
            "ms of the prompts' forward": 1000 * statistics.median(prefill),
            "prompts' forward, of the base": of_prefill,
            "goals": [goal("decoding: of the base alone", alone, OF_BASE, alone >= OF_BASE, above=True),
                      goal("decoding: over PEFT's adapter_names", over_names, OVER_NAMES, over_names >= OVER_NAMES,
                           above=True),
                      goal("decoding: prompts' forward, of the base alone", of_prefill, OF_PREFILL,
                           of_prefill >= OF_PREFILL, above=True)]}


def random_experts(model: Any, count: int) -> ExpertStack:
    """Experts in the base's dtype whose B is not zero."""
    stack = ExpertStack(model, [SPEC] * count, dtype=model.dtype)
    with torch.no_grad():
        stack.weights.normal_(0, 0.01)
    stack.changed()
    return stack


class Stamps:
    """Never set; asked once a token of its row, it notes the time."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def is_set(self) -> bool:
        self.times.append(now())
        return False


def decoded(model: Any, tokenizer: Any, prompts: Sequence[list[int]],
            choose: Callable[[list[int]], None]) -> dict[str, float]:
    """Seconds of the prompts' forward with the first token, and of each further step, in moa's own loop."""
    stamps: Any = Stamps()
    endless = SimpleNamespace(eos_token_id=None, decode=tokenizer.decode)
    model.generation_config.eos_token_id = None
    requests = [GenerationRequest(prompt=prompt, limit=NEW + 1, options=GenerationConfig(),
                                  cancelled=stamps if row == 0 else None) for row, prompt in enumerate(prompts)]
    start = now()
    generate_batch(model, endless, requests, choose)
    choose([0])
    return {"prefill": stamps.times[0] - start, "step": (stamps.times[-1] - stamps.times[0]) / (len(stamps.times) - 1)}


def peft_decoding(model: Any, prompts: Sequence[list[int]], experts: Sequence[int]) -> float:
    """Seconds a step of transformers' `generate` with PEFT's `adapter_names`, an adapter for each expert."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=SPEC.rank, lora_alpha=SPEC.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped: Any = get_peft_model(model, config, adapter_name="0", autocast_adapter_dtype=False)
    for expert in range(1, DECODING_EXPERTS):
        wrapped.add_adapter(str(expert), config)
    wrapped.eval()   # PEFT's layers are made in training mode
    ids = torch.tensor(prompts, device=model.device)
    names = [str(expert) for expert in experts]

    def generate(new: int) -> float:
        start = now()
        wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, max_new_tokens=new,
                         min_new_tokens=new, do_sample=False, pad_token_id=0)
        return now() - start

    generate(2)
    few, many = generate(2), generate(2 + NEW // 2)
    wrapped.unload()
    return max((many - few) / (NEW // 2), 1e-9)


# A quantised base.

def quantised() -> Result:
    if not ON_CARD:
        return {"left out": "needs a GPU"}
    try:
        import bitsandbytes as bnb
    except ImportError:
        return {"left out": "bitsandbytes is not installed"}
    device = pick_device()
    model = random_model(SHAPE, byte_tokenizer(), device)
    head = model.get_output_embeddings()
    for name, layer in [(name, layer) for name, layer in model.named_modules()
                        if type(layer) is nn.Linear and layer is not head]:
        four = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None,
                                 compute_dtype=model.dtype, quant_type="nf4")
        four.load_state_dict(layer.state_dict())   # on the CPU: it is quantised when it is moved to the card
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, four.to(device.device))
    model.requires_grad_(False)
    clear()
    measured = timed_training(model, EXPERTS, True)
    return {"peak GiB, nf4, 8 experts": measured["peak"], "seconds a step": measured["seconds"],
            "goals": [goal("quantised: 7B in nf4 with 8 experts, GiB", measured["peak"], QUANTISED_GIB,
                           measured["peak"] <= QUANTISED_GIB, above=False)]}


# A profile.

def profile() -> Result:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    device = pick_device()
    tokenizer = byte_tokenizer()
    model = random_model(SHAPE, tokenizer, device)
    timed_training(model, EXPERTS, False)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_CARD else [])]
    key = "self_device_time_total" if ON_CARD else "self_cpu_time_total"
    with profiled(activities=activities) as of_training:
        timed_training(model, EXPERTS, False)
    stack = random_experts(model, DECODING_EXPERTS)
    prompts = [[3 + row] * PROMPT for row in range(DECODED)]
    with profiled(activities=activities) as of_decoding:
        decoded(model, tokenizer, prompts,
                lambda rows: stack.select([row * DECODING_EXPERTS // DECODED for row in rows]))
    found: Result = {}
    for name, one in (("training", of_training), ("decoding", of_decoding)):
        averages = one.key_averages()
        print(averages.table(sort_by=key, row_limit=25), file=sys.stderr)
        total = sum(getattr(each, key) for each in averages)
        found[name] = [[each.key[:80], each.count, round(getattr(each, key) / total, 3)]
                       for each in sorted(averages, key=lambda each: -getattr(each, key))[:15]]
        found[f"longest in {name}"] = f"{found[name][0][0][:40]}, {found[name][0][2]:.0%}"
    return found


# The device.

def now() -> float:
    if ON_CARD:
        torch.cuda.synchronize()
    return time.perf_counter()


def clear() -> None:
    gc.collect()
    if ON_CARD:
        torch.cuda.empty_cache()


def reset_peak() -> None:
    if ON_CARD:
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Most memory of the card since `reset_peak`; on a CPU 1, because nothing counts it there."""
    return torch.cuda.max_memory_allocated() / 2 ** 30 if ON_CARD else 1.0


PARTS: Mapping[str, Callable[[], Result]] = {
    "tests": tests, "training": training, "decoding": decoding, "quantised": quantised, "profile": profile}

if __name__ == "__main__":
    main()
