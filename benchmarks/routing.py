"""How well the router names domains, by rule and by level, and what asking it costs as a share of one prefill.

    .venv/bin/python benchmarks/routing.py --shared ../shared/data

Settings, each split by content into training, validation and test prompts, ROWS of each a domain, MANY of the last:
  distinct     the five quickstart corpora (math, sql, extract, python, calendar) and four real ones from --shared
               (math, code, sql, medicine): nine domains, among them two of math and two of SQL;
  databases    the eight databases of the shared SQL corpus as eight domains, as they are: every prompt begins with
               "Database NAME.", which decides it;
  near         the same rows without that prefix: only the question's content tells which database is meant;
  many         32 synthetic domains, eight topics by four tasks. Neighbouring topics share a third of their words, every
               prompt also has a word of a foreign topic, and tasks share their verbs, so that no single word decides.
SQL rows are many paraphrases of few queries, so they are split by the query without its literals: no test prompt
paraphrases a training prompt.

The features are kept in .moa/cache, so that a second run needs no base for them. Costs
are always measured: the same prompts through the router's forward and through one prefill (all layers, logits at the
last position), in turn. The last line is one JSON object. Shapes: N prompts, L levels, D hidden size.
"""

import argparse
import hashlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import REPOSITORY, finish, goal, interleave, machine, pick_device, ratio
from real import real_base
from safetensors.torch import load_file, save_file
from torch import Tensor

from moa.base.encoding import ChatEncoder, Encoded
from moa.base.load import Base
from moa.data.quickstart import generate
from moa.experts.batches import collate, microbatches
from moa.mixture.calibration import Prompts, choose_level, complete, expected_calibration_error, train_heads
from moa.mixture.router import FEATURE_TOKENS, Router, features

ROWS = {"train": 48, "validation": 30, "test": 40}   # a domain
MANY = {"train": 24, "validation": 12, "test": 15}   # a domain, where there are 32
SHARES = {"train": 0.5, "validation": 0.7, "test": 1.0}   # upper end of each side's place
TOKENS = 512
CACHE = REPOSITORY / ".moa" / "cache" / "benchmarks"
SHARED = ("math", "code", "sql", "medicine")
RULES = ("last", "vote", "early")
SETTINGS = ["distinct", "many", "databases", "near"]
MAX_ABSTENTION = 0.01
TWINS = ({"quickstart math", "shared math"}, {"quickstart sql", "shared sql"}, {"quickstart python", "shared code"})
COST, DISTINCT = 0.25, 0.99   # goals


@dataclass(frozen=True)
class Text:
    """A prompt, and what decides which side of the split it is on."""

    prompt: str
    key: str


Corpora = Mapping[str, Sequence[Text]]


# Corpora.

def quickstart_corpora() -> dict[str, list[Text]]:
    return {f"quickstart {name}": [text(row) for row in generate.GENERATORS[name](random.Random(f"{name}:0"), 440)]
            for name in generate.NAMES}


def shared_corpora(folder: Path) -> dict[str, list[Text]]:
    """The real corpora; empty, with a word about it, where they are missing."""
    if missing := [name for name in SHARED if not (folder / f"{name}.jsonl").is_file()]:
        print(f"No {', '.join(missing)} in {folder}: going on without the real corpora; name their folder by --shared.")
        return {}
    return {f"shared {name}": [text(json.loads(line), by_query=name == "sql")
                               for line in (folder / f"{name}.jsonl").open(encoding="utf-8")] for name in SHARED}


def text(row: Mapping[str, str], by_query: bool = False) -> Text:
    prompt = "\n\n".join(row[key].strip() for key in ("instruction", "input") if row.get(key))
    return Text(prompt, re.sub(r'"[^"]*"|\b\d+\b', "#", row["output"]) if by_query else prompt)


def databases(sql: Sequence[Text], prefix: bool) -> dict[str, list[Text]]:
    found: dict[str, list[Text]] = {}
    for one in sql:
        head, question = one.prompt.split(". ", 1)
        found.setdefault(head.removeprefix("Database "), []).append(one if prefix else Text(question, one.key))
    return dict(sorted(found.items()))


