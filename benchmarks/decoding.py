"""Decoding a mixture against transformers' `generate` on the base alone, and against the memory's bandwidth.

    .venv/bin/python benchmarks/decoding.py --repeats 5

Three systems write the same number of tokens after the same prompts, in one process and in turn: transformers'
`generate` on the base alone, moa with every row under an expert of its own (random ones of rank 8 on all linear
layers), and moa on the base alone. What comes after the first new token is timed, with each system's own loop, sampling
and stopping around it. A figure is the median over the repeats, a ratio the median of the ratios within a repeat.
Before anything is timed, moa's greedy tokens on the base alone are compared with those of `generate`.

The floor of a step is the time in which the base's weights pass once, at the bandwidth of a large copy, whose bytes
count twice, read and written. A mixture also reads its rows' experts, which the floor leaves out; what it would be with
them stands beside it.

The last line is one JSON object. Shapes: B rows, T positions.
"""

import argparse
import copy
import itertools
import statistics
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from common import finish, goal, interleave, machine, pick_device, ratio
from shapes import CONFIGS, base_of
from torch import Tensor

from moa.experts.lora import ExpertStack, LoraSpec
from moa.mixture.generation import engine
from moa.mixture.generation.engine import GenerationConfig, GenerationRequest

EXPERTS = 16
SPEC = LoraSpec(rank=8, alpha=16)
SPREAD = 0.02                 # of B's random values: far from zero, yet the model still writes words
COPY_BYTES = 256 << 20        # too large for any cache
TIMES, PARTS = 2.0, 0.5       # the goals: over `generate`, and of the floor's speed
GENERATE, MIXTURE, ALONE = "transformers generate, base alone", f"moa, {EXPERTS} experts", "moa, base alone"
FLOOR, WHOLE = "floor: the base's weights once", "the base's and the rows' experts' once"


def main() -> None:
    args = arguments()
    base = base_of(args.config, pick_device(args.device, args.dtype))
    model = base.model
    stack = mixture(copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()}))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(facts := machine(base.device), f"\n{args.config}, {weights / 1e6:.0f} MB of weights, {args.prompt} prompt "
          f"tokens, {args.tokens} timed tokens a row, {args.repeats} repeats", flush=True)
    same = agreement(base, stack, args.prompt, args.tokens)
    print(f"rows of 16 whose greedy tokens are those of generate: {same}", flush=True)
    figures: dict[str, Any] = {}
    goals = []
    for rows in args.rows:
        seconds = interleave(systems(base, stack, draw(model, rows, args.prompt), args.tokens, weights), args.repeats)
        figures[f"{rows} rows"] = report(rows, seconds)
        for name, other, wanted in (("over generate on the base", GENERATE, TIMES),
                                    ("in parts of the floor's speed", FLOOR, PARTS)):
            value = ratio(seconds[other], seconds[MIXTURE])
            goals.append(goal(f"{rows} rows: {MIXTURE} {name}", value, wanted, value >= wanted))
    for each in goals:
        print(f"{each['name']}: {each['value']:.2f} (goal {each['goal']}, {'met' if each['met'] else 'missed'})")
    settings = {key: getattr(args, key) for key in ("config", "rows", "prompt", "tokens", "repeats")}
    finish("decoding", {"machine": facts, **settings, "weights": weights, "same greedy tokens": same, **figures}, goals)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to time in each row")
    parser.add_argument("--config", choices=CONFIGS, default="smollm2")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (default: the fastest one that is safe)")
    return parser.parse_args()


# The systems.

def systems(base: Any, stack: ExpertStack, prompts_BT: Tensor, tokens: int,
            weights: int) -> dict[str, Callable[[], float]]:
    """Each as something that is timed: seconds a step."""
    experts = [row % EXPERTS for row in range(len(prompts_BT))]
    own = len(set(experts)) * stack.weights.shape[1] * base.model.dtype.itemsize
    return {GENERATE: lambda: generate(base.model, prompts_BT, tokens),
            MIXTURE: lambda: moa(stack, base.tokenizer, prompts_BT, tokens, experts),
            ALONE: lambda: moa(stack, base.tokenizer, prompts_BT, tokens, None),
            FLOOR: lambda: weights / bandwidth(prompts_BT.device),
            WHOLE: lambda: (weights + own) / bandwidth(prompts_BT.device)}


