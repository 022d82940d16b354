"""Co-training: several experts are trained at once on one copy of the base, each with the result of training it alone.

Each `Learner` has its own data order, learning rate schedule, gradient clipping, optimizer and early stopping. Forward
and backward passes are shared. The weights of each expert's best epoch are on disk, not in memory (`DiskTensor`).
"""

import hashlib
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from moa.base.architecture import recomputable_layers
from moa.base.encoding import Encoded
from moa.base.kernels.attention import short_rows
from moa.base.kernels.llama_ops import fused
from moa.experts.batches import Batch, collate, microbatches, row_losses
from moa.experts.lora import ExpertStack, Selection, StackedLoRA

if TYPE_CHECKING:
    from moa.core.config import TrainParams


class DiskTensor:
    """A copy of one tensor in an unnamed temporary file. Raises OSError when the disk is full."""

    def __init__(self, tensor: Tensor) -> None:
        self._file = tempfile.TemporaryFile(prefix="moa-")   # noqa: SIM115 - open as long as this object lives
        self.put(tensor)

    def put(self, tensor: Tensor) -> None:
        """Replace the copy by a copy of `tensor`."""
        self._metadata = tensor.shape, tensor.dtype, tensor.device
        self._file.seek(0)
        self._file.truncate()
        self._file.write(memoryview(tensor.detach().contiguous().cpu().numpy().reshape(-1).view(np.uint8)))
        self._file.flush()

    def take(self) -> Tensor:
        """The copy as a new tensor, on the device of the tensor given to `put`."""
        shape, dtype, device = self._metadata
        self._file.seek(0)
        return torch.frombuffer(bytearray(self._file.read()), dtype=dtype).view(shape).to(device)


# PyTorch warns of gradients whose strides differ from their parameter's. An expert's parameters and gradients are views
# of the stack's matrices on purpose.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")

# Computes the summed loss of each row's targets (B,), and an additional loss of each row (B,) or None.
Forward = Callable[[nn.Module, ExpertStack, Batch], tuple[Tensor, Tensor | None]]

FINAL_RATE_SHARE = 0.1   # share of the learning rate at which the cosine ends


