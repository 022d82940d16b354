"""Routing among 1,024 labels: how accurate it is, what a decision costs, and how long the router trains.

    .venv/bin/python benchmarks/many_labels.py --repeats 5

Made domains: 64 topics times 16 tasks. A topic has 14 words drawn from the base's vocabulary, four of which it shares
with the next topic; a task has two ways of asking. A prompt is a way of asking, and a note with five of the topic's
words and one of another topic. A setting of n labels has the first n / 16 topics with all tasks, so that every domain's
near twins are there. Strangers are prompts of four topics that no setting knows.

The router is that of `moa assemble` with rule `early`, at the shallowest level it may read; the levels above are not
computed. It is trained on all levels up to there; seconds for all levels of the base are in proportion. `heads` is the
router's choice; `nearest` the domain of the nearest kept prompt, whose cosine is what decides on abstention. Costs are
those of 16 prompts, as a share of one prefill of them, within a repeat.

The last line is one JSON object. Shapes: N prompts, L levels, D hidden size.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from common import finish, goal, interleave, machine, pick_device, ratio
from routing import encode, prefill, timed
from shapes import CONFIGS, base_of
from torch import Tensor

from moa.base.load import Base
from moa.mixture.calibration import SHALLOWEST, Prompts, choose_level, complete, train_heads
from moa.mixture.router import Router, features

TOPICS, FOREIGN, OWN, SHARED = 64, 4, 14, 4
TASKS = (
    ("Sum up in one sentence:", "Give the gist of this:"), ("List every item of this:", "Name the things in this:"),
    ("Reword this politely:", "Give this a kinder tone:"), ("Write a title for this:", "Find a heading for this:"),
    ("Translate into French:", "Say this in French:"), ("Correct the spelling of this:", "Mend the typing errors in:"),
    ("Is this good or bad news?", "Judge the mood of this:"), ("Ask a question on this:", "What would you ask here?"),
    ("Write an answer to this:", "Reply to this note:"), ("Make a table of this:", "Put this into columns:"),
    ("Who is meant by this?", "Name the people in this:"), ("When did this happen?", "Find the date in this:"),
    ("Write this as a poem:", "Let this rhyme:"), ("Explain this to a child:", "Say this in easy words:"),
    ("Turn this into an order:", "Make a command of this:"), ("Count the words of this:", "How long is this?"))
FRAME = "the {} and the {} were late, so nobody saw the {}; the {} came before the {}, with a {}"
SIDES = {"train": 8, "validation": 4, "test": 4}   # prompts of each domain
STRANGERS = 4
ROUTED = 16            # prompts of one decision
MAX_ABSTENTION = 0.01
WANTED = 0.25          # of a prefill


def main() -> None:
    args = arguments()
    device = pick_device(args.device, args.dtype)
    facts, base = machine(device), base_of(args.config, device)
    depth = int(base.model.config.num_hidden_layers * SHALLOWEST) + 1
    print(facts, f"\nlevel {depth - 1} of {base.model.config.num_hidden_layers}", flush=True)
    words, most = vocabulary(base), max(args.labels) // len(TASKS)
    start = time.perf_counter()
    seen = {side: features(base.model, encode(base, prompts), depth) for side, prompts in domains(words, most).items()}
    strangers = features(base.model, encode(base, foreign(words)), depth)
    print(f"features of {sum(map(len, seen.values()))} prompts: {time.perf_counter() - start:.0f} s", flush=True)
    figures: dict[str, Any] = {}
    routers: dict[int, Router] = {}
    for count in args.labels:
        routers[count], figures[str(count)] = trained(seen, strangers, count)
    costs = cost(base, routers, encode(base, domains(words, most)["test"][:ROUTED]), depth, args.repeats)
    print("share of a prefill: " + ", ".join(f"{name} {value:.3f}" for name, value in costs.items()))
    value = costs[f"routing among {max(routers)}"]
    goals = [goal(f"routing among {max(routers)} labels over a prefill", value, WANTED, value <= WANTED)]
    print(f"{goals[0]['name']}: {value:.3f} (goal {WANTED}, {'met' if goals[0]['met'] else 'missed'})")
    finish("many_labels", {"machine": facts, "labels": figures, "cost": costs}, goals)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=[64, 256, 1024], help=f"multiples of {len(TASKS)}")
    parser.add_argument("--config", default="smollm2", help=f"{', '.join(CONFIGS)}; accuracy needs a real base")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", help="of the base (default: the fastest one that is safe)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if any(count % len(TASKS) or not 0 < count <= TOPICS * len(TASKS) for count in args.labels):
        parser.error(f"--labels: multiples of {len(TASKS)} up to {TOPICS * len(TASKS)}.")
    return args


# Prompts.

def vocabulary(base: Base) -> list[list[str]]:
    """Each topic's words: common ones that are one token each, or made ones where the tokenizer has no words."""
    tokens = base.tokenizer.get_vocab()
    known = sorted((token for token in tokens if token[:1] == "\u0120" and token[1:].isascii() and token[1:].isalpha()
                    and token[1:].islower() and 5 <= len(token) <= 11), key=tokens.__getitem__)
    count, each = TOPICS + FOREIGN, OWN - SHARED
    pool = [token[1:] for token in known][500:500 + count * each]   # the first ones belong to no topic
    if len(pool) < count * each:
        pool = [f"word{number}" for number in range(count * each)]
    random.Random(0).shuffle(pool)
    return [(pool[topic * each:] + pool)[:OWN] for topic in range(count)]


