"""The comparison of Feng et al. 2024 (arXiv 2403.03432) on math, code, sql and medicine: is a mixture worth it?

    .venv/bin/python benchmarks/paper.py [--rows 48] [--shared DIR] [--device cuda --rows 1600]

Every system sees the same training rows, twice, in the same number of optimizer steps:

    base                 nothing trained
    one LoRA, rank r     the mixed rows; parameters of one expert
    one LoRA, rank 4r    the mixed rows; parameters of all experts together
    single LoRAs         one expert a domain, the true label chooses
    mixture              the same experts; the router on the base's features chooses (last, vote, early)
    learned routing      one pass alone, one pass jointly without labels: each layer blends the experts (as in training)
    random experts       both passes jointly, from random initialisation, with labels (last, vote, early)
    joint training       one pass alone, one pass jointly with labels (last, vote, early)

A step takes `batch_rows` rows of each domain; "one LoRA" takes them all into one update. Rows of one answer (for SQL,
of one query but for its constants) are on one side. Figures are on held-out rows: perplexity over completion tokens,
corpus BLEU, ROUGE-L, exact match (math: final number; sql: the query; medicine: the decision), and the paired
bootstrap interval of the loss against "one LoRA, rank 4r". The last line is one JSON object.
"""

import argparse
import json
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import REPOSITORY, finish, goal, interval, machine, pick_device
from real import real_base

from moa.base.encoding import ChatEncoder, Encoded
from moa.base.load import Base
from moa.core import digests
from moa.core.config import TrainParams
from moa.evaluation import metrics
from moa.experts.batches import collate, microbatches, row_losses
from moa.experts.cotraining import Learner, cotrain, seed_for
from moa.experts.lora import ExpertStack, LoraSpec
from moa.mixture.calibration import Prompts, choose_level, complete, train_heads
from moa.mixture.generation import engine
from moa.mixture.joint_training import forget_labels, train_jointly
from moa.mixture.layer_routing import Heads, layer_routing, layer_selector, prompt_mask
from moa.mixture.router import Router, features

DOMAINS = ("math", "code", "sql", "medicine")
RULES = ("last", "vote", "early")
LONGEST = 320            # tokens of a row: medicine's abstracts are the longest, and most are longer
ANSWER = {"math": 160, "code": 128, "sql": 160, "medicine": 96}   # new tokens, of about the 90th percentile
VALIDATION, TEST = 24, 32


@dataclass(frozen=True)
class Row:
    domain: str
    question: str
    reference: str
    prompt: list[int]
    encoded: Encoded


@dataclass(frozen=True)
class Lab:
    """What all systems share."""

    base: Base
    rows: dict[str, dict[str, list[Row]]]   # by split, then domain
    params: TrainParams
    answered: int                           # test rows of a domain that are answered

    @property
    def test(self) -> list[Row]:
        return [row for domain in DOMAINS for row in self.rows["test"][domain]]


# Rows.

def corpora(shared: Path, encoder: ChatEncoder, count: int) -> dict[str, dict[str, list[Row]]]:
    """`count` training rows a domain, and held-out ones, in the order of their digests."""
    sizes = {"test": TEST, "validation": VALIDATION, "train": count}
    found: dict[str, dict[str, list[Row]]] = {split: {domain: [] for domain in DOMAINS} for split in sizes}
    for domain in DOMAINS:
        lines = (shared / f"{domain}.jsonl").read_text(encoding="utf-8").split("\n")
        for record in sorted((json.loads(line) for line in lines if line), key=digests.of_json):
            split = side(domain, record["output"])
            if len(found[split][domain]) == sizes[split]:
                continue
            asked = [{"role": "user", "content": record["instruction"]}]
            encoded = encoder.row([*asked, {"role": "assistant", "content": record["output"]}])
            if len(encoded.ids) <= LONGEST:
                found[split][domain].append(Row(domain, record["instruction"], record["output"],
                                                encoder.prompt(asked), encoded))
    return found


