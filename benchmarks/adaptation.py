"""A new domain is learned quickly from a related expert, and adding it costs its own training and little more.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/adaptation.py [--shared DIR] [--domains 4 16 32]

1. Warm or cold. Experts of `PARENTS` are trained; then, side by side with the same rows, order and schedule, experts of
   small new domains (databases of sql.jsonl), one afresh and one from each parent. They are validated every few steps:
   after how many does a warm start have the best loss that the cold one ever gets? And where does what the rule of
   `moa parent` chooses end?
2. Growth. One more domain for a mixture of N: choice of the parent, start, training, router and mixture, DVC. The base,
   the newcomer's corpus, its training and its router features are real; the N others have toy experts, copies of one of
   random numbers, and random router features, which only lie in the cache. Every step is moa's own and loads the base
   itself. Evaluation is left out: it answers the test rows of every domain whatever is new. Seconds are of one CPU, all
   processes together, so that a busy machine counts little.

The last line is one JSON object. Losses are nats per completion token.
"""

import argparse
import json
import re
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import REPOSITORY, finish, goal, machine, pick_device
from real import REAL, real_base, real_workspace
from ruamel.yaml import YAML

from moa.base.encoding import ChatEncoder, Encoded
from moa.base.load import Base, load_tokenizer
from moa.core import config, digests
from moa.core.config import AdaptParams, TrainParams
from moa.core.files import write_json
from moa.core.paths import MANIFEST, Workspace
from moa.data import corpus, prepare
from moa.data.quickstart import generate
from moa.experts import peft_format, train
from moa.experts.cotraining import Learner, cotrain, seed_for
from moa.experts.lora import ExpertStack, LoraSpec
from moa.mixture import assemble as assembling
from moa.mixture import parent_selection, router
from moa.workspace import warm_starts
from moa.workspace.data_versions import DataVersions
from moa.workspace.dvc_repository import initialise

PARENTS = ("geography", "scholar", "math")
PAIRS = (("geography", "imdb", "related"), ("scholar", "yelp", "related"), ("math", "imdb", "unrelated"))
LONGEST, VALIDATION = 140, 8        # tokens of a row; validation rows of a domain
PARENT_ROWS = 48                     # once
ROWS, EVERY, VALIDATIONS = 48, 3, 6  # of a new domain; steps between two validations
TRAIN = TrainParams(batch_rows=4, learning_rate=2e-3, validation_rows=VALIDATION)
SPEC = LoraSpec(TRAIN.rank, TRAIN.alpha)
FEWER_STEPS, OVERHEAD = 0.7, 0.1     # goals
NEW = "calendar"


# 1. Warm or cold.

def content(shared: Path, encoder: ChatEncoder) -> dict[str, dict[str, list[Encoded]]]:
    """Rows by domain and split, in the order of their digests; rows of one answer but for its constants on one side."""
    names = {*PARENTS, *(child for _, child, _ in PAIRS)}
    found: dict[str, dict[str, list[Encoded]]] = {name: {"train": [], "validation": []} for name in names}
    for source in ("math", "sql"):
        lines = (shared / f"{source}.jsonl").read_text(encoding="utf-8").split("\n")
        for record in sorted((json.loads(line) for line in lines if line), key=digests.of_json):
            asked, answer = record["instruction"], record["output"]
            head, _, rest = asked.partition(". ")
            name, asked = (source, asked) if source == "math" else (head.removeprefix("Database "), rest)
            if name in names and len(found[name]["train"]) < max(ROWS, PARENT_ROWS):
                row = encoder.row([{"role": "user", "content": asked}, {"role": "assistant", "content": answer}])
                key = digests.of_bytes(re.sub(r"\"[^\"]*\"|'[^']*'|\d+", "?", answer).encode())
                if len(row.ids) <= LONGEST:
                    found[name]["validation" if int(key[:8], 16) < 0.25 * 16**8 else "train"].append(row)
    return found


