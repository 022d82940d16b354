"""One batch with many experts costs about what the base alone costs: tokens/s of ours, of PEFT, and of X-LoRA.

    .venv/bin/python benchmarks/mixed_batch.py --repeats 5

Every system runs the same weights through the same greedy loop with the same KV cache, in one process and in turn; a
figure is the median over the repeats, a ratio the median of the ratios within a repeat. Random LoRA experts of rank 8
on all linear layers are made with ExpertStack and read by PEFT from the directories it saves; before anything is
timed both must give the same logits. Experts are chosen inside the timed prefill. PEFT is given its best: adapters in
the base's dtype rather than its default float32, and its hooks set once a batch as `generate` does, not once a forward.

X-LoRA mixes all experts by a gate of its own, which takes two forwards, and it refuses a KV cache: each of its new
tokens costs a forward over everything so far. One such forward is timed, at the mean length of the decode.

The last line is one JSON object. Shapes: B rows, T positions, V words.
"""

import argparse
import copy
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import finish, goal, interleave, machine, pick_device, ratio
from real import real_base
from safetensors.torch import load_file, save_file
from torch import Tensor

from moa.experts import peft_format
from moa.experts.lora import ExpertStack, LoraSpec

SPEC = LoraSpec(rank=8, alpha=16)
MIXED, XLORA = (1, 4, 8, 16), (4, 16)
EXPERTS = max(MIXED)
SPREAD = 0.02         # of B's random values: far from zero, yet the model still writes words
TIGHT = 1e-3          # largest difference between float32 logits, some 30 in size, that counts as the same
LOOSE = 1.5           # in the timed dtype: mean error against float32, in parts of PEFT's own


@dataclass(frozen=True)
class System:
    """`model` is called like any transformers model, inside `choose()`, which names the rows' experts for one batch."""

    model: Any
    choose: Callable[[], AbstractContextManager[object]] = nullcontext
    cached: bool = True


@dataclass(frozen=True)
class Rates:
    """Tokens/s over all rows."""

    prefill: float
    decode: float


def main() -> None:
    args = arguments()
    device = pick_device(args.device, args.dtype)
    print(facts := machine(device), f"\n{args.rows} rows, {args.prompt} prompt tokens, {args.tokens} new tokens, "
          f"{args.repeats} repeats", flush=True)
    base = real_base(device).model
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, base.config.vocab_size, (args.rows, args.prompt), generator=generator).to(base.device)
    with tempfile.TemporaryDirectory() as folder:
        experts = make_experts(base, Path(folder))
        systems = build(base, experts, args.rows)
        checks = check(base, systems, experts, ids_BT)
        xlora, errors = build_xlora(base, experts) if args.xlora else ({}, {})
        systems |= xlora
    for system in systems.values():
        measure(system, ids_BT, 2)
    rates = interleave({name: lambda system=system: measure(system, ids_BT, args.tokens)
                        for name, system in systems.items()}, args.repeats, warmups=0)
    figures = summarise(rates)
    goals = []
    for phase in ("prefill", "decode"):
        for other, wanted in (("base alone", 0.85), (f"PEFT adapter_names, {EXPERTS}", 2.5)):
            value = ratio(*([getattr(rate, phase) for rate in rates[name]] for name in (f"ours, {EXPERTS}", other)))
            goals.append(goal(f"{phase}: ours with {EXPERTS} experts over {other}", value, wanted, value >= wanted))
            print(f"{goals[-1]['name']}: {value:.2f} (goal {wanted})")
    settings = {key: getattr(args, key) for key in ("rows", "prompt", "tokens", "repeats")}
    finish("mixed_batch", {"machine": facts, **settings, "logits": checks, "systems": figures | errors}, goals)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16, help=f"at least {EXPERTS}, so that every expert has one")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to write after it")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--xlora", action=argparse.BooleanOptionalAction, default=True, help="with X-LoRA, the slowest")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (default: the fastest one that is safe)")
    args = parser.parse_args()
    if args.rows < EXPERTS:
        parser.error(f"--rows {args.rows}: {EXPERTS} experts need at least {EXPERTS} rows.")
    return args


