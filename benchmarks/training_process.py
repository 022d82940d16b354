"""One training in a process of its own, for `training.py`: reads a job from argv, prints what it took as one JSON line.

The systems get the same rows in the same order, batches, steps, learning rates, rank and dtype, and write PEFT
directories. Building a trainer and tokenizing are not timed. Knows nothing of goals or repeats.
"""

import json
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import pick_device
from shapes import base_of

from moa.base.encoding import ChatEncoder, Encoded
from moa.base.load import Base
from moa.core.config import TrainParams
from moa.data.quickstart.generate import GENERATORS
from moa.experts import peft_format
from moa.experts.batches import collate, microbatches, row_losses
from moa.experts.cotraining import Learner, cotrain, data_order, learning_rate, seed_for, validation_losses
from moa.experts.lora import ExpertStack, LoraSpec

DOMAINS = ("math", "sql", "extract", "python")
VALIDATION = 12   # rows of a domain
SEED = 0
BATCH = 4         # rows of one optimizer step of one expert
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Job:
    """`experts` are numbers: expert e learns the e // 4th part of the rows of domain e % 4."""

    system: str
    experts: list[int]
    rows: int            # of an expert, once
    config: str
    device: str
    dtype: str | None
    batch_tokens: int    # padded tokens of one forward of ours
    folder: str          # PEFT directories of the finished experts, by number
    waits: bool = False  # for a line on stdin before it trains

    @property
    def params(self) -> TrainParams:
        return TrainParams(rank=8, alpha=16.0, epochs=1, batch_rows=BATCH, learning_rate=1e-3, warmup=0.0,
                           batch_tokens=self.batch_tokens, validation_rows=1, seed=SEED)


@dataclass(frozen=True)
class Taken:
    seconds: float
    tokens: int      # of the rows, padding left out
    ended: float     # time.time(), the same for all processes


def rows_of(base: Base, expert: int, count: int) -> tuple[list[Encoded], list[Encoded]]:
    """Training rows, in the order in which every system sees them, and validation rows."""
    name, part = DOMAINS[expert % len(DOMAINS)], expert // len(DOMAINS)
    each = count + VALIDATION
    found = GENERATORS[name](random.Random(f"{name}:0"), each * (part + 1))[each * part:]
    encoder = ChatEncoder(base.tokenizer, "", 1024)
    rows = [encoder.row([{"role": "user", "content": "\n".join(filter(None, (row["instruction"], row.get("input"))))},
                         {"role": "assistant", "content": row["output"]}]) for row in found]
    return rows[:count], rows[count:]


def in_order(rows: Sequence[Encoded], expert: int, params: TrainParams) -> list[Encoded]:
    return [rows[index] for step in data_order(len(rows), params, seed_for(str(expert), params.seed)) for index in step]


# The systems. Each calls `ready` when all that is left is to train.

def ours(base: Base, job: Job, ready: Callable[[], None]) -> Taken:
    """All experts in one process. What is timed includes a validation of one row an expert, which others do without."""
    stack = ExpertStack(base.model, [LoraSpec(job.params.rank, job.params.alpha)] * len(job.experts),
                        TARGETS).trainable(True)
    learners = []
    for place, expert in enumerate(job.experts):
        rows, validation = rows_of(base, expert, job.rows)
        stack.initialise(place, seed_for(str(expert), SEED))
        learners.append(Learner(str(expert), place, stack, rows, validation, job.params))
    ready()
    began = clock(base)
    cotrain(base.model, stack, learners, job.params.batch_tokens)
    ended = clock(base)
    for learner in learners:
        peft_format.save(stack, learner.expert, Path(job.folder) / learner.name, base.pin.source)
    return Taken(ended - began, sum(learner.progress.seen_tokens for learner in learners), ended)


def floor(base: Base, job: Job, ready: Callable[[], None]) -> Taken:
    """Two forwards of the base alone over the batches of `ours`, projecting the targets only."""
    steps = []
    rows = {expert: in_order(rows_of(base, expert, job.rows)[0], expert, job.params) for expert in job.experts}
    for start in range(0, job.rows, BATCH):
        group = [(0, row) for own in rows.values() for row in own[start:start + BATCH]]
        steps.append([collate([group[index] for index in each], base.model.device)
                      for each in microbatches(group, job.params.batch_tokens)])
    ready()
    began = clock(base)
    with torch.no_grad():
        for batch in (batch for step in steps for batch in step for _ in range(2)):
            row_losses(base.model, batch)
    ended = clock(base)
    return Taken(ended - began, sum(len(row.ids) for own in rows.values() for row in own), ended)


