"""Rows of token ids to padded tensors, and the completion loss of each row.

Shapes: B rows, T positions, N target tokens of a batch, V vocabulary, E experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moa.base.encoding import Encoded

CALL = 96    # padded tokens that take as long as one more forward and backward
CHUNK = 64   # targets whose logits are converted to full precision at a time


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded rows. A causal model needs no attention mask for these: padding comes after every real token, so no
    real token sees it, and no target lies in it."""

    ids: Tensor         # (B, T)
    owners: Tensor      # (B,) expert of each row
    positions: Tensor   # (N,) flat positions b * T + t whose hidden state predicts a target
    targets: Tensor     # (N,) the token to predict
    rows: Tensor        # (N,) row of each target
    prompts: Tensor     # (B,) tokens before each row's last answer
    padded_tokens: int


def microbatches(rows: Sequence[tuple[int, Encoded]], tokens: int) -> list[list[int]]:
    """Indices of `rows` (expert, row), grouped by length so that no group has more than `tokens` padded tokens
    (a single longer row makes a group of its own). The total cost of padding and calls is the least possible. Which
    rows share a forward does not change their losses."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][1].ids))
    lengths = [len(rows[index][1].ids) for index in order]
    costs, starts = [0.0], [0]   # of the first n rows; where the last group of these begins
    for stop in range(1, len(order) + 1):
        longest = lengths[stop - 1]
        first = max(0, min(stop - 1, stop - tokens // longest))
        cost, start = min((costs[start] + (stop - start) * longest + CALL, start) for start in range(first, stop))
        costs.append(cost)
        starts.append(start)
    groups: list[list[int]] = []
    stop = len(order)
    while stop:
        groups.append(order[starts[stop]:stop])
        stop = starts[stop]
    return groups[::-1]


def collate(rows: Sequence[tuple[int, Encoded]], device: str | torch.device = "cpu") -> Batch:
    """Pad (expert, row) pairs on the right with token 0."""
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
    """Within the block, the output projection reads only these flat positions: logits are (N, V), not (B, T, V).

    A hook on the projection leaves what the model does to its logits afterwards unchanged.
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
    """Negative log-likelihood of each target (N,), in float32 at least. Of logits in half precision no copy in full is
    made but for a few rows at a time: with large vocabularies that copy is the largest tensor of a step."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets: Tensor) -> Tensor:
        nll = [nn.functional.cross_entropy(_full(part_CV), target, reduction="none")
               for part_CV, target in zip(logits_NV.split(CHUNK), targets.split(CHUNK), strict=True)]
        ctx.save_for_backward(logits_NV, targets)
        return torch.cat(nll)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        for part_CV, target, grad, out in zip(*(each.split(CHUNK) for each in (logits_NV, targets, grad_N, grad_NV)),
                                              strict=True):
            likely_CV = _full(part_CV).softmax(-1)
            likely_CV[torch.arange(len(target), device=target.device), target] -= 1
            out.copy_(likely_CV.mul_(grad.unsqueeze(1)))
        return grad_NV, None


def _full(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype.itemsize < 4 else logits