def side(domain: str, answer: str) -> str:
    """The split of every row with this answer; SQL queries that differ in their constants alone count as one."""
    if domain == "sql":
        answer = re.sub(r"\"[^\"]*\"|'[^']*'|\d+", "?", answer)
    place = int(digests.of_bytes(answer.encode())[:8], 16) / 16**8
    return "test" if place < 0.15 else "validation" if place < 0.3 else "train"


def exact(domain: str, answer: str, row: Row) -> float | None:
    """Exact match where the domain defines it."""
    if domain == "math":
        return metrics.final_number(answer, row.reference, "")
    if domain == "sql":
        return metrics.exact(answer, row.reference, "")
    if domain == "medicine":
        found, wanted = (re.findall(r"Answer:\s*(\w+)", text) for text in (answer, row.reference))
        return float(bool(found) and found[-1].lower() == wanted[-1].lower())
    return None


# Training. Experts travel between stacks as rows of `stack.weights`: same ranks and targets, same layout.

def alone(lab: Lab, jobs: dict[str, tuple[Sequence[str], int]], rank: int) -> dict[str, torch.Tensor]:
    """Co-train one adapter a job, (domains whose rows it sees, epochs), and return their weights."""
    stack = ExpertStack(lab.base.model, [LoraSpec(rank, 2.0 * rank)] * len(jobs)).trainable(True)
    learners = []
    for expert, (name, (domains, epochs)) in enumerate(jobs.items()):
        stack.initialise(expert, seed_for(domains[0], 0))
        params = lab.params.model_copy(update={"epochs": epochs, "batch_rows": lab.params.batch_rows * len(domains),
                                               "validation_rows": VALIDATION * len(domains)})
        learners.append(Learner(name, expert, stack, *_encoded(lab, domains), params))
    cotrain(lab.base.model, stack, learners, lab.params.batch_tokens, said(learners))
    report_curves(learners)
    stack.remove()
    return {learner.name: stack.weights[learner.expert].detach().clone() for learner in learners}


def jointly(lab: Lab, router: Router, start: Sequence[torch.Tensor] | None, epochs: int, rank: int,
            eta: float) -> tuple[list[torch.Tensor], Router]:
    """Train one expert a domain and the heads together; from `start`, or from random initialisation."""
    stack = stacked(lab, start or [], rank, count=len(DOMAINS))
    if start is None:
        for expert, domain in enumerate(DOMAINS):
            stack.initialise(expert, seed_for(domain, 0))
    stack.trainable(True)
    params = lab.params.model_copy(update={"epochs": epochs})
    learners = [Learner(domain, expert, stack, *_encoded(lab, [domain]), params)
                for expert, domain in enumerate(DOMAINS)]
    router = replace(router)
    if not eta:
        forget_labels(router)
    train_jointly(lab.base.model, stack, router, learners, params, eta, said(learners), keep_start=start is not None)
    report_curves(learners)
    stack.remove()
    return [stack.weights[expert].detach().clone() for expert in range(len(DOMAINS))], router


def _encoded(lab: Lab, domains: Sequence[str]) -> tuple[list[Encoded], list[Encoded]]:
    return tuple([row.encoded for domain in domains for row in lab.rows[split][domain]]   # type: ignore[return-value]
                 for split in ("train", "validation"))


def stacked(lab: Lab, weights: Sequence[torch.Tensor], rank: int, count: int | None = None) -> ExpertStack:
    stack = ExpertStack(lab.base.model, [LoraSpec(rank, 2.0 * rank)] * (count or len(weights)))
    with torch.no_grad():
        for expert, row in enumerate(weights):
            stack.weights[expert].copy_(row)
    stack.changed()
    return stack


def said(learners: Sequence[Learner]) -> Any:
    begun = time.monotonic()

    def after_step(_: Any) -> None:
        step, steps = (sum(values) for values in zip(*((one.progress.step, len(one.order)) for one in learners),
                                                     strict=True))
        print(f"  {step}/{steps} steps, {time.monotonic() - begun:.0f} s", end="\r", file=sys.stderr, flush=True)

    return after_step