def trained(base: Base, jobs: dict[str, tuple[dict[str, list[Encoded]], TrainParams, torch.Tensor | None]],
            count: int) -> tuple[dict[str, Learner], dict[str, torch.Tensor]]:
    """Co-train a learner for each job (rows, parameters, weights to begin at); learners and weights by name."""
    stack = ExpertStack(base.model, [SPEC] * len(jobs)).trainable(True)
    learners = []
    for expert, (name, (found, params, begin)) in enumerate(jobs.items()):
        stack.initialise(expert, seed_for("any", 0))   # the same for all
        if begin is not None:
            stack.weights[expert] = begin
        learner = Learner(name, expert, stack, found["train"][:count], found["validation"], params,
                          warm=begin is not None)
        learners.append(learner)
    began = time.perf_counter()
    cotrain(base.model, stack, learners, TRAIN.batch_tokens)
    tokens = sum(learner.progress.seen_tokens for learner in learners)
    print(f"{', '.join(jobs)}: {tokens} tokens in {time.perf_counter() - began:.0f} s", flush=True)
    stack.remove()
    return ({learner.name: learner for learner in learners},
            {learner.name: stack.weights[learner.expert].detach().clone() for learner in learners})


def tried(base: Base, begin: torch.Tensor, validation: Sequence[Encoded]) -> dict[str, Any]:
    """What `moa parent` would say of one candidate."""
    stack = ExpertStack(base.model, [SPEC])
    stack.weights[0] = begin
    adapt = AdaptParams()
    losses = parent_selection.losses(base, stack, 1, validation[:adapt.candidate_rows])
    stack.remove()
    return parent_selection.choose([{"parent": None, "loss": losses[0]}, {"parent": "it", "loss": losses[1]}],
                                   adapt.candidate_gain) | {"base": losses[0], "candidate": losses[1]}


def warm_or_cold(shared: Path) -> tuple[dict[str, Any], list[dict[str, object]]]:
    base = real_base(pick_device())
    found = content(shared, ChatEncoder(base.tokenizer, "", LONGEST))
    short = TRAIN.model_copy(update={"epochs": 1})
    _, weights = trained(base, {name: (found[name], short, None) for name in PARENTS}, PARENT_ROWS)
    often = TRAIN.model_copy(update={"epochs": VALIDATIONS, "rows_per_epoch": EVERY * TRAIN.batch_rows})
    jobs = {f"cold {child}": (found[child], often, None) for child in sorted({child for _, child, _ in PAIRS})}
    jobs |= {f"{name} to {child}": (found[child], often, weights[name]) for name, child, _ in PAIRS}
    learners, _ = trained(base, jobs, ROWS)
    figures = {}
    for name, child, kind in PAIRS:
        cold, warm = learners[f"cold {child}"].progress, learners[f"{name} to {child}"].progress
        best = min(cold.curve, key=lambda point: point["validation_loss"])
        reached = next((point["step"] for point in warm.curve if point["validation_loss"] <= cold.best_loss), None)
        rule = tried(base, weights[name], found[child]["validation"])
        figures[f"{name} to {child}"] = {
            "kind": kind, "cold": [point["validation_loss"] for point in cold.curve],
            "warm": [point["validation_loss"] for point in warm.curve], "cold steps": best["step"],
            "warm steps": reached, "share": None if reached is None else reached / best["step"],
            "cold end": cold.best_loss, "warm end": warm.best_loss, "rule": rule,
            "chosen end": warm.best_loss if rule["chosen"] else cold.best_loss}
    return figures, judged(figures)


def judged(figures: dict[str, Any]) -> list[dict[str, object]]:
    for pair, one in figures.items():
        steps = "never" if one["warm steps"] is None else f"{one['warm steps']:.0f}"
        print(f"{pair} ({one['kind']}): cold best {one['cold end']:.3f} after {one['cold steps']:.0f} steps, warm "
              f"there after {steps}; ends: cold {one['cold end']:.3f}, warm {one['warm end']:.3f}, the rule's "
              f"{one['chosen end']:.3f} (base {one['rule']['base']:.3f}, candidate {one['rule']['candidate']:.3f})")
        print("  cold " + " ".join(f"{loss:.3f}" for loss in one["cold"]))
        print("  warm " + " ".join(f"{loss:.3f}" for loss in one["warm"]), flush=True)
    shares = [one["share"] for one in figures.values() if one["kind"] == "related" and one["share"] is not None]
    best = min(shares, default=1.0)
    worst = max(one["chosen end"] - one["cold end"] for one in figures.values())
    return [goal("warm start: steps to the cold start's best loss, best related pair", best, FEWER_STEPS,
                 best <= FEWER_STEPS),
            goal("rule: its end minus the cold end, worst pair, nats", worst, 0.0, worst <= 0)]