def hugging_face(base: Base, job: Job, ready: Callable[[], None]) -> Taken:
    """Each expert in turn, by transformers' Trainer or TRL's SFTTrainer on one loaded base."""
    from datasets import Dataset

    seconds, tokens, ended, model = 0.0, 0, 0.0, base.model
    for expert in job.experts:
        rows = in_order(rows_of(base, expert, job.rows)[0], expert, job.params)
        data = Dataset.from_list([{"input_ids": row.ids, "labels": [
            token if target else -100 for token, target in zip(row.ids, row.targets, strict=True)]} for row in rows])
        trainer = (trl_trainer if job.system.startswith("trl") else peft_trainer)(base, model, data, job)
        same_rates(trainer, job.params)
        ready()
        began = clock(base)
        trainer.train()
        ended = clock(base)
        seconds += ended - began
        tokens += sum(len(row.ids) for row in rows)
        trainer.model.save_pretrained(Path(job.folder) / str(expert))
        model = trainer.model.unload()
        del trainer
    return Taken(seconds, tokens, ended)


def settings(base: Base, job: Job) -> dict[str, Any]:
    """What both trainers are told: this training. bf16 is their autocast, off in float32."""
    return {"output_dir": str(Path(job.folder) / "out"), "per_device_train_batch_size": BATCH, "num_train_epochs": 1,
            "learning_rate": job.params.learning_rate, "weight_decay": 0.0, "max_grad_norm": 1.0,
            "train_sampling_strategy": "sequential", "bf16": base.device.dtype == "bfloat16",
            "use_cpu": base.device.device == "cpu", "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "seed": SEED}


def same_rates(trainer: Any, params: TrainParams) -> None:
    """Let a trainer use our learning rate at every step."""
    def create(num_training_steps: int, optimizer: Any = None) -> Any:
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or trainer.optimizer,
            lambda step: learning_rate(step, num_training_steps, params) / params.learning_rate)
        return trainer.lr_scheduler

    trainer.create_scheduler = create


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")


def trl_trainer(base: Base, model: Any, data: Any, job: Job) -> Any:
    """SFTConfig's defaults but for the training itself: no packing, its fused loss, gradient checkpointing. "trl-fast"
    does without checkpointing, which is quicker where memory suffices."""
    from trl import SFTConfig, SFTTrainer

    more = {"gradient_checkpointing": False} if job.system == "trl-fast" else {}
    return SFTTrainer(model=model, args=SFTConfig(**settings(base, job), **more), train_dataset=data,
                      processing_class=base.tokenizer, peft_config=lora())


def peft_trainer(base: Base, model: Any, data: Any, job: Job) -> Any:
    """transformers' Trainer, its usual collator for padded labels, PEFT's defaults, no checkpointing."""
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    return Trainer(model=get_peft_model(model, lora()), args=TrainingArguments(**settings(base, job)),
                   train_dataset=data, data_collator=DataCollatorForSeq2Seq(base.tokenizer))


SYSTEMS = {"ours": ours, "floor": floor, "trl": hugging_face, "trl-fast": hugging_face, "trainer": hugging_face}


# Around them.

def score(base: Base, folder: Path, experts: Sequence[int], rows: int) -> dict[str, float]:
    """Validation loss of finished experts, all read from their PEFT directories into one stack."""
    stack = ExpertStack(base.model, [LoraSpec(8, 16.0)] * len(experts), TARGETS).trainable(True)
    learners = []
    for place, expert in enumerate(experts):
        peft_format.load(stack, place, folder / str(expert))
        train, validation = rows_of(base, expert, rows)
        learners.append(Learner(str(expert), place, stack, train, validation, TrainParams(validation_rows=VALIDATION)))
    return validation_losses(base.model, stack, learners, TrainParams().batch_tokens)


def clock(base: Base) -> float:
    if base.device.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.time()   # of all processes, unlike perf_counter


def peak(base: Base) -> float:
    """MiB: of the device, or of this process where the device is the CPU."""
    if base.device.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    base = base_of(job.config, pick_device(job.device, job.dtype))
    if job.system == "score":
        print(json.dumps(score(base, Path(job.folder), job.experts, job.rows)))
        return

    def ready() -> None:
        if job.waits:
            print("ready", flush=True)
            sys.stdin.readline()

    taken = SYSTEMS[job.system](base, job, ready)
    print(json.dumps(asdict(taken) | {"peak": peak(base)}))


if __name__ == "__main__":
    main()