def mixture(model: Any) -> ExpertStack:
    """Random experts whose B is not zero."""
    stack = ExpertStack(model, [SPEC] * EXPERTS)
    for expert in range(EXPERTS):
        stack.initialise(expert, seed=expert)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in stack.layers.values():
            layer.b_EOR.copy_(torch.randn(layer.b_EOR.shape, generator=generator) * SPREAD)
    stack.changed()
    return stack


def draw(model: Any, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=generator).to(model.device)


def generate(model: Any, prompts_BT: Tensor, tokens: int, keep: list[Tensor] | None = None) -> float:
    """Seconds a step of transformers' own loop, with nothing else asked of it."""
    from transformers import GenerationConfig, LogitsProcessorList

    stamps: list[float] = []

    def stamp(_: Tensor, scores: Tensor) -> Tensor:
        stamps.append(clock(scores))
        return scores

    model.generation_config = GenerationConfig()   # no end, no other wish
    written = model.generate(prompts_BT, attention_mask=torch.ones_like(prompts_BT),
                             logits_processor=LogitsProcessorList([stamp]),
                             generation_config=GenerationConfig(max_new_tokens=tokens + 1, do_sample=False))
    if keep is not None:
        keep.append(written[:, prompts_BT.shape[1]:])
    return (stamps[-1] - stamps[0]) / tokens


class Stamps(threading.Event):
    """Never set; asked once a token, it notes when."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def is_set(self) -> bool:
        self.times.append(time.perf_counter())
        return False


def moa(stack: ExpertStack, tokenizer: Any, prompts_BT: Tensor, tokens: int, experts: list[int] | None,
        keep: list[list[int]] | None = None) -> float:
    """Seconds a step of moa's loop; a row's last token is at the host when it is asked whether the row is cancelled."""
    stamps = Stamps()
    endless = SimpleNamespace(eos_token_id=None, decode=tokenizer.decode)
    orders = [GenerationRequest(prompt=prompt, limit=tokens + 2, options=GenerationConfig(),
                                cancelled=stamps if row == 0 else None)
              for row, prompt in enumerate(prompts_BT.tolist())]
    chosen = None if experts is None else torch.tensor(experts, device=prompts_BT.device)
    written = engine.generate_batch(stack.model, endless, orders,
                                    lambda rows: stack.select(None if chosen is None else chosen[rows]))
    stack.select(None)
    if keep is not None:
        keep += [row.ids for row in written]
    return (stamps.times[-1] - stamps.times[0]) / tokens


def agreement(base: Any, stack: ExpertStack, length: int, tokens: int) -> int:
    """Rows of 16 in which moa on the base alone writes what `generate` writes. In bfloat16 a row may part where two
    words are equally likely, as the rows of one batch may from the same rows one by one."""
    prompts_BT = draw(base.model, 16, length)
    theirs: list[Tensor] = []
    ours: list[list[int]] = []
    generate(base.model, prompts_BT, tokens, theirs)
    moa(stack, base.tokenizer, prompts_BT, tokens, None, ours)
    return sum(one == other[:len(one)] for one, other in zip(theirs[0].tolist(), ours, strict=True))


def bandwidth(device: torch.device) -> float:
    """Bytes/s of a copy, read and written."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = [clock(source)]
    for _ in range(4):
        target.copy_(source)
        times.append(clock(source))
    return 2 * COPY_BYTES / min(b - a for a, b in itertools.pairwise(times))


def clock(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def report(rows: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Print the table of one batch size, and return it."""
    print(f"\n{rows} rows{'':<31} {'ms a step':>9} {'tokens/s':>9} {'over generate':>14} {'of the floor':>13}")
    figures: dict[str, Any] = {}
    for name, samples in seconds.items():
        figure = figures[name] = {"seconds a step": statistics.median(samples), "range": [min(samples), max(samples)],
                                  "over generate": ratio(seconds[GENERATE], samples),
                                  "of the floor": ratio(seconds[FLOOR], samples)}
        print(f"{name:<38} {1000 * figure['seconds a step']:9.2f} {rows / figure['seconds a step']:9.1f} "
              f"{figure['over generate']:14.2f} {figure['of the floor']:13.2f}")
    return figures


if __name__ == "__main__":
    main()
