"""What makes training quick changes none of its numbers: product, attention, loss and grouping against plain ones."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moa.base.encoding import Encoded
from moa.base.kernels.attention import LONGEST, NAME, attend, short_rows
from moa.experts.batches import CALL, TargetLoss, microbatches
from moa.experts.lora_autograd import LoraProduct
from tests.tiny import ARCHITECTURES

E, R, B, T, I, O = 3, 2, 4, 5, 6, 7  # noqa: E741 - as in the module
ROWS = torch.tensor([2, 0, 2, 0])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The product.

def plainly(y: Tensor, x: Tensor, a_ERI: Tensor, b_EOR: Tensor, scale_E: Tensor, inactive: Tensor | None) -> Tensor:
    """Row by row, as LoRA is written."""
    added = [scale_E[e] * x[b] @ a_ERI[e].T @ b_EOR[e].T for b, e in enumerate(ROWS.tolist())]
    return y + torch.stack([torch.zeros_like(each) if inactive is not None and inactive[b] else each
                            for b, each in enumerate(added)])


@pytest.mark.parametrize("inactive", [None, torch.tensor([False, True, False, False]).view(-1, 1, 1)])
@pytest.mark.parametrize("folded", [True, False])
def test_the_product_and_its_gradients_are_those_of_autograd(inactive: Tensor | None, folded: bool) -> None:
    scale_E, weight_OI, found = draw(E).abs(), draw(O, I, seed=9), []
    for compute in ("ours", "plain"):
        x, a_ERI, b_EOR = (draw(*shape, seed=seed).requires_grad_()
                           for seed, shape in enumerate([(B, T, I), (E, R, I), (E, O, R)]))
        for _ in range(2):   # two microbatches: gradients add up
            if compute == "ours":
                y = (x.detach() if folded else x) @ weight_OI.T
                out = LoraProduct.apply(y, x, weight_OI if folded else None, a_ERI, b_EOR, scale_E, ROWS, inactive)
            else:
                out = plainly(x @ weight_OI.T, x, a_ERI, b_EOR, scale_E, inactive)
            out.square().sum().backward()
        found.append([out.detach(), *(each.grad for each in (x, a_ERI, b_EOR))])
    for ours, plain in zip(*found, strict=True):
        assert (ours - plain).abs().max() < 1e-10
    assert found[0][2][1].abs().max() == 0 and found[0][2][[0, 2]].abs().sum() > 0   # nobody's rows are expert 1's


def test_experts_that_are_not_trained_get_no_gradient_and_pass_one_on() -> None:
    x = draw(B, T, I, seed=1).requires_grad_()
    a_ERI, b_EOR = draw(E, R, I, seed=2), draw(E, O, R, seed=3)
    LoraProduct.apply(draw(B, T, O), x, draw(O, I), a_ERI, b_EOR, draw(E), ROWS, None).sum().backward()
    assert x.grad is not None and x.grad.abs().min() > 0 and a_ERI.grad is None and b_EOR.grad is None


def test_a_broken_expert_reaches_neither_the_others_nor_the_bases_rows() -> None:
    a_ERI, b_EOR = draw(E, R, I, seed=2), draw(E, O, R, seed=3)
    a_ERI[0] = float("nan")
    a_ERI.requires_grad_(), b_EOR.requires_grad_()
    inactive = torch.tensor([False, True, False, False]).view(-1, 1, 1)   # expert 0 stands in for it
    out = LoraProduct.apply(draw(B, T, O), draw(B, T, I, seed=1), None, a_ERI, b_EOR, draw(E), ROWS, inactive)
    out.sum().backward()
    assert out[:3].isfinite().all() and out[3].isnan().all()
    assert a_ERI.grad is not None and b_EOR.grad is not None
    assert a_ERI.grad[1:].isfinite().all() and b_EOR.grad[1:].isfinite().all() and b_EOR.grad[0].isnan().any()


# Attention.

def model_of(architecture: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, vocab_size=40, hidden_size=32, intermediate_size=48,
                                  num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512,
                                  **ARCHITECTURES.get(architecture, {}), **more)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()


@pytest.mark.parametrize(("architecture", "more"), [
    *((architecture, {}) for architecture in ARCHITECTURES), ("falcon", {}),
    ("mistral", {"sliding_window": 3, "num_key_value_heads": 2})])
def test_short_rows_get_what_transformers_gives_them(architecture: str, more: dict[str, Any]) -> None:
    """Falcon computes its attention itself; a window is narrower than the rows."""
    model = model_of(architecture, **more)
    ids = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    weights = next(iter(model.parameters()))

    def once() -> tuple[Tensor, Tensor]:
        logits = model(ids, use_cache=False).logits
        return logits.detach(), torch.autograd.grad(logits.square().mean(), weights)[0]

    plain = once()
    with short_rows(model):
        assert (model.config._attn_implementation == NAME) == (architecture != "falcon")
        quick = once()
    assert model.config._attn_implementation == "sdpa"
    for one, other in zip(plain, quick, strict=True):
        assert (one - other).abs().max() < 1e-12


def test_what_is_not_short_and_causal_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import sdpa_attention

    asked: list[int] = []
    real = sdpa_attention.sdpa_attention_forward
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward",
                        lambda *args, **more: (asked.append(args[1].shape[2]), real(*args, **more))[1])
    module = torch.nn.Module()
    module.is_causal = True
    mask_B1TT = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    for length, keys, mask in [(LONGEST + 1, LONGEST + 1, None), (1, 1, None), (2, 9, None), (4, 4, mask_B1TT),
                               (4, 4, None), (LONGEST, LONGEST, None)]:
        attend(module, draw(1, 2, length, 4), draw(1, 2, keys, 4), draw(1, 2, keys, 4), mask)
    assert asked == [LONGEST + 1, 1, 2, 4]


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
    return sum(len(group) * max(lengths[index] for index in group) + CALL for group in groups)


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
