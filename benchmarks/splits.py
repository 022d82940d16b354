"""What a split that ignores paraphrases hides, on rows in which many questions share an answer.

    .venv/bin/python benchmarks/splits.py [--shared DIR] [--rows 240]

Reads sql.jsonl twice through `prepare`: each row alone (`group_by: none`, near-duplicates kept: the naive split), and
moa's own split. For both, how many test rows have their answer, their query (the answer but for its constants), or a
near-duplicate among the training rows. Then one expert is trained on rows of the naive split and scored on test rows
whose query it has seen, and on the others: the difference is what the leak pretends. The last line is one JSON object.
"""

import argparse
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import REPOSITORY, finish, goal, machine, pick_device
from real import real_base, real_workspace

from moa.base.encoding import ChatEncoder
from moa.core.config import BaseParams, Config, Domain, PrepareParams, TrainParams
from moa.core.paths import Workspace
from moa.data import corpus, near_duplicates, prepare
from moa.experts.batches import collate, microbatches
from moa.experts.cotraining import Learner, cotrain, domain_forward, seed_for
from moa.experts.lora import ExpertStack, LoraSpec

SOURCE = "sql.jsonl"
NEAR = 0.9


def prepared(root: Path, source: Path, name: str, domain: Domain, near: float) -> dict[str, list[corpus.Row]]:
    """The splits of one way to prepare `source`."""
    workspace = Workspace(root / name)
    workspace.raw(name).mkdir(parents=True)
    shutil.copyfile(source, workspace.raw(name) / SOURCE)
    base = real_workspace()
    workspace.base_manifest.parent.mkdir(parents=True)
    shutil.copyfile(base.base_manifest, workspace.base_manifest)
    workspace.base.symlink_to(base.base)
    config = Config(base=BaseParams(source="path:none"), domains={name: domain},
                    prepare=PrepareParams(near_duplicate=near))
    counted = prepare.prepare(workspace, config, name)["rows"]
    print(f"{name}: {counted}", flush=True)
    return {split: corpus.read(workspace.corpus(name), split) for split in corpus.SPLITS}


def answer(row: corpus.Row) -> str:
    return " ".join(row.reference.lower().split())


def query(row: corpus.Row) -> str:
    """The answer but for its constants."""
    return re.sub(r"\"[^\"]*\"|'[^']*'|[\d.]+", "?", answer(row))


def leaks(splits: dict[str, list[corpus.Row]]) -> dict[str, float]:
    """Shares of test rows with their answer, or with a near-duplicate, in training."""
    train, test = splits["train"], splits["test"]
    seen, queries = {answer(row) for row in train}, {query(row) for row in train}
    texts = [" ".join(message["content"] for message in row.messages) for row in [*train, *test]]
    near = {j for i, j, _ in near_duplicates.pairs(texts, NEAR) if i < len(train) <= j}
    return {"same answer": sum(answer(row) in seen for row in test) / len(test),
            "same query": sum(query(row) in queries for row in test) / len(test),
            "near-duplicate": len(near) / len(test), "test rows": len(test)}


def pretended(splits: dict[str, list[corpus.Row]], count: int) -> dict[str, Any]:
    """Losses (nats a token) of base and expert on test rows, by whether the expert has seen their query."""
    base = real_base(pick_device())
    encoder = ChatEncoder(base.tokenizer, "", 1024)
    chosen = splits["train"][:count]
    seen = {query(row) for row in chosen}
    params = TrainParams(epochs=2, batch_rows=4, learning_rate=2e-3, validation_rows=16)
    stack = ExpertStack(base.model, [LoraSpec(params.rank, params.alpha)]).trainable(True)
    stack.initialise(0, seed_for("sql", 0))
    test = {kind: [row for row in splits["test"] if (query(row) in seen) == (kind == "seen")][:48]
            for kind in ("seen", "unseen")}
    encoded = {kind: [encoder.row(row.messages) for row in found] for kind, found in test.items()}

    def losses(expert: int) -> dict[str, float]:
        found = {}
        for kind, items in encoded.items():
            pairs, loss = [(expert, item) for item in items], 0.0
            for part in microbatches(pairs, params.batch_tokens):
                batch = collate([pairs[place] for place in part], base.device.device)
                with torch.inference_mode():
                    loss += float(domain_forward(base.model, stack, batch)[0].sum())
            found[kind] = loss / sum(item.completion_tokens for item in items)
        return found

    before = losses(-1)
    learner = Learner("sql", 0, stack, [encoder.row(row.messages) for row in chosen],
                      [encoder.row(row.messages) for row in splits["validation"]], params)
    cotrain(base.model, stack, [learner], params.batch_tokens)
    after = losses(0)
    return {"rows": {kind: len(found) for kind, found in test.items()}, "base": before, "expert": after,
            "gain": {kind: before[kind] - after[kind] for kind in before}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--rows", type=int, default=240, help="training rows of the expert; 0 = train none")
    args = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine(pick_device())}
    print(figures["machine"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        ways = {"naive": (Domain(metric="sql_result", group_by="none"), 0.0),
                "moa": (Domain(metric="sql_result"), NEAR)}
        splits = {name: prepared(Path(folder), args.shared / SOURCE, name, *way) for name, way in ways.items()}
    for name, found in splits.items():
        leak = figures[name] = leaks(found)
        print(f"{name:<6} of {leak['test rows']} test rows, {leak['same answer']:.1%} have their answer in training, "
              f"{leak['same query']:.1%} their query but for its constants, {leak['near-duplicate']:.1%} a "
              "near-duplicate", flush=True)
    if args.rows:
        found = figures["expert of the naive split"] = pretended(splits["naive"], args.rows)
        for kind in ("seen", "unseen"):
            print(f"queries {kind}: {found['rows'][kind]} rows, loss {found['base'][kind]:.3f} -> "
                  f"{found['expert'][kind]:.3f}, gain {found['gain'][kind]:.3f}")
    goals = [goal(f"moa's split: test rows with {kind} in training", figures["moa"][kind], 0.0,
                  figures["moa"][kind] == 0.0) for kind in ("same answer", "same query", "near-duplicate")]
    finish("splits", figures, goals)


if __name__ == "__main__":
    main()