# 2. Growth.

def growth(counts: Sequence[int], rows_per_epoch: int | None) -> tuple[dict[str, Any], list[dict[str, object]]]:
    """Each number of domains has the same workspace, with more of them in params.yaml."""
    figures, goals, training = {}, [], {}
    with tempfile.TemporaryDirectory() as folder:
        workspace = furnished(Path(folder), max(counts), rows_per_epoch)
        for count in counts:
            one = figures[str(count)] = added(workspace, count, training)
            print(f"{count} + 1 domains: " + ", ".join(f"{step} {seconds:.1f} s" for step, seconds
                                                       in one["cpu seconds"].items())
                  + f"; {one['steps']} steps; all but training {one['share']:.1%} of it", flush=True)
            goals.append(goal(f"{count} domains and one: all but its training, share of its training", one["share"],
                              OVERHEAD, one["share"] < OVERHEAD))
    return figures, goals


def names(count: int) -> list[str]:
    return [f"d{number:02}" for number in range(count)]


def write_params(workspace: Workspace, domains: Sequence[str], rows_per_epoch: int | None) -> config.Config:
    groups = {"base": {"source": REAL.source}, "prompt": {"system": "", "max_tokens": 1024}, "quickstart": [],
              "domains": {name: {"metric": "exact"} for name in domains}, "prepare": {}, "assemble": {}, "evaluate": {},
              "train": {"epochs": 2, "warm_patience": 0, "rows_per_epoch": rows_per_epoch, "batch_rows": 4,
                        "learning_rate": 0.002}}
    with workspace.params.open("w", encoding="utf-8") as file:
        YAML().dump(groups, file)
    return config.load(workspace.params)


def furnished(root: Path, count: int, rows_per_epoch: int | None) -> Workspace:
    """A workspace with the real base, `count` toy domains with experts, and the newcomer's rows, all under DVC."""
    workspace, real = Workspace(root), real_workspace()
    shutil.copytree(real.base, workspace.base)
    shutil.copyfile(real.base_manifest, workspace.base_manifest)
    shutil.copyfile(REPOSITORY / "dvc.yaml", root / "dvc.yaml")
    subprocess.run(["git", "init", "-q", root], check=True)
    initialise(root)
    settings = write_params(workspace, [*names(count), NEW], rows_per_epoch)
    generate.write(NEW, workspace.raw(NEW))
    for number, name in enumerate(names(count)):
        workspace.raw(name).mkdir(parents=True)
        lines = [json.dumps({"instruction": f"{name}: what follows {word}?", "output": f"{word + number}"})
                 for word in range(1000 * number, 1000 * number + 80)]
        (workspace.raw(name) / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    toy_experts(workspace, settings, names(count))
    return workspace


def toy_experts(workspace: Workspace, settings: config.Config, domains: Sequence[str]) -> None:
    base = real_base(pick_device())
    stack = ExpertStack(base.model, [SPEC])
    stack.initialise(0, 0)
    for layer in stack.layers.values():
        part = layer.b_EOR.detach()[0]
        part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(0)) * 1e-3)
    near = settings.model_copy(update={"prepare": settings.prepare.model_copy(update={"near_duplicate": 0.0})})
    for name in [*domains, NEW]:
        counted = prepare.prepare(workspace, near, name)
        if name == NEW:
            continue
        folder = workspace.expert(name)
        peft_format.save(stack, 0, folder, base.pin.source)
        write_json(folder / MANIFEST, {
            "kind": "expert", "domain": name, "digest": digests.of_expert(folder), "corpus": counted["digest"],
            "base": {key: getattr(base.pin, key) for key in ("source", "weights", "tokenizer", "template", "digest")},
            "rank": SPEC.rank, "alpha": SPEC.alpha})
    stack.remove()