TOPICS = {
    "kitchen": "oven recipe flour butter whisk simmer pan dough spice salt menu taste plate chef",
    "hospitality": "menu taste plate chef guest booking table tip lobby suite towel breakfast minibar concierge",
    "travel": "guest booking lobby suite luggage passport flight train platform border ticket visa itinerary ferry",
    "logistics": "train platform border ticket pallet freight warehouse forklift container customs parcel depot van",
    "factory": "pallet warehouse forklift depot machine conveyor bolt weld shift safety press sensor maintenance",
    "computing": "machine sensor shift maintenance server backup patch kernel cache log password network disk latency",
    "finance": "backup log password network invoice ledger audit balance loan interest budget tax refund deposit",
    "household": "budget tax refund deposit tenant rent boiler lease plumber curtain oven pan landlord garden",
}
TASKS = {
    "summarise": ("Sum up in one sentence:", "Give the gist of this note:", "Write a short summary of this message:"),
    "list": ("Write the things named here as a list:", "Give every item of this note:", "List what this mentions:"),
    "rewrite": ("Write this note politely:", "Give this message a kinder tone:", "Reword in a polite sentence:"),
    "title": ("Write a title of a few words for this note:", "Give this message a heading:", "Name this note:"),
}
FRAMES = ("the {} and the {} were late, so nobody saw the {}", "we need a {} before the {} is ready, and a {} too",
          "please check the {}, then the {}, and leave the {} alone", "a {} near the {} was broken; the {} was not",
          "everybody asked for the {} but the {} came first, with a {}", "no {} today: the {} and the {} must wait")


def synthetic(rows: int = 80) -> dict[str, list[Text]]:
    """32 domains: a topic's words in a task's words, with a word of a foreign topic in every prompt."""
    found: dict[str, list[Text]] = {}
    for topic, bank in TOPICS.items():
        for task, orders in TASKS.items():
            draw = random.Random(f"{topic} {task}")
            prompts: set[str] = set()
            while len(prompts) < rows:
                foreign = draw.choice([other for other in TOPICS if other != topic])
                words = [*draw.sample(bank.split(), 5), draw.choice(TOPICS[foreign].split())]
                draw.shuffle(words)
                first, second = draw.sample(FRAMES, 2)
                note = f"{first.format(*words[:3])}. {second.format(*words[3:])}."
                prompts.add(f"{draw.choice(orders)} {note[0].upper()}{note[1:]}")
            found[f"{topic} {task}"] = [Text(prompt, prompt) for prompt in sorted(prompts)]
    return found


# Splits and features.

@dataclass(frozen=True)
class Side:
    """One side of a split, over all domains of a setting."""

    features_NLD: Tensor
    targets_N: Tensor


def place(value: str) -> float:
    return int(hashlib.sha256(value.encode()).hexdigest()[:13], 16) / 16**13


def split(texts: Sequence[Text], rows: Mapping[str, int]) -> dict[str, list[str]]:
    """At most `rows` prompts on each side, chosen by content alone; no prompt twice."""
    sides: dict[str, list[str]] = {side: [] for side in rows}
    unique = {one.prompt: one for one in texts}
    for one in sorted(unique.values(), key=lambda one: place(f"order:{one.prompt}")):
        side = next(side for side, end in SHARES.items() if place(one.key) < end)
        if len(sides[side]) < rows[side]:
            sides[side].append(one.prompt)
    return sides


def encode(base: Base, prompts: Sequence[str]) -> list[list[int]]:
    encoder = ChatEncoder(base.tokenizer, "", TOKENS)
    return [encoder.prompt([{"role": "user", "content": prompt}])[-TOKENS:] for prompt in prompts]