# The systems.

def shared_copy(model: Any) -> Any:
    """A model of its own modules over the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def make_experts(base: Any, folder: Path) -> list[Path]:
    """PEFT directories of random experts whose B is not zero."""
    stack = ExpertStack(shared_copy(base), [SPEC] * EXPERTS)
    directories = [folder / str(expert) for expert in range(EXPERTS)]
    for expert, directory in enumerate(directories):
        stack.initialise(expert, seed=expert)
        peft_format.save(stack, expert, directory, "base")
        generator = torch.Generator().manual_seed(expert)
        tensors = {name: torch.randn(tensor.shape, generator=generator) * SPREAD if ".lora_B." in name else tensor
                   for name, tensor in load_file(directory / peft_format.WEIGHTS).items()}
        save_file(tensors, directory / peft_format.WEIGHTS, metadata={"format": "pt"})
    return directories


def load_ours(base: Any, experts: list[Path]) -> ExpertStack:
    stack = ExpertStack(shared_copy(base), [SPEC] * len(experts))
    for expert, directory in enumerate(experts):
        peft_format.load(stack, expert, directory)
    return stack


def load_peft(base: Any, experts: list[Path]) -> Any:
    from peft import PeftModel

    first, *others = experts
    model = PeftModel.from_pretrained(shared_copy(base), first, adapter_name=first.name, low_cpu_mem_usage=True)
    for directory in others:
        model.load_adapter(directory, adapter_name=directory.name, low_cpu_mem_usage=True)
    for parameter in model.parameters():
        parameter.data = parameter.to(base.dtype)
    return model.eval()


def load_xlora(base: Any, experts: list[Path]) -> Any:
    from peft import XLoraConfig, get_peft_model

    model = shared_copy(base)
    model.config.use_cache = False   # X-LoRA refuses the model otherwise
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=model.config.hidden_size,
                         adapters={directory.name: str(directory) for directory in experts})
    return get_peft_model(model, config, autocast_adapter_dtype=False).eval()


@contextmanager
def selected(stack: ExpertStack, rows: list[int]) -> Iterator[None]:
    stack.select(torch.tensor(rows, device=stack.weights.device))
    yield
    stack.select(None)


def ours(stack: ExpertStack, rows: list[int]) -> System:
    return System(stack.model, lambda: selected(stack, rows))


def peft_names(model: Any, rows: list[int]) -> System:
    """The context that PEFT's own `generate` opens for `adapter_names`."""
    names = [str(row) for row in rows]
    return System(model.get_base_model(), lambda: model.base_model._enable_peft_forward_hooks(adapter_names=names))


def build(base: Any, experts: list[Path], rows: int) -> dict[str, System]:
    """All systems but X-LoRA, by name."""
    mixed = {count: [row % count for row in range(rows)] for count in MIXED}
    stack, peft = load_ours(base, experts), load_peft(base, experts)
    systems = {"base alone": System(base)}
    systems |= {f"ours, {count}": ours(stack, owners) for count, owners in mixed.items()}
    systems |= {f"PEFT adapter_names, {count}": peft_names(peft, owners) for count, owners in mixed.items()}
    return systems | {"PEFT single adapter": System(peft.get_base_model())}   # the first is the active one


def build_xlora(base: Any, experts: list[Path]) -> tuple[dict[str, System], dict[str, Any]]:
    """X-LoRA by name, and the errors of what does not run."""
    systems: dict[str, System] = {}
    errors: dict[str, Any] = {}
    for count in XLORA:
        name = f"PEFT X-LoRA, {count}"
        try:
            system = System(load_xlora(base, experts[:count]), cached=False)
            measure(system, torch.zeros(1, 2, dtype=torch.long, device=base.device), 2)
            systems[name] = system
        except Exception as error:   # other projects' code: what it cannot do is a finding
            errors[name] = {"error": "".join(traceback.format_exception_only(error)).strip()}
            print(f"{name} does not run: {errors[name]['error']}")
    return systems, errors


