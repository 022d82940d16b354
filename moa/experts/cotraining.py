"""Co-training: experts learn side by side on one copy of the base, each exactly as it would alone.

Order, schedule, clipping, optimizer and stopping belong to each `Learner`; the forward and backward belong to all.
The weights of each expert's best epoch are kept in a file, not in memory (`DiskTensor`).
"""

import hashlib
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moa.base.encoding import Encoded
from moa.base.kernels.attention import short_rows
from moa.base.kernels.llama_ops import fused
from moa.core.config import TrainParams
from moa.experts.batches import Batch, collate, microbatches, row_losses
from moa.experts.lora import ExpertStack, Selection, StackedLoRA


class DiskTensor:
    """A copy of one tensor in a temporary file without a name. Raises OSError when the disk is full."""

    def __init__(self, tensor: Tensor) -> None:
        self._file = tempfile.TemporaryFile(prefix="moa-")   # noqa: SIM115 - open as long as this object lives
        self.put(tensor)

    def put(self, tensor: Tensor) -> None:
        """Replace the copy by one of `tensor`."""
        self._like = tensor.shape, tensor.dtype, tensor.device
        self._file.seek(0)
        self._file.truncate()
        self._file.write(memoryview(tensor.detach().contiguous().cpu().numpy().reshape(-1).view(np.uint8)))
        self._file.flush()

    def take(self) -> Tensor:
        """The copy, on the device of the tensor that was put."""
        shape, dtype, device = self._like
        self._file.seek(0)
        return torch.frombuffer(bytearray(self._file.read()), dtype=dtype).view(shape).to(device)


# An expert's parameters share storage with its row of the stack on purpose.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")

# A forward: the summed loss of each row's targets (B,), and an additional loss of each row (B,) or None.
Forward = Callable[[nn.Module, ExpertStack, Batch], tuple[Tensor, Tensor | None]]

FLOOR = 0.1   # share of the learning rate at which the cosine ends


def seed_for(name: str, seed: int) -> int:
    """An expert's own seed, from its name, so that it does not depend on the experts trained beside it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def data_order(rows: int, params: TrainParams, seed: int) -> list[list[int]]:
    """Row indices of every optimizer step, epoch after epoch. Epochs walk through one shuffled stream of the corpus,
    so a short epoch still sees every row before any comes twice."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = min(params.rows_per_epoch or rows, rows)
    stream: list[int] = []
    while len(stream) < per_epoch * params.epochs:
        stream += torch.randperm(rows, generator=generator).tolist()
    return [stream[start:min(start + params.batch_rows, (epoch + 1) * per_epoch)]
            for epoch in range(params.epochs)
            for start in range(epoch * per_epoch, (epoch + 1) * per_epoch, params.batch_rows)]