def sides_of(base: Base, corpora: Corpora, rows: Mapping[str, int] = ROWS) -> dict[str, dict[str, Tensor]]:
    """Features (N, L, D) by domain and side."""
    result: dict[str, dict[str, Tensor]] = {}
    for name, texts in corpora.items():
        prompts = split(texts, rows)
        key = json.dumps([base.pin.digest, base.device.dtype, base.device.device, TOKENS, "inputs", prompts])
        path = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            save_file({side: features(base.model, encode(base, those)) for side, those in prompts.items()}, path)
            print(f"features of {name}: {time.perf_counter() - start:.0f} s", flush=True)
        result[name] = load_file(path)
    return result


def stack(domains: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Side]:
    """All domains of a setting; a label is its domain's place in `domains`."""
    parts = list(domains.values())
    return {side: Side(torch.cat([part[side] for part in parts]),
                       torch.cat([torch.full((len(part[side]),), label) for label, part in enumerate(parts)]))
            for side in ROWS}


# Measurement.

def evaluate(names: Sequence[str], sides: Mapping[str, Side]) -> dict[str, Any]:
    """Accuracy, calibration and abstention on the test side, for each rule, and accuracy by level."""
    train, validation, test = (sides[side] for side in ROWS)
    start = time.perf_counter()
    trained, held = prompts_of(train), prompts_of(validation)
    fitted = train_heads(names, trained)
    figures: dict[str, Any] = {"domains": len(names), "test rows": len(test.targets_N),
                               "fit seconds": time.perf_counter() - start,
                               "train rows": len(train.targets_N), "validation rows": len(validation.targets_N),
                               "accuracy by level": by_level(fitted, test), "validation by level":
                               by_level(fitted, validation), "rules": {}}
    for rule in RULES:
        router = replace(fitted, figures={})
        choose_level(router, rule, 0.0, held)
        complete(router, trained, held, None, MAX_ABSTENTION, None)
        calibrated = router.temperature
        measured = measure(router, test) | confusion(router, test)
        router.temperature = 1.0
        figures["rules"][rule] = measured | {"level": router.reads, "temperature": calibrated,
                                             "ece at temperature 1": measure(router, test)["ece"]}
    return figures


def prompts_of(side: Side) -> Prompts:
    """The prompts of one side; each is a group."""
    return Prompts(side.features_NLD, side.targets_N, [f"{id(side)} {row}" for row in range(len(side.targets_N))])


def by_level(router: Router, side: Side) -> list[float]:
    right_NL = router.logits(side.features_NLD).argmax(-1) == side.targets_N[:, None]
    return [round(value, 4) for value in right_NL.double().mean(0).tolist()]


def confusion(router: Router, side: Side) -> dict[str, Any]:
    """The pairs (own domain, chosen one) that were confused, and accuracy when a near twin counts as right."""
    chosen = router.log_probabilities(side.features_NLD).argmax(-1)
    pairs = Counter((router.labels[own], router.labels[other])
                    for own, other in zip(side.targets_N.tolist(), chosen.tolist(), strict=True) if own != other)
    apart = sum(count for pair, count in pairs.items() if not any(set(pair) == twins for twins in TWINS))
    return {"twin accuracy": 1 - apart / len(chosen),
            "confused": {" as ".join(pair): count for pair, count in pairs.most_common(5)}}


def measure(router: Router, side: Side) -> dict[str, float]:
    best = router.probabilities(side.features_NLD).max(-1)
    correct = best.indices == side.targets_N
    abstained = torch.tensor([decision.abstained for decision in router.decide(side.features_NLD)])
    return {"accuracy": correct.double().mean().item(), "ece": expected_calibration_error(best.values, correct),
            "abstention": abstained.double().mean().item(),
            "wrong and not abstained": (~correct & ~abstained).double().mean().item()}