def report_curves(learners: Sequence[Learner]) -> None:
    print("  " + "; ".join(f"{one.name} " + " ".join(f"{point['validation_loss']:.3f}" for point in one.progress.curve)
                           for one in learners), file=sys.stderr, flush=True)


# Answering.

Scored = dict[tuple[int, int], tuple[float, str | None]]   # (test row, expert) -> nats a token, answer


@torch.no_grad()
def score(lab: Lab, stack: ExpertStack | None, wanted: Sequence[tuple[int, int]],
          blend: Heads | None = None) -> Scored:
    """Loss of each wanted (test row, expert), -1 for the base, and the answer where the row is one to be answered."""
    test, model = lab.test, lab.base.model
    rows = [(max(expert, 0), test[index].encoded) for index, expert in wanted]
    losses = [0.0] * len(rows)
    for group in microbatches(rows, 1536):
        batch = collate([rows[place] for place in group], lab.base.device.device)
        chosen = torch.tensor([wanted[place][1] for place in group], device=batch.ids.device)
        with using(lab, stack, chosen, blend, prompt_mask(batch)):
            for place, loss in zip(group, row_losses(model, batch).tolist(), strict=True):
                losses[place] = loss / rows[place][1].completion_tokens
    answers: dict[int, str] = {}
    for domain in DOMAINS:
        first = {id(row) for row in lab.rows["test"][domain][:lab.answered]}
        places = [place for place, (index, _) in enumerate(wanted) if id(test[index]) in first]
        prompts = [test[wanted[place][0]].prompt for place in places]
        if prompts:
            longest = max(map(len, prompts))
            mask = torch.tensor([[column >= longest - len(prompt) for column in range(longest)] for prompt in prompts])
            chosen = torch.tensor([wanted[place][1] for place in places], device=lab.base.device.device)
            with using(lab, stack, chosen, blend, mask.to(chosen.device)):
                written = engine.decode(model, lab.base.tokenizer, prompts, ANSWER[domain], engine.GenerationConfig())
            answers |= {place: row.text.strip() for place, row in zip(places, written, strict=True)}
    return {pair: (losses[place], answers.get(place)) for place, pair in enumerate(wanted)}


@contextmanager
def using(lab: Lab, stack: ExpertStack | None, experts: torch.Tensor, blend: Heads | None,
          prompts: torch.Tensor) -> Iterator[None]:
    if stack is None:
        yield
    elif blend is not None:
        with layer_routing(lab.base.model, stack, blend, prompts, "blend"):
            yield
        stack.select(None)
    else:
        stack.select(experts)
        yield
        stack.select(None)


# Systems.

Result = list[tuple[float, str | None]]   # of every test row


def labelled_prompts(features_NLD: torch.Tensor, targets_N: torch.Tensor) -> Prompts:
    """Prompts of which each is a group."""
    return Prompts(features_NLD, targets_N, [str(row) for row in range(len(targets_N))])


def labelled(lab: Lab, weights: Sequence[torch.Tensor], rank: int, router: Router,
             name: str) -> tuple[dict[str, Result], dict[str, float]]:
    """The experts under the true label and under each rule of their router; and the rules' accuracy."""
    stack = stacked(lab, weights, rank)
    choose = layer_selector(stack, router)
    seen = {split: features(lab.base.model, [row.prompt for domain in DOMAINS for row in lab.rows[split][domain]],
                            choose=choose) for split in ("train", "validation", "test")}
    stack.select(None)
    targets = {split: torch.tensor([place for place, domain in enumerate(DOMAINS) for _ in lab.rows[split][domain]])
               for split in seen}
    choices = {"true label": targets["test"].tolist()}
    for rule in RULES:
        ruled = replace(router, figures={})
        train, validation = (labelled_prompts(seen[split], targets[split]) for split in ("train", "validation"))
        choose_level(ruled, rule, 0.0, validation)
        complete(ruled, train, validation, None, None, None)
        decisions = ruled.decide(seen["test"][:, :ruled.depth])   # the best guess, whether or not it would abstain
        choices[rule] = [DOMAINS.index(decision.domain) for decision in decisions]
    pairs = sorted({(index, expert) for chosen in choices.values() for index, expert in enumerate(chosen)})
    scored = score(lab, stack, pairs)
    stack.remove()
    accuracy = {f"{name}, {rule}": sum(map(int.__eq__, chosen, choices["true label"])) / len(chosen)
                for rule, chosen in choices.items() if rule != "true label"}
    return {f"{name}, {rule}": [scored[index, expert] for index, expert in enumerate(chosen)]
            for rule, chosen in choices.items()}, accuracy


