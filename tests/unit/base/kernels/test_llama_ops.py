"""Training of a model whose modules moa's C replaces, against training of the model itself: float32 against float64,
bfloat16 by its distance from float64."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from moa.base.kernels import build
from moa.base.kernels.attention import LONGEST, short_rows
from moa.base.kernels.llama_ops import fused
from moa.experts.cotraining import recomputing
from tests.unit.mixture.generation.test_native import FAST, model_of, stack_on

pytestmark = pytest.mark.skipif(build.library_for("step", torch.float32) is None, reason="no compiler, or another CPU")


@contextmanager
def as_trained(model: Any) -> Iterator[None]:
    with short_rows(model), fused(model):
        yield


def gradients(architecture: str, dtype: torch.dtype, way: Callable[[Any], Any], length: int = 24) -> list[Tensor]:
    """Logits, and what comes back to the experts and the embeddings, of rows of three experts and the base."""
    model = model_of(architecture, dtype)
    stack = stack_on(model, 2, 5, 8).trainable(True)
    embeddings = model.get_input_embeddings().weight.requires_grad_(True)
    ids = torch.randint(3, 250, (5, length), generator=torch.Generator().manual_seed(length))
    stack.select(torch.tensor([2, 0, -1, 1, 2]))
    with way(model):
        for _ in range(2):   # gradients add up
            logits = model(ids, use_cache=False).logits
            logits.square().mean().backward()
    assert stack.gradients is not None and embeddings.grad is not None
    return [logits.detach(), stack.gradients, embeddings.grad]


@pytest.mark.parametrize("architecture", FAST)
@pytest.mark.parametrize("length", [1, 2, 31, LONGEST + 1])
def test_a_fused_model_learns_what_it_would_have(architecture: str, length: int) -> None:
    plain = gradients(architecture, torch.float64, nullcontext, length)
    ours = gradients(architecture, torch.float32, as_trained, length)
    for one, same in zip(plain, ours, strict=True):
        assert (same - one).norm() < 1e-5 * one.norm()


@pytest.mark.skipif(build.library_for("lora", torch.bfloat16) is None, reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("architecture", FAST)
def test_in_bfloat16_it_is_as_near_to_float64_as_the_model_itself(architecture: str) -> None:
    exact = gradients(architecture, torch.float64, nullcontext)
    own, ours = (gradients(architecture, torch.bfloat16, way) for way in (nullcontext, as_trained))
    for wanted, theirs, same in zip(exact, own, ours, strict=True):
        assert (same - wanted).norm() < 1.5 * (theirs - wanted).norm()


def test_the_modules_are_put_back_and_layers_may_be_recomputed() -> None:
    @contextmanager
    def both(model: Any) -> Iterator[None]:
        before = [module.__dict__.get("forward") for module in model.modules()]
        with as_trained(model), recomputing(model):
            assert sum("forward" in module.__dict__ for module in model.modules()) == 2 * 4 + 1
            yield
        assert [module.__dict__.get("forward") for module in model.modules()] == before

    for one, same in zip(gradients("llama", torch.float32, as_trained), gradients("llama", torch.float32, both),
                         strict=True):
        torch.testing.assert_close(same, one)
