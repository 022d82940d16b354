"""Batches of training rows: their grouping by length, their padding to tensors, and the loss of each row.

Shapes: B rows, T positions, N target tokens of a batch, V words, C targets of a chunk.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moa.base.encoding import Encoded

CALL_COST = 96      # fixed cost of a forward and backward: the number of padded tokens that take as long
TARGET_CHUNK = 64   # targets whose logits are converted to float32 at a time
PROJECTED_ON = ("cuda",)   # kinds of device on which `ProjectedLoss` is used
LOGITS_BYTES = 1 << 29     # of the float32 logits that `ProjectedLoss` has in memory

# By model: whether its logits are the result of a plain output projection, which nothing scales or caps afterwards. The
# first batch of a model tells.
_ends_with_projection: Any = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right, with their target tokens.

    A causal model needs no attention mask for them: padding comes after a row's tokens, which do not attend to it, and
    padding is never a target.
    """

    ids: Tensor         # (B, T)
    experts: list[int]  # expert of each row, for `ExpertStack.select`
    owners: Tensor      # (B,) the same as a tensor
    positions: Tensor   # (N,) flat positions b * T + t whose hidden state predicts a target
    targets: Tensor     # (N,) the token to predict
    rows: Tensor        # (N,) row of each target
    prompts: Tensor     # (B,) tokens before each row's last answer
    padded_tokens: int


def microbatches(rows: Sequence[tuple[int, Encoded]], tokens: int) -> list[list[int]]:
    """Group rows of similar length into microbatches of the least total cost of padding and calls (`CALL_COST`).

    Dynamic programming over the rows in order of length finds the minimum. The grouping does not change a row's loss.

    Args:
        rows: (expert, row) pairs.
        tokens: most padded tokens of a group; a longer row is a group of its own.

    Returns:
        Indices of `rows` by group; within a group, the rows of an expert are neighbours.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][1].ids))
    lengths = [len(rows[index][1].ids) for index in order]
    costs, starts = [0.0], [0]   # [n]: least cost of the n shortest rows, and where the last of their groups begins
    for stop in range(1, len(order) + 1):
        longest = lengths[stop - 1]
        first = max(0, min(stop - 1, stop - tokens // longest))
        cost, start = min((costs[start] + (stop - start) * longest + CALL_COST, start) for start in range(first, stop))
        costs.append(cost)
        starts.append(start)
    groups: list[list[int]] = []
    stop = len(order)
    while stop:
        groups.append(sorted(order[starts[stop]:stop], key=lambda index: rows[index][0]))
        stop = starts[stop]
    return groups[::-1]


def collate(rows: Sequence[tuple[int, Encoded]], device: str | torch.device = "cpu") -> Batch:
    """Make a batch of (expert, row) pairs on `device`, padded with token 0. The copy to a GPU is not waited for."""
    longest = max(len(row.ids) for _, row in rows)
    ids, is_target = np.zeros((len(rows), longest), np.int64), np.zeros((len(rows), longest), np.bool_)
    for b, (_, row) in enumerate(rows):
        ids[b, :len(row.ids)], is_target[b, :len(row.ids)] = row.ids, row.targets
    is_target[:, 0] = False   # no hidden state predicts a row's first token
    owner_rows, columns = is_target.nonzero()
    experts = [expert for expert, _ in rows]
    pinned = torch.device(device).type == "cuda"

    def moved(values: Any) -> Tensor:
        tensor = torch.from_numpy(np.asarray(values, np.int64))
        return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=pinned)

    return Batch(moved(ids), experts, moved(experts), moved(owner_rows * longest + columns - 1),
                 moved(ids[owner_rows, columns]), moved(owner_rows), moved([row.question_tokens for _, row in rows]),
                 len(rows) * longest)


@contextmanager
def projecting_only(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Within the block, the model projects only these hidden states to logits: (N, V) instead of (B, T, V).

    `positions` (N) are flat positions b * T + t. The hook is on the projection, so that whatever the model does to its
    logits afterwards still happens.
    """
    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].flatten(0, 1)[positions], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def row_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Summed negative log-likelihood, in nats, of each row's target tokens: (B,). Padding and prompts add nothing.

    The sum is scattered by row, never masked by a product, so that NaN in one row stays in its sum.
    """
    if batch.ids.device.type in PROJECTED_ON and _ends_with_projection.get(model):
        nll_N = _projected_losses(model, batch)
    else:
        projected: list[Tensor] = []
        head = model.get_output_embeddings()
        hook = head.register_forward_hook(lambda _, __, output: projected.append(output))
        try:
            with projecting_only(model, batch.positions):
                logits = model(input_ids=batch.ids, use_cache=False).logits
        finally:
            hook.remove()
        _ends_with_projection[model] = (type(head) is nn.Linear and head.bias is None and len(projected) == 1
                                        and logits is projected[0])
        nll_N = TargetLoss.apply(logits, batch.targets)
    return torch.zeros(len(batch.ids), dtype=nll_N.dtype, device=nll_N.device).index_add(0, batch.rows, nll_N)


def _projected_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The negative log-likelihood of each target, (N), by `ProjectedLoss` in place of the model's projection."""
    head = model.get_output_embeddings()
    head.forward = lambda hidden_BTH: ProjectedLoss.apply(hidden_BTH.flatten(0, 1)[batch.positions], head.weight,
                                                          batch.targets)
    try:
        nll_N: Tensor = model(input_ids=batch.ids, use_cache=False).logits
    finally:
        del head.forward
    return nll_N


