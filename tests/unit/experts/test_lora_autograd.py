"""The LoRA product in training, written out and in C, against a plain one: its numbers and gradients."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moa.base.kernels import build
from moa.experts.lora_autograd import CompiledProduct, LoraProduct, add_lora

E, R, B, T, I, O = 3, 2, 4, 5, 6, 7  # noqa: E741 - as in the module
ROWS = torch.tensor([2, 0, 2, 0])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# In torch.

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


# In C.

in_c = pytest.mark.skipif(build.library_for("lora", torch.float32) is None, reason="no compiler, or another CPU")


@in_c
@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 9), length=st.integers(1, 20), rows=st.lists(st.integers(-1, 3), min_size=1, max_size=6),
       wide=st.sampled_from([(16, 48), (48, 16), (320, 288)]), folded=st.booleans())
def test_the_product_in_c_is_that_of_torch(rank: int, length: int, rows: list[int], wide: tuple[int, int],
                                           folded: bool) -> None:
    lora = build.library_for("lora", torch.float32)
    random = torch.Generator().manual_seed(rank)
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    x_BTI, grad_BTO, weight_OI = draw(len(rows), length, wide[0]), draw(len(rows), length, wide[1]), draw(*wide[::-1])
    a_ERI, b_EOR, scale_E = draw(4, rank, wide[0]), draw(4, wide[1], rank), draw(4).abs()
    chosen = torch.tensor(rows)
    inactive = (chosen < 0).view(-1, 1, 1) if min(rows) < 0 else None
    found = []
    for apply, dtype in ((LoraProduct.apply, torch.float64), (partial(CompiledProduct.apply, lora), torch.float32)):
        x, weight, a, b, scale, grad = (each.to(dtype) for each in (x_BTI, weight_OI, a_ERI, b_EOR, scale_E, grad_BTO))
        for each in (x, a, b):
            each.requires_grad_()
        y = (x.detach() if folded else x) @ weight.T
        out = apply(y, x, weight if folded else None, a, b, scale, chosen.clamp(min=0), inactive)
        out.backward(grad)
        found.append([out.detach(), x.grad, a.grad, b.grad])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), plain, atol=1e-3, rtol=1e-4)


@in_c
def test_rows_that_c_does_not_read_are_for_torch() -> None:
    def added(rows: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
        return add_lora(draw(2, 3, 32), draw(2, 3, 16), None, draw(4, 2, 16), draw(4, 32, 2), draw(4), rows, None)

    rows = torch.tensor([3, 1])
    torch.testing.assert_close(added(rows.int()), added(rows))


@in_c
def test_in_c_too_a_broken_expert_stays_its_own() -> None:
    lora = build.library_for("lora", torch.float32)
    random = torch.Generator().manual_seed(0)
    a_ERI, b_EOR = torch.randn(2, 3, 16, generator=random), torch.randn(2, 32, 3, generator=random)
    a_ERI[0] = float("nan")
    a_ERI.requires_grad_(), b_EOR.requires_grad_()
    inactive = torch.tensor([False, False, True]).view(-1, 1, 1)
    x_BTI = torch.randn(3, 4, 16, generator=random)
    out = CompiledProduct.apply(lora, torch.zeros(3, 4, 32), x_BTI, None, a_ERI, b_EOR, torch.ones(2),
                                torch.tensor([0, 1, 0]), inactive)
    out.sum().backward()
    assert out[0].isnan().all() and out[1].isfinite().all() and torch.equal(out[2], torch.zeros(4, 32))
    assert a_ERI.grad is not None and b_EOR.grad is not None
    assert a_ERI.grad[1].isfinite().all() and b_EOR.grad[1].isfinite().all() and b_EOR.grad[0].isnan().any()