@contextmanager
def random_features(workspace: Workspace) -> Iterator[None]:
    """Inside, features cost nothing: each prompt's are random, around a centre of its domain."""
    real, mark = router.features, load_tokenizer(workspace)(" what")["input_ids"][0]

    def drawn(model: Any, prompts: Sequence[list[int]], *_: Any) -> torch.Tensor:
        shape = model.config.num_hidden_layers, model.config.hidden_size
        seeds = [int(digests.of_json(prompt)[:12], 16) for prompt in prompts]
        domain = digests.of_json(prompts[0][:prompts[0].index(mark)])
        centre = torch.randn(shape, generator=torch.Generator().manual_seed(int(domain[:12], 16)))
        return torch.stack([centre + torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                            for seed in seeds])

    router.features = drawn
    try:
        yield
    finally:
        router.features = real


def added(workspace: Workspace, count: int, training: dict[str, float]) -> dict[str, Any]:
    """What one more domain costs a mixture of `count`, step by step. Its training is measured once, into `training`:
    the others find its expert finished, because nothing of them has a part in its fingerprint."""
    rows_per_epoch = config.load(workspace.params).train.rows_per_epoch
    settings = write_params(workspace, names(count), rows_per_epoch)
    with random_features(workspace):   # into the cache
        assembling.assemble(workspace, settings)
    versions = DataVersions(workspace)
    versions.snapshot()
    versions.record(["base", *(f"{step}@{name}" for step in ("prepare", "train") for name in names(count)), "assemble"])
    settings = write_params(workspace, [*names(count), NEW], rows_per_epoch)
    seconds: dict[str, float] = {}
    with clock(seconds, "choice"):
        found = parent_selection.candidates(workspace, settings, NEW)
    with clock(seconds, "start"):
        warm_starts.use(versions, NEW, found["chosen"] or names(1)[0])   # a toy knows nothing
    with clock(seconds, "DVC"):
        versions.snapshot()
    if not training:
        with clock(training, "training"):
            train.train(workspace, settings, [NEW])
    assert train.finished(workspace, settings, NEW)
    cached = set((workspace.cache / "features").iterdir())
    with clock(seconds, "router and mixture"):
        assembling.assemble(workspace, settings)
    for path in set((workspace.cache / "features").iterdir()) - cached:   # the newcomer's: new to the next N, too
        path.unlink()
    with clock(seconds, "DVC"):
        versions.record([f"prepare@{NEW}", f"train@{NEW}", "assemble"])
        versions.snapshot()
    curve = json.loads((workspace.expert(NEW) / MANIFEST).read_text())["curve"]
    warm_starts.forget(versions, [NEW])
    warm_starts.prune(versions)
    return {"cpu seconds": training | seconds, "steps": curve[-1]["step"], "tokens": curve[-1]["tokens"],
            "rows": len(corpus.read(workspace.corpus(NEW), "train")), "table": found["table"],
            "share": sum(seconds.values()) / training["training"]}


@contextmanager
def clock(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Adds the CPU time of this process and of its children."""
    def now() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    began = now()
    yield
    seconds[step] = seconds.get(step, 0.0) + now() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--domains", type=int, nargs="*", default=[4, 16, 32], help="N; none leaves part 2 out")
    parser.add_argument("--rows-per-epoch", type=int, help="of the newcomer's training in part 2; all by default")
    parser.add_argument("--pairs", action=argparse.BooleanOptionalAction, default=True, help="part 1")
    args = parser.parse_args()
    print(facts := machine(pick_device()), flush=True)
    figures: dict[str, Any] = {"machine": facts}
    goals: list[dict[str, object]] = []
    if args.pairs and (args.shared / "sql.jsonl").is_file():
        figures["pairs"], found = warm_or_cold(args.shared)
        goals += found
    elif args.pairs:
        print(f"No sql.jsonl in {args.shared}: going on without the real corpora; name their folder by --shared.")
    if args.domains:
        figures["growth"], found = growth(args.domains, args.rows_per_epoch)
        goals += found
    finish("adaptation", figures, goals)


if __name__ == "__main__":
    main()
