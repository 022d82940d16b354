"""The compiled decoding step against transformers' modules.

In float32, where both sides have the same precision; bfloat16 by its distance from float64.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from moa.base.kernels import build
from moa.experts.lora import ExpertStack, LoraSpec
from moa.mixture.generation import decoding, engine, native
from moa.mixture.generation.decoding import Decoding
from moa.mixture.generation.native import CompiledDecoding
from tests.unit.mixture.generation.test_decoding import agree, prompts_of, walk

FAST = ("llama", "qwen2")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(
    build.library_for("step", torch.bfloat16) is None, reason="this CPU does not multiply bfloat16"))]
pytestmark = pytest.mark.skipif(build.library_for("step", torch.float32) is None, reason="no compiler, or another CPU")


def model_of(architecture: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Wide enough for tiles and lanes, with an odd vocabulary; the same weights in every dtype."""
    config = AutoConfig.for_model(architecture, **{
        "vocab_size": 259, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512} | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
    random = torch.Generator().manual_seed(7)
    for name, weight in model.named_parameters():
        weight.normal_(1 if "norm" in name else 0, 0.1, generator=random)
    return model.to(torch.bfloat16).to(dtype)


def stack_on(model: Any, *ranks: int) -> ExpertStack:
    dtype = torch.promote_types(model.dtype, torch.float32)
    stack = ExpertStack(model, [LoraSpec(rank, 8.0) for rank in ranks], dtype=dtype)
    stack.weights.copy_(torch.randn(stack.weights.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return stack


@pytest.mark.parametrize("architecture", FAST)
@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(1, 20), st.integers(-1, 1)), min_size=1, max_size=19), data=st.data())
def test_the_compiled_step_computes_what_the_model_does(architecture: str, rows: list[tuple[int, int]],
                                                        data: st.DataObject) -> None:
    """Padding, rows without an expert, rows that leave, more rows than a tile, and a cache that grows."""
    stack = stack_on(model_of(architecture), 2, 5)
    assert decoding.supports_step(stack.model) and native.supports_native(stack.model)
    agree(stack, CompiledDecoding, rows, data, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_logits_do_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    """To the last bit, once the prompts are read."""
    stack = stack_on(model_of("llama", dtype), 2, 5)
    chosen = torch.tensor([0, 1, -1] * 7)[:19]
    tokens = torch.arange(19) + 40
    with torch.inference_mode():
        def begun() -> Decoding:
            stack.select(chosen)
            return CompiledDecoding(stack.model, *prompts_of([3, 9, 17, 5] * 4 + [2, 8, 13]))

        together = begun().step(tokens)
        for row in (0, 7, 18):
            alone = begun()
            alone.keep(torch.tensor([row]))
            assert torch.equal(alone.step(tokens[[row]])[0], together[row])
    assert (together[0] - together[4]).abs().max() > 0.1


def test_an_expert_that_is_no_number_stays_its_own() -> None:
    stack = stack_on(model_of("llama"), 2, 2)
    healthy = walk(CompiledDecoding, stack, [4, 6, 5], [1, -1, 0], [], 3)
    stack.weights[0] = torch.nan
    stack.changed()
    broken = walk(CompiledDecoding, stack, [4, 6, 5], [1, -1, 0], [], 3)
    for one, same in zip(healthy, broken, strict=True):
        assert torch.equal(one[:2], same[:2])
    assert broken[-1][2].isnan().all()


def test_biases_and_a_scaled_rotation_are_the_models_own() -> None:
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    stack = stack_on(model_of("llama", attention_bias=True, mlp_bias=True, rope_parameters=scaled), 3)
    assert native.supports_native(stack.model)
    plain, fast = (walk(kind, stack, [40, 9, 33], [0, -1, 0], [[2, 0]], 4) for kind in (Decoding, CompiledDecoding))
    for one, same in zip(plain, fast, strict=True):
        torch.testing.assert_close(same, one, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("groups", [(8, 1), (4, 4), (6, 1)])
def test_heads_in_groups_of_any_size(groups: tuple[int, int]) -> None:
    """More queries of a key head than are mixed side by side, one, and a number that leaves a rest."""
    heads, keys = groups
    stack = stack_on(model_of("llama", hidden_size=32 * heads, num_attention_heads=heads, num_key_value_heads=keys), 3)
    assert native.supports_native(stack.model)
    plain, fast = (walk(kind, stack, [4, 20], [0, 0], [], 4) for kind in (Decoding, CompiledDecoding))
    for one, same in zip(plain, fast, strict=True):
        torch.testing.assert_close(same, one, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["v_proj"], ["up_proj", "o_proj"]])
def test_experts_on_some_layers_only(targets: list[str]) -> None:
    stack = ExpertStack(model_of("llama"), [LoraSpec(3, 6.0)], targets)
    stack.weights.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    plain, fast = (walk(kind, stack, [3, 9], [0, 0], [], 4) for kind in (Decoding, CompiledDecoding))
    torch.testing.assert_close(fast, plain, atol=2e-4, rtol=1e-4)


@pytest.mark.skipif(build.library_for("step", torch.bfloat16) is None, reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("architecture", FAST)
def test_bfloat16_steps_are_as_near_to_float64_as_the_models_own(architecture: str) -> None:
    exact, rough = (stack_on(model_of(architecture, dtype), 2, 5) for dtype in (torch.float64, torch.bfloat16))
    wanted, own, ours = (torch.stack(walk(kind, stack, [3, 8, 5, 8], [0, 1, -1, 0], [], 6)[:2])
                         for kind, stack in ((Decoding, exact), (Decoding, rough), (CompiledDecoding, rough)))
    assert (ours - wanted).abs().mean() < 1.5 * (own - wanted).abs().mean()


def test_what_the_tiles_do_not_fill_is_decoded_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4))
    assert decoding.supports_step(narrow) and not native.supports_native(narrow)
    other = model_of("llama")
    assert engine._decoding_class(other) is CompiledDecoding
    assert engine._decoding_class(other.double()) is decoding.LlamaDecoding
    other = model_of("llama")
    other.config.hidden_act = "gelu"
    assert not native.supports_native(other)
    monkeypatch.setattr("moa.mixture.generation.native.MEMORY_SHARE", 0)
    assert not native.supports_native(model_of("llama"))
