"""Experts without a workspace: several LoRA experts stacked on one model of transformers, and trained together.

Arguments that peft and transformers have too bear the same names and mean the same.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa.api.host import LOGGER, host_kept
from moa.api.results import EpochResult, ExpertResult, TrainingResult
from moa.api.workspace import row_dicts
from moa.core.errors import BaseModelError, DataError, TrainingError, UsageError

if TYPE_CHECKING:
    import datasets
    import pandas
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moa.base.encoding import ChatEncoder, Encoded
    from moa.core.config import TrainParams
    from moa.experts.cotraining import Learner

HELD_OUT = 10   # every tenth row is for validation, where the caller names no validation rows


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Rank and scaling of one expert, as in `peft.LoraConfig`.

    Raises:
        UsageError: a value is not allowed.

    >>> import moa
    >>> moa.LoraConfig(r=16, lora_alpha=32)
    LoraConfig(r=16, lora_alpha=32, target_modules='all-linear', use_rslora=False)
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | tuple[str, ...] | list[str] = "all-linear"   # last parts of layer names; equal in a stack
    use_rslora: bool = False   # scale by alpha / sqrt(r) instead of alpha / r

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise UsageError(f"r is {self.r!r}; it must be a whole number of 1 or more.")
        if not self.lora_alpha > 0:
            raise UsageError(f"lora_alpha is {self.lora_alpha!r}; it must be above 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingArguments:
    """How `cotrain` trains, as in `transformers.TrainingArguments`, with defaults that suit LoRA.

    The learning rate rises over `warmup_steps` and then falls along a cosine to a tenth.

    Raises:
        UsageError: a value is not allowed.

    >>> import moa
    >>> moa.TrainingArguments(num_train_epochs=2, learning_rate=1e-3).per_device_train_batch_size
    8
    """

    num_train_epochs: int = 2                # each ends with a validation; the best one is kept
    learning_rate: float = 1e-3
    per_device_train_batch_size: int = 8     # rows of one optimizer step of one expert
    warmup_steps: float = 0.1                # below 1: share of an expert's steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False     # a third slower, much less memory
    early_stopping_patience: int = 0         # epochs without improvement before stopping; 0 = off
    batch_tokens: int = 448                  # padded tokens in one forward: memory, not mathematics
    seed: int = 0

    def __post_init__(self) -> None:
        self.params(0.0)

    def params(self, warmup: float) -> "TrainParams":
        """These arguments for moa's own training; `warmup` is a share of the steps."""
        if self.warmup_steps < 0:
            raise UsageError(f"warmup_steps is {self.warmup_steps!r}; it must be 0 or more.")
        given = {"epochs": self.num_train_epochs, "learning_rate": self.learning_rate,
                 "batch_rows": self.per_device_train_batch_size, "warmup": warmup, "weight_decay": self.weight_decay,
                 "max_grad_norm": self.max_grad_norm, "recompute": self.gradient_checkpointing,
                 "patience": self.early_stopping_patience, "batch_tokens": self.batch_tokens, "seed": self.seed}
        with host_kept():
            from pydantic import ValidationError

            from moa.core.config import TrainParams

            try:
                return TrainParams.model_validate(given)
            except ValidationError as error:
                first = error.errors()[0]
                names = {"epochs": "num_train_epochs", "batch_rows": "per_device_train_batch_size",
                         "recompute": "gradient_checkpointing", "patience": "early_stopping_patience"}
                name = names.get(str(first["loc"][0]), str(first["loc"][0]))
                raise UsageError(f"{name} is {first['input']!r}: {first['msg']}.") from None


