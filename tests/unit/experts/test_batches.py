"""The loss of a batch, and how rows are grouped into batches, against plain computations."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moa.base.encoding import Encoded
from moa.experts.batches import CALL_COST, TargetLoss, collate, microbatches


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The loss.

@pytest.mark.parametrize("count", [1, 64, 150])
def test_the_loss_is_cross_entropy(count: int) -> None:
    targets = torch.randint(0, 30, (count,), generator=torch.Generator().manual_seed(1))
    found = []
    for loss in (TargetLoss.apply, lambda *args: torch.nn.functional.cross_entropy(*args, reduction="none")):
        logits = draw(count, 30).requires_grad_()
        nll_N = loss(logits, targets)
        (nll_N * draw(count, seed=2)).sum().backward()
        found.append((nll_N.detach(), logits.grad))
    for ours, plain in zip(*found, strict=True):
        assert (ours - plain).abs().max() < 1e-12


def test_the_loss_of_half_precision_is_in_full_and_one_rows_nan_stays_its_own() -> None:
    logits = draw(70, 30).bfloat16()
    logits[3, 5] = float("nan")
    targets = torch.arange(70) % 30
    logits.requires_grad_()
    nll_N = TargetLoss.apply(logits, targets)
    nll_N.sum().backward()
    exact = torch.nn.functional.cross_entropy(logits.detach().float(), targets, reduction="none")
    assert nll_N.dtype == torch.float32 and logits.grad is not None and logits.grad.dtype == torch.bfloat16
    assert torch.equal(nll_N.isnan(), torch.arange(70) == 3) and torch.equal(logits.grad.isnan().any(1), nll_N.isnan())
    assert torch.allclose(nll_N.nan_to_num(), exact.nan_to_num())


# Grouping.

def cost(groups: list[list[int]], lengths: list[int]) -> int:
    return sum(len(group) * max(lengths[index] for index in group) + CALL_COST for group in groups)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=7), budget=st.integers(1, 160))
def test_no_other_grouping_by_length_costs_less(lengths: list[int], budget: int) -> None:
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    best = float("inf")
    for cuts in range(2 ** (len(order) - 1)):   # every way to cut the sorted rows
        groups = [[order[0]]]
        for place, index in enumerate(order[1:]):
            groups.append([index]) if cuts >> place & 1 else groups[-1].append(index)
        if all(len(group) == 1 or len(group) * max(lengths[index] for index in group) <= budget for group in groups):
            best = min(best, cost(groups, lengths))
    found = microbatches([(0, Encoded([1] * length, [True] * length)) for length in lengths], budget)
    assert sorted(index for group in found for index in group) == list(range(len(lengths)))
    assert cost(found, lengths) == best


def test_grouping_many_rows_pads_little() -> None:
    source = random.Random(0)
    lengths = [source.randint(30, 160) for _ in range(64)]
    found = microbatches([(0, Encoded([1] * length, [True] * length)) for length in lengths], 768)
    padded = sum(len(group) * max(lengths[index] for index in group) for group in found)
    assert padded / sum(lengths) < 1.1


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 30)), min_size=1, max_size=12), st.integers(8, 120))
def test_within_a_group_the_rows_of_an_expert_are_neighbours(drawn: list[tuple[int, int]], budget: int) -> None:
    rows = [(expert, Encoded([1] * length, [True] * length)) for expert, length in drawn]
    for group in microbatches(rows, budget):
        experts = [rows[index][0] for index in group]
        assert experts == sorted(experts)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=5))
def test_a_batch_has_the_targets_of_its_rows(drawn: list[list[bool]]) -> None:
    rows = [(expert, Encoded([10 * expert + place for place in range(len(targets))], targets))
            for expert, targets in enumerate(drawn)]
    batch = collate(rows)
    longest = max(map(len, drawn))
    expected = [(expert, place) for expert, targets in enumerate(drawn) for place, target in enumerate(targets)
                if target and place]
    assert batch.experts == batch.owners.tolist() == list(range(len(drawn)))
    assert batch.ids.shape == (len(drawn), longest)
    assert batch.rows.tolist() == [row for row, _ in expected]
    assert batch.positions.tolist() == [row * longest + place - 1 for row, place in expected]
    assert batch.targets.tolist() == [10 * row + place for row, place in expected]
    assert [batch.ids[row, :len(targets)].tolist() for row, targets in enumerate(drawn)] == [row.ids for _, row in rows]
