"""Batches of training rows: their grouping by length, their padding to tensors, and the loss of each row.

Shapes: B rows, T positions, N target tokens of a batch, V words, C targets of a chunk.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moa.base.encoding import Encoded

CALL_COST = 96      # fixed cost of a forward and backward: the number of padded tokens that take as long
TARGET_CHUNK = 64   # targets whose logits are converted to float32 at a time


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right, with their target tokens.

    A causal model needs no attention mask for them: padding comes after a row's tokens, which do not attend to it, and
    padding is never a target.
    """

    ids: Tensor         # (B, T)
    owners: Tensor      # (B,) expert of each row
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
        Indices of `rows` by group.
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
        groups.append(order[starts[stop]:stop])
        stop = starts[stop]
    return groups[::-1]


def collate(rows: Sequence[tuple[int, Encoded]], device: str | torch.device = "cpu") -> Batch:
    """Make a batch of (expert, row) pairs on `device`, padded with token 0."""
    longest = max(len(row.ids) for _, row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    positions, targets, owner_rows = [], [], []
    for b, (_, row) in enumerate(rows):
        ids[b, :len(row.ids)] = torch.tensor(row.ids)
        for t, target in enumerate(row.targets):
            if target and t:
                positions.append(b * longest + t - 1)
                targets.append(row.ids[t])
                owner_rows.append(b)
    as_tensor = lambda values: torch.tensor(values, dtype=torch.long, device=device)  # noqa: E731
    return Batch(ids.to(device), as_tensor([expert for expert, _ in rows]), as_tensor(positions), as_tensor(targets),
                 as_tensor(owner_rows),
                 as_tensor([row.question_tokens for _, row in rows]), len(rows) * longest)


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
    with projecting_only(model, batch.positions):
        logits = model(input_ids=batch.ids, use_cache=False).logits
    nll_N = TargetLoss.apply(logits, batch.targets)
    return torch.zeros(len(batch.ids), dtype=nll_N.dtype, device=nll_N.device).index_add(0, batch.rows, nll_N)


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