class ExpertStack:
    """Named LoRA experts on one frozen model, of which each row of a batch uses its own.

    The model's linear layers are replaced until `unload`; its parameters are frozen.

    Args:
        model: a causal language model of transformers.
        experts: rank and scaling of each expert, by name. All have the same `target_modules`.
        tokenizer: its chat template renders rows; None = the one saved with the model.
        seed: of the initial weights.

    Raises:
        UsageError: there is no expert, or their `target_modules` differ.
        ArtifactError: a target matches no linear layer.

    >>> import moa
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("tiny-base")
    >>> stack = moa.ExpertStack(model, {"math": moa.LoraConfig(r=8, lora_alpha=16), "sql": moa.LoraConfig(r=16)})
    >>> stack
    ExpertStack(math: r=8, sql: r=16)
    >>> import torch
    >>> with stack.using(["sql", None]):   # the first row uses the expert, the second one the model alone
    ...     tuple(model(torch.tensor([[1, 2, 3], [1, 2, 3]])).logits.shape[:2])
    (2, 3)
    >>> stack.unload() is model
    True
    """

    def __init__(self, model: "PreTrainedModel", experts: Mapping[str, LoraConfig], *,
                 tokenizer: "PreTrainedTokenizerBase | None" = None, seed: int = 0) -> None:
        if not experts:
            raise UsageError("Name at least one expert.")
        with host_kept():
            from moa.experts.cotraining import seed_for
            from moa.experts.lora import ExpertStack as Stacked
            from moa.experts.lora import LoraSpec

            targets = {name: each.target_modules if isinstance(each.target_modules, str)
                       else tuple(sorted(each.target_modules)) for name, each in experts.items()}
            if len(set(targets.values())) > 1:
                raise UsageError("The experts of a stack adapt the same layers, and their target_modules differ: "
                                 + "; ".join(f"{name}: {each}" for name, each in targets.items()) + ".")
            wanted = next(iter(targets.values()))
            self.model, self.configs = model, dict(experts)
            self._tokenizer = tokenizer
            self._stack = Stacked(model, [LoraSpec(each.r, float(each.lora_alpha), each.use_rslora)
                                          for each in experts.values()],
                                  [wanted] if isinstance(wanted, str) and wanted != "all-linear" else wanted)
            for number, name in enumerate(experts):
                self._stack.initialise(number, seed_for(name, seed))

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names."""
        return tuple(self.configs)

    @contextmanager
    def using(self, rows: Sequence[str | None]) -> Iterator[None]:
        """Within the block, row b of every batch uses the expert `rows[b]`, or the model alone where it is None.

        Raises:
            UsageError: the stack has no such expert.
        """
        from moa.experts.lora import BASE_ONLY

        self._stack.select([BASE_ONLY if name is None else self._number(name) for name in rows])
        try:
            yield
        finally:
            self._stack.select(None)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write each expert as a PEFT directory of its name, which `peft.PeftModel.from_pretrained` loads."""
        from moa.experts import peft_format

        with host_kept():
            for number, name in enumerate(self.configs):
                peft_format.save(self._stack, number, Path(directory) / name, self.model.name_or_path)

    def unload(self) -> "PreTrainedModel":
        """Put the model's own layers back, and return it."""
        self._stack.remove()
        return self.model

    def _number(self, name: str) -> int:
        if name not in self.configs:
            raise UsageError(f"The stack has no expert {name!r}; it has {', '.join(self.configs)}.")
        return list(self.configs).index(name)

    def _encoder(self) -> "ChatEncoder":
        from moa.base.encoding import ChatEncoder

        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.model.name_or_path, trust_remote_code=False)
            except (OSError, ValueError):
                raise BaseModelError(f"There is no tokenizer in {self.model.name_or_path or 'the model'}: pass "
                                     "tokenizer=... to moa.ExpertStack.") from None
        if not self._tokenizer.chat_template:
            raise BaseModelError("The tokenizer has no chat template, which rows are rendered with: set its "
                                 "chat_template.")
        return ChatEncoder(self._tokenizer, None, 0)

    def __len__(self) -> int:
        return len(self.configs)

    def __repr__(self) -> str:
        return f"ExpertStack({', '.join(f'{name}: r={each.r}' for name, each in self.configs.items())})"