# The measurement.

def step(model: Any, ids_BT: Tensor, cache: Any) -> Tensor:
    """Likeliest next token of each row: (B, 1)."""
    logits_B1V = model(input_ids=ids_BT, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1).logits
    return logits_B1V[:, -1].argmax(-1, keepdim=True)


@torch.inference_mode()   # as moa's own decoding; for every system
def measure(system: System, prompt_BT: Tensor, tokens: int) -> Rates:
    """Prefill of the prompts, then `tokens` greedy tokens in each row."""
    from transformers import DynamicCache

    model, rows = system.model, len(prompt_BT)
    cache = DynamicCache(config=model.config) if system.cached else None
    start = clock(prompt_BT)
    with system.choose():
        ids_B1 = step(model, prompt_BT, cache)
        middle = clock(prompt_BT)
        if system.cached:
            forwards = tokens
            for _ in range(forwards):
                ids_B1 = step(model, ids_B1, cache)
        else:
            forwards = 1
            history_BT = torch.cat([prompt_BT, ids_B1.expand(rows, tokens // 2)], 1)
            step(model, history_BT, None)
        end = clock(prompt_BT)
    return Rates(prompt_BT.numel() / (middle - start), rows * forwards / (end - middle))


def clock(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def last_logits(system: System, ids_BT: Tensor) -> Tensor:
    with system.choose():
        return system.model(input_ids=ids_BT, use_cache=False, logits_to_keep=1).logits.float()


def check(base: Any, systems: Mapping[str, System], experts: list[Path], ids_BT: Tensor) -> dict[str, float]:
    """Ours against PEFT on one mixed batch: equal in float32, and in the timed dtype no further from float32 than PEFT
    is. Both do the same work, or this is no benchmark."""
    exact = build(copy.deepcopy(base).float(), experts, len(ids_BT))
    names = f"ours, {EXPERTS}", f"PEFT adapter_names, {EXPERTS}", "base alone"
    ours_B1V, peft_B1V, base_B1V = (last_logits(exact[name], ids_BT) for name in names)
    errors = [(last_logits(systems[name], ids_BT) - peft_B1V).abs().mean().item() for name in names[:2]]
    figures = {"float32: largest difference": (ours_B1V - peft_B1V).abs().max().item(),
               "float32: mean change by the experts": (peft_B1V - base_B1V).abs().mean().item(),
               f"{base.dtype}: mean error of ours": errors[0], f"{base.dtype}: mean error of PEFT": errors[1]}
    print("logits, ours against PEFT adapter_names:", figures, flush=True)
    assert figures["float32: largest difference"] < TIGHT, "ours and PEFT do not compute the same"
    assert errors[0] < LOOSE * errors[1] + TIGHT, f"ours in {base.dtype} is further from float32 than PEFT is"
    return figures


def summarise(rates: Mapping[str, list[Rates]]) -> dict[str, Any]:
    """Print the table, and return it."""
    print(f"\n{'system, experts in the batch':<28} {'prefill':>8} {'decode':>8}  tokens/s; over base alone: prefill, "
          "decode")
    figures: dict[str, Any] = {}
    for name, samples in rates.items():
        figure = figures[name] = {}
        for phase in ("prefill", "decode"):
            values, base = ([getattr(rate, phase) for rate in kept] for kept in (samples, rates["base alone"]))
            figure[phase] = statistics.median(values)
            figure[f"{phase} over base"] = ratio(values, base)
            figure[f"{phase} range"] = [min(values), max(values)]
        print(f"{name:<28} {figure['prefill']:8.0f} {figure['decode']:8.1f} {figure['prefill over base']:34.3f} "
              f"{figure['decode over base']:7.3f}")
    return figures


if __name__ == "__main__":
    main()