def seed_for(name: str, seed: int) -> int:
    """Seed of one expert, derived from its name, so that it does not depend on the other experts in the training."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def data_order(rows: int, params: "TrainParams", seed: int) -> list[list[int]]:
    """Row indices of each optimizer step, over all epochs.

    Epochs are consecutive parts of one stream of shuffled copies of the corpus. So where an epoch is shorter than the
    corpus (`rows_per_epoch`), every row is used before any is used again.
    """
    generator = torch.Generator().manual_seed(seed)
    per_epoch = min(params.rows_per_epoch or rows, rows)
    stream: list[int] = []
    while len(stream) < per_epoch * params.epochs:
        stream += torch.randperm(rows, generator=generator).tolist()
    return [stream[start:min(start + params.batch_rows, (epoch + 1) * per_epoch)]
            for epoch in range(params.epochs)
            for start in range(epoch * per_epoch, (epoch + 1) * per_epoch, params.batch_rows)]


def learning_rate(step: int, steps: int, params: "TrainParams") -> float:
    """Learning rate at `step` of `steps`, counted from 0.

    It rises linearly over the share `params.warmup` of the steps, then falls along a cosine to the share
    `FINAL_RATE_SHARE` of `params.learning_rate`.
    """
    warmup = max(1, round(params.warmup * steps))
    if step < warmup:
        return params.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return params.learning_rate * (FINAL_RATE_SHARE
                                   + (1 - FINAL_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(slots=True)
class Progress:
    """Progress of a learner. With `Learner.tensors` it is the whole state of an interrupted training."""

    step: int = 0
    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = math.inf
    worse: int = 0                       # epochs since the best one
    epoch_loss: float = 0.0              # sum over the target tokens of this epoch so far, in nats
    epoch_tokens: int = 0                # target tokens of this epoch so far
    seen_tokens: int = 0                 # tokens of all rows so far, prompts included
    stopped: bool = False                # early stopping ended the training
    failure: str | None = None           # why the training ended without a result
    curve: list[dict[str, float]] = field(default_factory=list)   # losses and learning rate of each epoch


class Learner:
    """Training of one expert: its batches, optimizer steps, early stopping and best epoch.

    Args:
        name: the expert's domain, from which its seed is derived.
        expert: its index in the stack.
        stack: a stack that collects gradients (`ExpertStack.trainable`).
        rows: training rows.
        validation: validation rows, of which the first `params.validation_rows` are used.
        params: training parameters.
        warm: whether the expert starts from a parent's weights, which then count as epoch 0.
    """

    def __init__(self, name: str, expert: int, stack: ExpertStack, rows: Sequence[Encoded],
                 validation: Sequence[Encoded], params: "TrainParams", warm: bool = False) -> None:
        assert stack.gradients is not None, "call stack.trainable(True) first"
        self.name, self.expert, self.params = name, expert, params
        self.warm = warm
        self.rows, self.validation = rows, validation[:params.validation_rows]
        self.order = data_order(len(rows), params, seed_for(name, params.seed))
        self.steps_per_epoch = len(self.order) // params.epochs
        self.weights = nn.Parameter(stack.weights[expert])   # shares the stack's storage
        self.weights.grad = stack.gradients[expert]
        self.best = DiskTensor(self.weights)   # on disk, because it is used at most once an epoch
        self.optimizer = torch.optim.AdamW([self.weights], lr=0.0, weight_decay=params.weight_decay, fused=True)
        self.progress = Progress()

    @property
    def done(self) -> bool:
        """Whether there is no further step: all steps are done, early stopping ended them, or the training failed."""
        return self.progress.stopped or self.progress.failure is not None or self.progress.step >= len(self.order)

    def batch(self) -> list[Encoded]:
        """The rows of this learner's next optimizer step."""
        return [self.rows[index] for index in self.order[self.progress.step]]

    def update(self, loss: float, tokens: int, seen: int) -> None:
        """One optimizer step with the gradient that the weights have accumulated.

        A loss or gradient that is not finite sets `progress.failure` and changes no weight.

        Args:
            loss: sum of the loss over the step's target tokens, in nats.
            tokens: number of these target tokens; the gradient is that of the mean loss.
            seen: number of all tokens of the step's rows, for `progress`.
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
        """Whether the last step ended an epoch for which `end_epoch` is yet to be called."""
        return not self.progress.failure and self.progress.step == (self.progress.epoch + 1) * self.steps_per_epoch

    def end_epoch(self, validation_loss: float) -> None:
        """Record the epoch, save the weights if it is the best so far, and stop early if patience has run out.

        `validation_loss` is in nats per target token.
        """
        progress = self.progress
        progress.epoch += 1
        progress.curve.append({"epoch": progress.epoch, "step": progress.step, "tokens": progress.seen_tokens,
                               "train_loss": progress.epoch_loss / max(progress.epoch_tokens, 1),
                               "validation_loss": validation_loss,
                               "learning_rate": learning_rate(progress.step - 1, len(self.order), self.params)})
        progress.epoch_loss, progress.epoch_tokens = 0.0, 0
        if validation_loss < progress.best_loss:
            progress.best_loss, progress.best_epoch, progress.worse = validation_loss, progress.epoch, 0
            self.best.put(self.weights)
        else:
            progress.worse += 1
            progress.stopped = bool(self.params.patience) and progress.worse >= self.params.patience

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the training's state: current weights, best weights and the optimizer's moments."""
        state = self.optimizer.state.get(self.weights, {})
        moments = {key: state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}
        return {"weights": self.weights.detach(), "best": self.best.take(), **moments}

    def restore(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        """Continue from a saved state: `progress`, and the result of `tensors` at that time."""
        self.progress = progress
        with torch.no_grad():
            self.weights.copy_(tensors["weights"])
        self.best.put(tensors["best"].to(self.weights))
        if "exp_avg" in tensors:
            # On the device of the weights, as the fused AdamW makes it: on a GPU its kernel reads the step there.
            self.optimizer.state[self.weights] = {
                "step": torch.tensor(float(progress.step), device=self.weights.device),
                "exp_avg": tensors["exp_avg"].to(self.weights),
                "exp_avg_sq": tensors["exp_avg_sq"].to(self.weights)}


def domain_forward(model: nn.Module, stack: ExpertStack, batch: Batch) -> tuple[Tensor, None]:
    """The `Forward` of separate experts: select each row's own expert and compute its loss, (B,)."""
    stack.select(batch.owners)
    return row_losses(model, batch), None


def _train_step(model: nn.Module, stack: ExpertStack, active: Sequence[Learner], batch_tokens: int,
                forward: Forward) -> None:
    """One optimizer step of every active learner.

    Rows of similar length share a forward, whichever learners they belong to. Each learner's loss is the mean over its
    own target tokens, so its gradient does not depend on the other learners.
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
        loss_B, additional_B = forward(model, stack, batch)
        weight_B = targets.to(loss_B).reciprocal()[batch.owners]
        total = (loss_B * weight_B).sum()
        (total if additional_B is None else total + additional_B.sum() / len(rows)).backward()
        losses.index_add_(0, batch.owners.cpu(), loss_B.detach().double().cpu())
    for learner in active:
        learner.update(losses[learner.expert].item(), int(targets[learner.expert]), seen[learner.expert])


@torch.no_grad()
def validation_losses(model: nn.Module, stack: ExpertStack, learners: Sequence[Learner], batch_tokens: int,
                      forward: Forward = domain_forward) -> dict[str, float]:
    """Mean loss of each learner's validation rows, in nats per target token, by the learner's name."""
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
    """Set each learner's best loss to the validation loss of its initial weights.

    So a learner whose training never gets below that loss ends with its initial weights.
    """
    losses = validation_losses(model, stack, learners, batch_tokens, forward)
    for learner in learners:
        loss = losses[learner.name]
        learner.progress.best_loss = loss if math.isfinite(loss) else math.inf


def cotrain(model: nn.Module, stack: ExpertStack, learners: Sequence[Learner], batch_tokens: int,
            after_step: Callable[[Sequence[Learner]], Any] = lambda _: None, forward: Forward = domain_forward) -> None:
    """Train until every learner is done. Each expert ends in the stack with the weights of its best epoch.

    A learner whose loss or gradient is not finite stops with `progress.failure` set; the others continue unaffected.

    Args:
        model: the base, with the layers of `stack` in it.
        stack: the experts, collecting gradients.
        learners: one for each expert that is trained.
        batch_tokens: most padded tokens of a microbatch.
        after_step: called after each step with the learners that took part in it.
        forward: computes the losses of a batch.
    """
    # oneDNN caches compiled kernels of 1,024 shapes, at half a MiB each. Those of two microbatches are enough.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    with short_rows(model), fused(model):
        _train_all(model, stack, learners, batch_tokens, after_step, forward)
    stack.select(None)
    with torch.no_grad():
        for learner in learners:
            learner.weights.copy_(learner.best.take())


def _train_all(model: nn.Module, stack: ExpertStack, learners: Sequence[Learner], batch_tokens: int,
               after_step: Callable[[Sequence[Learner]], Any], forward: Forward) -> None:
    if starting := [learner for learner in learners if learner.warm and not learner.progress.curve]:
        measure_initial_loss(model, stack, starting, batch_tokens, forward)
        for learner in starting:
            learner.progress.curve.append({"epoch": 0, "step": 0, "tokens": 0,
                                           "validation_loss": learner.progress.best_loss})
    while active := [learner for learner in learners if not learner.done]:
        _train_step(model, stack, active, batch_tokens, forward)
        if ended := [learner for learner in active if learner.epoch_ended]:
            losses = validation_losses(model, stack, ended, batch_tokens, forward)
            for learner in ended:
                learner.end_epoch(losses[learner.name])
        after_step(active)


@contextmanager
def recomputing(model: Any, wanted: bool = True) -> Iterator[None]:
    """Within the block, use gradient checkpointing: the backward recomputes the activations of each decoder layer, with
    the selection of experts that the layer had in the forward.

    Transformers checkpoints layers in training mode only. So the layers, without their submodules, are put into
    training mode, and taken out of it while they compute: no dropout is switched on. With `wanted` False, nothing
    changes.
    """
    if not wanted:
        yield
        return
    layers = recomputable_layers(model)
    selection = next((layer.selection for layer in model.modules() if isinstance(layer, StackedLoRA)), Selection())

    @contextmanager
    def recompute(snapshot: Any) -> Iterator[None]:
        with _training_mode(layers, False), selection.restored(snapshot):
            yield

    # Reentrant checkpoints need an input with a gradient, and a frozen embedding gives none.
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={
        "use_reentrant": False, "context_fn": lambda: (_training_mode(layers, False), recompute(selection.snapshot))})
    model.disable_input_require_grads()   # transformers enables them, for reentrant checkpoints alone
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