def prompts_of(words: Sequence[Sequence[str]], topic: int, task: int, count: int, topics: range) -> list[str]:
    draw, found = random.Random(f"{topic} {task}"), dict[str, None]()
    while len(found) < count:
        other = draw.choice([each for each in topics if each != topic])
        chosen = [*draw.sample(words[topic], 5), draw.choice(words[other])]
        draw.shuffle(chosen)
        found[f"{draw.choice(TASKS[task])} {FRAME.format(*chosen)}."] = None
    return list(found)


def domains(words: Sequence[Sequence[str]], topics: int) -> dict[str, list[str]]:
    """Prompts by side, domain after domain; no prompt is on two sides."""
    sides: dict[str, list[str]] = {side: [] for side in SIDES}
    for topic in range(topics):
        for task in range(len(TASKS)):
            left = prompts_of(words, topic, task, sum(SIDES.values()), range(TOPICS))
            for side, count in SIDES.items():
                sides[side] += left[:count]
                left = left[count:]
    return sides


def foreign(words: Sequence[Sequence[str]]) -> list[str]:
    outside = range(TOPICS, TOPICS + FOREIGN)
    return [prompt for topic in outside for task in range(len(TASKS))
            for prompt in prompts_of(words, topic, task, STRANGERS, outside)]


# Routers.

def trained(seen: dict[str, Tensor], strangers: Tensor, count: int) -> tuple[Router, dict[str, float]]:
    """The router of the first `count` domains, and its figures on their test prompts."""
    parts = {side: Prompts(seen[side][:count * each], torch.arange(count).repeat_interleave(each),
                           [f"{side} {row}" for row in range(count * each)]) for side, each in SIDES.items()}
    start = time.perf_counter()
    router = train_heads([f"d{label}" for label in range(count)], parts["train"])
    middle = time.perf_counter()
    choose_level(router, "last", 0.0, parts["validation"])
    complete(router, parts["train"], parts["validation"], None, MAX_ABSTENTION, None)
    end = time.perf_counter()
    features_NLD, targets_N = parts["test"].features_NLD, parts["test"].targets_N
    chosen_N = router.probabilities(features_NLD).argmax(-1)
    figures = {
        "heads": (chosen_N == targets_N).double().mean().item(),
        "heads, topic": (chosen_N // len(TASKS) == targets_N // len(TASKS)).double().mean().item(),
        "nearest": (nearest(router, features_NLD) == targets_N).double().mean().item(),
        "abstained": abstained(router, features_NLD), "strangers abstained": abstained(router, strangers),
        "fit seconds": middle - start, "calibrate seconds": end - middle, "levels": features_NLD.shape[1],
        "MB": sum(tensor.nbytes for tensor in router.tensors().values()) / 1e6}
    print(f"{count:5} labels: accuracy of heads {figures['heads']:.4f} (topic {figures['heads, topic']:.4f}), "
          f"of nearest {figures['nearest']:.4f}; abstained {figures['abstained']:.4f}, of strangers "
          f"{figures['strangers abstained']:.4f}; fit {figures['fit seconds']:.1f} s, calibration "
          f"{figures['calibrate seconds']:.1f} s; {figures['MB']:.0f} MB", flush=True)
    return router, figures


def abstained(router: Router, features_NLD: Tensor) -> float:
    return statistics.mean(decision.abstained for decision in router.decide(features_NLD))


def nearest(router: Router, features_NLD: Tensor) -> Tensor:
    """The domain of each prompt's nearest kept prompt: (N,)."""
    assert router.seen_MD is not None and router.seen_M is not None
    return router.seen_M[(router.directions(features_NLD[:, router.reads]) @ router.seen_MD.T).argmax(1)]


def cost(base: Base, routers: dict[int, Router], ids: Sequence[list[int]], depth: int,
         repeats: int) -> dict[str, float]:
    """Reading the levels, and deciding among so many labels, over one prefill of the same prompts."""
    read_NLD = features(base.model, ids, depth)
    seconds = interleave({"prefill": lambda: timed(lambda: prefill(base, ids)),
                          "reading": lambda: timed(lambda: features(base.model, ids, depth))} | {
        f"deciding among {count}": lambda router=router: timed(lambda: router.decide(read_NLD))
        for count, router in routers.items()}, repeats)
    shares = {name: ratio(values, seconds["prefill"]) for name, values in seconds.items() if name != "prefill"}
    most = f"deciding among {max(routers)}"
    both = [sum(pair) for pair in zip(seconds["reading"], seconds[most], strict=True)]
    return shares | {f"routing among {max(routers)}": ratio(both, seconds["prefill"]),
                     "prefill, seconds": statistics.median(seconds["prefill"])}


if __name__ == "__main__":
    main()