def learning_rate(step: int, steps: int, params: TrainParams) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then a cosine down to a tenth."""
    warmup = max(1, round(params.warmup * steps))
    if step < warmup:
        return params.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return params.learning_rate * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(slots=True)
class Progress:
    """Progress of a learner. Together with its tensors it is all that resuming needs."""

    step: int = 0
    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = math.inf
    worse: int = 0                       # epochs since the best one
    epoch_loss: float = 0.0              # nats summed over the epoch so far
    epoch_tokens: int = 0
    seen_tokens: int = 0
    stopped: bool = False
    failure: str | None = None
    curve: list[dict[str, float]] = field(default_factory=list)


class Learner:
    """Training of one expert: its batches, optimizer steps, early stopping and best epoch."""

    def __init__(self, name: str, expert: int, stack: ExpertStack, rows: Sequence[Encoded],
                 validation: Sequence[Encoded], params: TrainParams, warm: bool = False) -> None:
        assert stack.gradients is not None, "call stack.trainable(True) first"
        self.name, self.expert, self.params = name, expert, params
        self.warm = warm   # it starts from a parent expert, whose weights count as epoch 0
        self.rows, self.validation = rows, validation[:params.validation_rows]
        self.order = data_order(len(rows), params, seed_for(name, params.seed))
        self.steps_per_epoch = len(self.order) // params.epochs
        self.weights = nn.Parameter(stack.weights[expert])   # shares the stack's storage
        self.weights.grad = stack.gradients[expert]
        self.best = DiskTensor(self.weights)   # looked at once an epoch
        self.optimizer = torch.optim.AdamW([self.weights], lr=0.0, weight_decay=params.weight_decay, fused=True)
        self.progress = Progress()

    @property
    def done(self) -> bool:
        return self.progress.stopped or self.progress.failure is not None or self.progress.step >= len(self.order)

    def batch(self) -> list[Encoded]:
        """The rows of this learner's next optimizer step."""
        return [self.rows[index] for index in self.order[self.progress.step]]

    def update(self, loss: float, tokens: int, seen: int) -> None:
        """One optimizer step on the gradient of the mean loss over `tokens` targets, whose sum is `loss`.

        A loss or gradient that is not finite sets `progress.failure` and changes no weight.
        """
        assert self.weights.grad is not None
        norm = nn.utils.clip_grad_norm_([self.weights], self.params.max_grad_norm)
        if not (math.isfinite(loss) and bool(norm.isfinite())):
            mean = loss / max(tokens, 1)
            self.progress.failure = f"at step {self.progress.step + 1} its loss ({mean:.3g}) or gradient is not finite"
            self.weights.grad.zero_()
            return
        rate = learning_rate(self.progress.step, len(self.order), self.params)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.weights.grad.zero_()
        self.progress.step += 1
        self.progress.epoch_loss += loss
        self.progress.epoch_tokens += tokens
        self.progress.seen_tokens += seen

    @property
    def epoch_ended(self) -> bool:
        return not self.progress.failure and self.progress.step == (self.progress.epoch + 1) * self.steps_per_epoch

    def end_epoch(self, validation_loss: float) -> None:
        """Keep the weights when this epoch is the best so far; stop when patience has run out."""
        at = self.progress
        at.epoch += 1
        at.curve.append({"epoch": at.epoch, "step": at.step, "tokens": at.seen_tokens,
                         "train_loss": at.epoch_loss / max(at.epoch_tokens, 1), "validation_loss": validation_loss,
                         "learning_rate": learning_rate(at.step - 1, len(self.order), self.params)})
        at.epoch_loss, at.epoch_tokens = 0.0, 0
        if validation_loss < at.best_loss:
            at.best_loss, at.best_epoch, at.worse = validation_loss, at.epoch, 0
            self.best.put(self.weights)
        else:
            at.worse += 1
            at.stopped = bool(self.params.patience) and at.worse >= self.params.patience

    def tensors(self) -> dict[str, Tensor]:
        """What resuming needs besides `progress`."""
        state = self.optimizer.state.get(self.weights, {})
        moments = {key: state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}
        return {"weights": self.weights.detach(), "best": self.best.take(), **moments}

    def restore(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        """Continue where `tensors` and `progress` were taken."""
        self.progress = progress
        with torch.no_grad():
            self.weights.copy_(tensors["weights"])
        self.best.put(tensors["best"].to(self.weights))
        if "exp_avg" in tensors:
            self.optimizer.state[self.weights] = {
                "step": torch.tensor(float(progress.step)), "exp_avg": tensors["exp_avg"].to(self.weights),
                "exp_avg_sq": tensors["exp_avg_sq"].to(self.weights)}


def domain_forward(model: nn.Module, stack: ExpertStack, batch: Batch) -> tuple[Tensor, None]:
    """The forward of individual training: each row through its own expert."""
    stack.select(batch.owners)
    return row_losses(model, batch), None


def _learn(model: nn.Module, stack: ExpertStack, active: Sequence[Learner], batch_tokens: int,
           forward: Forward) -> None:
    """One optimizer step of every active learner.

    Each learner's loss is the mean over its own target tokens, so its gradient does not depend on its neighbours;
    rows of all of them share forwards by length.
    """
    rows = [(learner.expert, row) for learner in active for row in learner.batch()]
    targets = torch.zeros(len(stack), dtype=torch.float64)
    seen = [0] * len(stack)
    for expert, row in rows:
        targets[expert] += sum(row.targets[1:])
        seen[expert] += len(row.ids)
    losses = torch.zeros(len(stack), dtype=torch.float64)
    for group in microbatches(rows, batch_tokens):
        batch = collate([rows[index] for index in group], stack.weights.device)
        loss_B, cost_B = forward(model, stack, batch)
        weight_B = targets.to(loss_B).reciprocal()[batch.owners]
        total = (loss_B * weight_B).sum()
        (total if cost_B is None else total + cost_B.sum() / len(rows)).backward()
        losses.index_add_(0, batch.owners.cpu(), loss_B.detach().double().cpu())
    for learner in active:
        learner.update(losses[learner.expert].item(), int(targets[learner.expert]), seen[learner.expert])


@torch.no_grad()
def validation_losses(model: nn.Module, stack: ExpertStack, learners: Sequence[Learner], batch_tokens: int,
                      forward: Forward = domain_forward) -> dict[str, float]:
    """Mean loss in nats over the target tokens of each learner's validation rows, by name."""
    rows = [(learner.expert, row) for learner in learners for row in learner.validation]
    losses, targets = torch.zeros(len(stack), dtype=torch.float64), torch.zeros(len(stack), dtype=torch.float64)
    for group in microbatches(rows, 2 * batch_tokens):   # no activations are kept
        batch = collate([rows[index] for index in group], stack.weights.device)
        losses.index_add_(0, batch.owners.cpu(), forward(model, stack, batch)[0].double().cpu())
    stack.forget()
    for expert, row in rows:
        targets[expert] += sum(row.targets[1:])
    return {learner.name: (losses[learner.expert] / targets[learner.expert]).item() for learner in learners}


def measure_initial_loss(model: nn.Module, stack: ExpertStack, learners: Sequence[Learner], batch_tokens: int,
                         forward: Forward = domain_forward) -> None:
    """Measure what the learners are before the first step: who gets no better than that ends as it began."""
    losses = validation_losses(model, stack, learners, batch_tokens, forward)
    for learner in learners:
        loss = losses[learner.name]
        learner.progress.best_loss = loss if math.isfinite(loss) else math.inf


def cotrain(model: nn.Module, stack: ExpertStack, learners: Sequence[Learner], batch_tokens: int,
            after_step: Callable[[Sequence[Learner]], Any] = lambda _: None, forward: Forward = domain_forward) -> None:
    """Train until every learner is done; each ends with its best epoch in the stack.

    `after_step` is called after each common step, for progress and checkpoints. A learner whose loss or gradient is no
    longer finite stops with `progress.failure` set, and the others do not notice.
    """
    # oneDNN keeps what it compiled for a thousand shapes, half a MiB for each: those of two microbatches will do.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    with short_rows(model), fused(model):
        _train(model, stack, learners, batch_tokens, after_step, forward)
    stack.select(None)
    with torch.no_grad():
        for learner in learners:
            learner.weights.copy_(learner.best.take())


def _train(model: nn.Module, stack: ExpertStack, learners: Sequence[Learner], batch_tokens: int,
           after_step: Callable[[Sequence[Learner]], Any], forward: Forward) -> None:
    if starting := [learner for learner in learners if learner.warm and not learner.progress.curve]:
        measure_initial_loss(model, stack, starting, batch_tokens, forward)
        for learner in starting:
            learner.progress.curve.append({"epoch": 0, "step": 0, "tokens": 0,
                                           "validation_loss": learner.progress.best_loss})
    while active := [learner for learner in learners if not learner.done]:
        _learn(model, stack, active, batch_tokens, forward)
        if ended := [learner for learner in active if learner.epoch_ended]:
            losses = validation_losses(model, stack, ended, batch_tokens, forward)
            for learner in ended:
                learner.end_epoch(losses[learner.name])
        after_step(active)


@contextmanager
def recomputing(model: Any, wanted: bool = True) -> Iterator[None]:
    """Gradient checkpointing within the block: the backward computes the activations of each decoder layer again, with
    the selection of experts that the layer had in the forward.

    Only the layers themselves are put into training mode, which is how transformers recognises a training, and they are
    out of it while they compute: no dropout is switched on.
    """
    if not wanted:
        yield
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    selection = next((each.selection for each in model.modules() if isinstance(each, StackedLoRA)), Selection())

    @contextmanager
    def again(choice: Any) -> Iterator[None]:
        with _training_mode(layers, False), selection.restored(choice):
            yield

    # Reentrant checkpoints need an input with a gradient, and a frozen embedding gives none.
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={
        "use_reentrant": False, "context_fn": lambda: (_training_mode(layers, False), again(selection.snapshot))})
    model.disable_input_require_grads()   # for the reentrant ones alone
    try:
        with _training_mode(layers, True):
            yield
    finally:
        model.activation_checkpointing_disable()


@contextmanager
def _training_mode(layers: Sequence[nn.Module], wanted: bool) -> Iterator[None]:
    """Within the block, set the training mode of these layers, but not of their submodules."""
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.training = wanted
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training