def cost(base: Base, corpora: Corpora, rows: Mapping[str, int], levels: Mapping[str, int], repeats: int,
         a_domain: int) -> dict[str, float]:
    """Seconds to route some test prompts under each rule, over the seconds of one prefill of the same prompts."""
    prompts = [prompt for texts in corpora.values() for prompt in split(texts, rows)["test"][:a_domain]]
    ids = encode(base, prompts)
    systems = {"prefill": lambda: timed(lambda: prefill(base, ids))} | {
        rule: lambda level=level: timed(lambda: features(base.model, ids, level + 1)) for rule, level in levels.items()}
    seconds = interleave(systems, repeats)
    return {rule: ratio(seconds[rule], seconds["prefill"]) for rule in levels}


@torch.no_grad()
def prefill(base: Base, ids: Sequence[list[int]]) -> None:
    """All layers, and logits at the last position, in the batches that the router's forward uses.

    The projection gets a contiguous copy: on a CPU in bfloat16 a strided slice, which is what transformers' own
    `logits_to_keep` passes it, took 190 times as long, more than all the layers, and would flatter the router.
    """
    rows = [(0, Encoded(prompt, [False] * len(prompt))) for prompt in ids]
    for group in microbatches(rows, FEATURE_TOKENS):
        batch = collate([rows[index] for index in group], base.device.device)
        hidden_BTD = base.model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
        base.model.get_output_embeddings()(hidden_BTD[:, -1].contiguous())


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def report(name: str, figures: Mapping[str, Any]) -> None:
    print(f"\n{name}: {figures['domains']} domains, {figures['train rows']} training, {figures['validation rows']} "
          f"validation, {figures['test rows']} test prompts; heads fitted in {figures['fit seconds']:.1f} s")
    for rule, found in figures["rules"].items():
        print(f"  {rule:<6} level {found['level']:2}  accuracy {found['accuracy']:.4f}  cost {found['cost']:.3f} of a "
              f"prefill  ECE {found['ece at temperature 1']:.4f} -> {found['ece']:.4f} (T {found['temperature']:.2f})  "
              f"abstained {found['abstention']:.4f}  wrong and not abstained {found['wrong and not abstained']:.4f}")
    print(f"  early confuses: {figures['rules']['early']['confused']}")
    shown = [f"{level}:{value:.3f}" for level, value in enumerate(figures["accuracy by level"])
             if level < 9 or level % 4 == 1]
    print("  test accuracy by level: " + " ".join(shown), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--repeats", type=int, default=5, help="of each cost")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS,
                        help="what to route among; `many` needs no corpora")
    args = parser.parse_args()
    base = real_base(pick_device())
    print(machine(base.device), flush=True)
    real = shared_corpora(args.shared) if args.settings != ["many"] else {}
    settings: dict[str, tuple[Corpora, dict[str, int], int]] = {
        "distinct": (quickstart_corpora() | real, ROWS, 4), "many": (synthetic(), MANY, 2)}
    if real:
        settings |= {"databases": (databases(real["shared sql"], prefix=True), ROWS, 8),
                     "near": (databases(real["shared sql"], prefix=False), ROWS, 8)}
    settings = {name: setting for name, setting in settings.items() if name in args.settings}
    figures: dict[str, Any] = {"machine": machine(base.device)}
    goals = []
    for name, (corpora, rows, a_domain) in settings.items():
        found = figures[name] = evaluate(list(corpora), stack(sides_of(base, corpora, rows)))
        levels = {rule: measured["level"] for rule, measured in found["rules"].items()}
        for rule, share in cost(base, corpora, rows, levels, args.repeats, a_domain).items():
            found["rules"][rule]["cost"] = share
        report(name, found)
        share = found["rules"]["early"]["cost"]
        goals.append(goal(f"{name}: cost of early routing, share of a prefill", share, COST, share <= COST))
    if "distinct" in figures:
        for name, key in (("accuracy of early routing", "accuracy"), ("the same, near twins as one", "twin accuracy")):
            accuracy = figures["distinct"]["rules"]["early"][key]
            goals.append(goal(f"distinct: {name}", accuracy, DISTINCT, accuracy >= DISTINCT))
    finish("routing", figures, goals)


if __name__ == "__main__":
    main()