def systems(lab: Lab, rank: int) -> tuple[dict[str, Result], dict[str, float]]:
    """Train and score everything; results of every system by name, and accuracy of every routed one."""
    everyone = [(index, 0) for index in range(len(lab.test))]
    results: dict[str, Result] = {}

    def unrouted(name: str, stack: ExpertStack | None, blend: Heads | None = None) -> None:
        results[name] = list(score(lab, stack, everyone, blend).values())
        if stack is not None:
            stack.remove()

    tell("base")
    unrouted("base", None)
    tell("single LoRAs for two passes and for one, one LoRA of the same rank: co-trained")
    trained = alone(lab, {**{domain: ((domain,), 2) for domain in DOMAINS},
                          **{f"{domain}/half": ((domain,), 1) for domain in DOMAINS}, "mixed": (DOMAINS, 2)}, rank)
    halves = [trained[f"{domain}/half"] for domain in DOMAINS]
    unrouted("one LoRA, rank r", stacked(lab, [trained["mixed"]], rank))
    tell("one LoRA with the parameters of all")
    large = rank * len(DOMAINS)
    unrouted("one LoRA, rank 4r", stacked(lab, [alone(lab, {"mixed": (DOMAINS, 2)}, large)["mixed"]], large))
    tell("mixture")
    prompts = [row.prompt for domain in DOMAINS for row in lab.rows["train"][domain]]
    targets = torch.tensor([place for place, domain in enumerate(DOMAINS) for _ in lab.rows["train"][domain]])
    router = train_heads(DOMAINS, labelled_prompts(features(lab.base.model, prompts), targets))
    scored, accuracy = labelled(lab, [trained[domain] for domain in DOMAINS], rank, router, "mixture")
    results |= {name.replace("mixture, true label", "single LoRAs, true label"): of for name, of in scored.items()}
    for name, start, epochs in (("joint training", halves, 1), ("random experts", None, 2)):
        tell(name)
        weights, heads = jointly(lab, router, start, epochs, rank, eta=1.0)
        scored, right = labelled(lab, weights, rank, heads, name)
        results |= scored
        accuracy |= right
    tell("learned routing")
    weights, heads = jointly(lab, router, halves, 1, rank, eta=0.0)
    unrouted("learned routing", stacked(lab, weights, rank), Heads(heads).to(lab.base.device.device))
    accuracy["learned routing"] = unlabelled_accuracy(lab, weights, rank, heads)
    return results, accuracy


def unlabelled_accuracy(lab: Lab, weights: Sequence[torch.Tensor], rank: int, router: Router) -> float:
    """How often the last layer's learned head likes the expert best that began as the domain's own."""
    stack = stacked(lab, weights, rank)
    seen = features(lab.base.model, [row.prompt for row in lab.test], choose=layer_selector(stack, router))
    stack.remove()
    guesses = router.logits(seen)[:, -1].argmax(-1).tolist()
    right = sum(DOMAINS[guess] == row.domain for guess, row in zip(guesses, lab.test, strict=True))
    return right / len(guesses)


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# Figures.

