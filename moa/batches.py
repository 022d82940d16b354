"""Rows of token ids to padded tensors, and the completion loss of each expert. Knows nothing of files or schedules.

Shapes: B rows, T positions, N target tokens of a batch, V vocabulary, E experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moa.tokens import Encoded


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
    (a single longer row makes a group of its own). Which rows share a forward has no part in the mathematics."""
    groups: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i][1].ids)):
        if groups and (len(groups[-1]) + 1) * len(rows[index][1].ids) <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


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
    """Inside, the model's output projection sees only these flat positions, so that logits are (N, V), not (B, T, V).

    Hooking the projection keeps whatever a model does to its logits afterwards.
    """
    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].flatten(0, 1)[positions], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def row_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Summed negative log-likelihood, in nats, of each row's target tokens: (B,). Padding and prompts count nothing.

    The sum is scattered by row, never masked by a product, so that one row's NaN stays its own.
    """
    with projecting_only(model, batch.positions):
        logits = model(input_ids=batch.ids, use_cache=False).logits
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    nll_N = nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    return torch.zeros(len(batch.ids), dtype=nll_N.dtype, device=nll_N.device).index_add(0, batch.rows, nll_N)