def cotrain(stack: ExpertStack, rows: "Mapping[str, Iterable[Mapping[str, object]] | datasets.Dataset | "
                                      "pandas.DataFrame]", args: TrainingArguments | None = None, *,
            eval_rows: "Mapping[str, Iterable[Mapping[str, object]] | datasets.Dataset | pandas.DataFrame] | "
                       "None" = None) -> TrainingResult:
    """Train experts of a stack together, each with the result of training it alone; they share forwards and backwards.

    Each expert ends with the weights of its best epoch. Training again continues from these.

    Args:
        stack: the experts.
        rows: of each expert to train: `instruction` and `output` (and perhaps `input`), or a chat under `messages`.
        args: None = the defaults.
        eval_rows: of each expert, for the loss after each epoch; None = every tenth of `rows`, which then do not train.

    Raises:
        DataError: a row cannot be used, or there are too few.
        UsageError: the stack has no such expert.
        TrainingError: the loss of an expert is no longer finite; the others are trained.

    >>> import moa
    >>> from transformers import AutoModelForCausalLM
    >>> stack = moa.ExpertStack(AutoModelForCausalLM.from_pretrained("tiny-base"), {"sums": moa.LoraConfig(r=2)})
    >>> rows = [{"instruction": f"What is {n} + {n}?", "output": str(2 * n)} for n in range(20)]
    >>> result = moa.cotrain(stack, {"sums": rows}, moa.TrainingArguments(num_train_epochs=1, learning_rate=1e-3))
    >>> [(epoch.expert, epoch.epoch) for epoch in result["sums"].epochs]
    [('sums', 1)]
    """
    args = args or TrainingArguments()
    if not rows:
        raise UsageError("Name at least one expert to train.")
    numbers = {name: stack._number(name) for name in rows}
    if eval_rows is not None and (missing := [name for name in rows if name not in eval_rows]):
        raise UsageError(f"eval_rows has no rows of {missing[0]!r}.")
    with host_kept():
        from moa.experts.cotraining import Learner, recomputing
        from moa.experts.cotraining import cotrain as train_all

        # The stack's gradients are views of one matrix on purpose.
        warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
        encoder = stack._encoder()
        parts = {name: _parts(encoder, name, rows[name], None if eval_rows is None else eval_rows[name])
                 for name in rows}
        inner = stack._stack.trainable(True)
        try:
            learners = []
            for name, (train, validation) in parts.items():
                steps = args.num_train_epochs * -(-len(train) // args.per_device_train_batch_size)
                warmup = args.warmup_steps if args.warmup_steps < 1 else min(args.warmup_steps / steps, 0.999)
                params = args.params(warmup).model_copy(update={"validation_rows": len(validation)})
                learners.append(Learner(name, numbers[name], inner, train, validation, params))
            logged: dict[str, int] = dict.fromkeys(parts, 0)
            with recomputing(stack.model, args.gradient_checkpointing):
                train_all(stack.model, inner, learners, args.batch_tokens, lambda active: _log(active, logged))
        finally:
            inner.trainable(False)
            inner.forget()
    if failed := [learner for learner in learners if learner.progress.failure]:
        raise TrainingError(" ".join(f"The training of {each.name!r} failed: {each.progress.failure}."
                                     for each in failed))
    return TrainingResult(tuple(map(_result, learners)))


def _parts(encoder: "ChatEncoder", name: str, rows: Any, eval_rows: Any) -> "tuple[list[Encoded], list[Encoded]]":
    """Training and validation rows of one expert in token ids."""
    train = _encoded(encoder, name, rows)
    if eval_rows is not None:
        validation = _encoded(encoder, name, eval_rows)
    else:
        validation = train[::HELD_OUT]
        train = [row for number, row in enumerate(train) if number % HELD_OUT]
    if not train or not validation:
        raise DataError(f"The expert {name!r} has {len(train)} rows to train on and {len(validation)} for validation, "
                        "and needs one of each.")
    return train, validation


def _encoded(encoder: "ChatEncoder", name: str, rows: Any) -> "list[Encoded]":
    from moa.core.config import Domain
    from moa.data.conversations import conversation
    from moa.data.readers import RowRejected

    encoded = []
    for number, row in enumerate(row_dicts(rows), start=1):
        try:
            encoded.append(encoder.row(conversation(row, Domain(metric="rouge_l"))))
        except RowRejected as error:
            raise DataError(f"Row {number} of {name!r}: {error}.") from None
    return encoded


def _log(active: "Sequence[Learner]", logged: dict[str, int]) -> None:
    for learner in active:
        for epoch in learner.progress.curve[logged[learner.name]:]:
            LOGGER.info("%s: epoch %d, training loss %.3f, validation loss %.3f", learner.name, epoch["epoch"],
                        epoch["train_loss"], epoch["validation_loss"])
        logged[learner.name] = len(learner.progress.curve)


def _result(learner: "Learner") -> ExpertResult:
    progress = learner.progress
    epochs = tuple(EpochResult(learner.name, int(epoch["epoch"]), epoch["train_loss"], epoch["validation_loss"],
                               epoch["learning_rate"]) for epoch in progress.curve)
    return ExpertResult(learner.name, progress.best_epoch, progress.best_loss, progress.seen_tokens, epochs)