def figures(lab: Lab, results: dict[str, Result], against: str) -> dict[str, dict[str, dict[str, Any]]]:
    """By system and domain."""
    table: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    test = lab.test
    for name, result in results.items():
        for domain in DOMAINS:
            mine = [index for index, row in enumerate(test) if row.domain == domain]
            tokens = [test[index].encoded.completion_tokens for index in mine]
            loss = sum(result[index][0] * count for index, count in zip(mine, tokens, strict=True)) / sum(tokens)
            said = [(str(result[index][1]), test[index]) for index in mine if result[index][1] is not None]
            texts, references = [text for text, _ in said], [row.reference for _, row in said]
            matches = [exact(domain, text, row) for text, row in said]
            difference = [result[index][0] - results[against][index][0] for index in mine]
            table[name][domain] = {
                "loss": loss, "perplexity": math.exp(loss), "bleu": metrics.bleu(texts, references),
                "rouge_l": metrics.rouge_l_mean(texts, references),
                "exact": None if None in matches else sum(matches) / len(matches),   # type: ignore[arg-type]
                "loss minus one LoRA, rank 4r": interval(difference)}
    return dict(table)


def show(table: dict[str, dict[str, dict[str, Any]]], accuracy: dict[str, float]) -> None:
    print("| system | domain | perplexity | BLEU | ROUGE-L | exact | loss against one LoRA, rank 4r | routing |")
    print("|---" * 8 + "|")
    for name, domains in table.items():
        for domain, each in domains.items():
            low, high = each["loss minus one LoRA, rank 4r"]
            matched = "" if each["exact"] is None else f"{each['exact']:.3f}"
            routed = f"{accuracy[name]:.1%}" if name in accuracy and domain == DOMAINS[0] else ""
            label = name if domain == DOMAINS[0] else ""
            print(f"| {label} | {domain} | {each['perplexity']:.3f} | {each['bleu']:.1f} | {each['rouge_l']:.3f} "
                  f"| {matched} | [{low:+.3f}, {high:+.3f}] | {routed} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=48, help="training rows a domain; each is seen twice")
    parser.add_argument("--answered", type=int, default=16, help="test rows a domain that are answered")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="also write the table's figures here, as JSON")
    arguments = parser.parse_args()
    if missing := [domain for domain in DOMAINS if not (arguments.shared / f"{domain}.jsonl").is_file()]:
        sys.exit(f"{arguments.shared} has no {missing[0]}.jsonl; name the folder of the four corpora with --shared.")
    begun = time.monotonic()
    base = real_base(pick_device(arguments.device))
    rows = corpora(arguments.shared, ChatEncoder(base.tokenizer, "", LONGEST), arguments.rows)
    lab = Lab(base, rows, TrainParams(rank=arguments.rank, batch_rows=4, learning_rate=2e-3, validation_rows=VALIDATION,
                                      batch_tokens=1024 if base.device.device == "cpu" else 16384), arguments.answered)
    tell(str({split: {domain: len(of) for domain, of in domains.items()} for split, domains in rows.items()}))
    results, accuracy = systems(lab, arguments.rank)
    table = figures(lab, results, "one LoRA, rank 4r")
    minutes = (time.monotonic() - begun) / 60
    show(table, accuracy)
    mean = {name: sum(each["loss"] for each in domains.values()) / len(DOMAINS) for name, domains in table.items()}
    true, mixture, one = (mean[name] for name in ("single LoRAs, true label", "mixture, early", "one LoRA, rank 4r"))
    joint = mean["joint training, vote"]
    goals = [goal("minutes", minutes, 90, minutes <= 90),
             goal("mean loss, mixture (early) - true label", mixture - true, 0.02, mixture - true <= 0.02),
             goal("mean loss, mixture (early) - one LoRA of as many parameters", mixture - one, 0.0, mixture < one),
             goal("mean loss, joint training (vote) - mixture (early)", joint - mixture, 0.0, joint < mixture)]
    found = {"machine": machine(base.device), "rows": arguments.rows, "answered": arguments.answered,
             "minutes": minutes, "mean loss": mean, "routing accuracy": accuracy, "systems": table}
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2), encoding="utf-8")
    finish("paper", found, goals)


if __name__ == "__main__":
    main()