class ProjectedLoss(torch.autograd.Function):
    """`TargetLoss` of hidden states (N, H) through the frozen output projection (V, H): to (N), in float32 at least.

    The logits of LOGITS_BYTES at a time are in memory, never all of them: the gradient of the hidden states is computed
    with the loss, and the backward only scales it (as in Hsu et al. 2024, arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets: Tensor) -> Tensor:
        nll, wanted = [], ctx.needs_input_grad[0]
        grad_NH = torch.empty_like(hidden_NH) if wanted else None
        chunk = max(LOGITS_BYTES // (4 * len(weight_VH)), 1)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits_CV = _at_least_float32(hidden_NH[part] @ weight_VH.t())
            total_C1 = logits_CV.logsumexp(-1, keepdim=True)
            target_C1 = targets[part].unsqueeze(1)
            nll.append((total_C1 - logits_CV.gather(1, target_C1)).squeeze(1))
            if grad_NH is not None:   # softmax(logits) - onehot(target), through the projection
                softmax_CV = logits_CV.sub_(total_C1).exp_()
                softmax_CV.scatter_add_(1, target_C1, softmax_CV.new_full((1, 1), -1.0).expand_as(target_C1))
                torch.mm(softmax_CV.to(weight_VH.dtype), weight_VH, out=grad_NH[part])
        ctx.save_for_backward(grad_NH)
        return torch.cat(nll) if nll else hidden_NH.new_zeros(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, None, None]:
        grad_NH, = ctx.saved_tensors
        return None if grad_NH is None else grad_NH * grad_N.unsqueeze(1).to(grad_NH.dtype), None, None


class TargetLoss(torch.autograd.Function):
    """Negative log-likelihood of each target, in nats: logits (N, V) and targets (N) to (N), in float32 at least.

    Logits in half precision are converted to float32 in chunks, forward and backward: with a large vocabulary, a whole
    copy of the logits would be the largest tensor of a training step.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets: Tensor) -> Tensor:
        nll = [nn.functional.cross_entropy(_at_least_float32(chunk_CV), target, reduction="none")
               for chunk_CV, target in zip(logits_NV.split(TARGET_CHUNK), targets.split(TARGET_CHUNK), strict=True)]
        ctx.save_for_backward(logits_NV, targets)
        return torch.cat(nll)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        chunks = (tensor.split(TARGET_CHUNK) for tensor in (logits_NV, targets, grad_N, grad_NV))
        for chunk_CV, target, grad, chunk_grad in zip(*chunks, strict=True):
            # The gradient of cross-entropy is softmax(logits) - onehot(target).
            softmax_CV = _at_least_float32(chunk_CV).softmax(-1)
            softmax_CV[torch.arange(len(target), device=target.device), target] -= 1
            chunk_grad.copy_(softmax_CV.mul_(grad.unsqueeze(1)))
        return grad_NV, None


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype.itemsize < 4 else logits
