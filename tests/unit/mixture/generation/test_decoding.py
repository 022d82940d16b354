"""The written-out decoding step against transformers' own forward, in float64, and weights packed for the compiled one
(`test_native.py`)."""

import copy
import gc
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers import GenerationConfig as HfGenerationConfig

from moa.experts.lora import ExpertStack, LoraSpec
from moa.mixture.generation import decoding, engine, native
from moa.mixture.generation.decoding import Decoding, LlamaDecoding
from moa.mixture.generation.engine import GenerationConfig
from tests import tiny

FAST = ("llama", "qwen2")
SPECS = [LoraSpec(2, 4.0), LoraSpec(3, 3.0, rslora=True)]


@cache
def model_of(architecture: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A toy whose weights are large enough to say something else at every position."""
    with TemporaryDirectory() as folder:
        tiny.base(Path(folder), architecture=architecture)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **changes).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(7)
    for weight in model.parameters():
        weight.normal_(0, 0.3, generator=random)
    return model


def stack_on(model: Any, targets: str | list[str] = "all-linear") -> ExpertStack:
    """Random experts on a model of its own modules over the same weights."""
    own = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    stack = ExpertStack(own, SPECS, targets, dtype=torch.promote_types(model.dtype, torch.float32))
    stack.weights.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return stack


def prompts_of(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(len(lengths))
    return engine._padded([torch.randint(3, 250, (length,), generator=random).tolist() for length in lengths])


def walk(kind: type[Decoding], stack: ExpertStack, lengths: list[int], experts: list[int], stays: list[list[int]],
         steps: int) -> list[torch.Tensor]:
    """Logits of greedy steps, those rows of `stays` going on after each `steps`."""
    seen = []
    with torch.inference_mode():
        chosen = torch.tensor(experts)
        stack.select(chosen)
        batch = kind(stack.model, *prompts_of(lengths))
        for stay in [*stays, []]:
            for _ in range(steps):
                seen.append(batch.logits_BV.clone())
                batch.step(batch.logits_BV.argmax(-1))
            if stay:
                chosen = chosen[stay]
                stack.select(chosen)
                batch.keep(torch.tensor(stay))
    stack.select(None)
    return seen


def agree(stack: ExpertStack, kind: type[Decoding], rows: list[tuple[int, int]], data: st.DataObject,
          **tolerance: float) -> None:
    """Decode rows of (length, expert), some of which leave, with `kind` and with the plain way: the same logits."""
    lengths, experts = map(list, zip(*rows, strict=True))
    stay = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=len(rows), unique=True))
    steps = data.draw(st.sampled_from([3, 2 * decoding.CHUNK // 3]))
    plain, fast = (walk(each, stack, lengths, experts, [stay], steps) for each in (Decoding, kind))
    for one, same in zip(plain, fast, strict=True):
        torch.testing.assert_close(same, one, **tolerance)


# The step.

@pytest.mark.parametrize("architecture", FAST)
@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(1, 20), st.integers(-1, 1)), min_size=1, max_size=5), data=st.data())
def test_the_written_out_step_computes_what_the_model_does(architecture: str, rows: list[tuple[int, int]],
                                                           data: st.DataObject) -> None:
    """Padding, rows without an expert, rows that leave, and a cache that grows more than once."""
    stack = stack_on(model_of(architecture))
    assert decoding.supports_step(stack.model)
    agree(stack, LlamaDecoding, rows, data, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["v_proj"], ["up_proj", "o_proj"]])
def test_experts_on_some_layers_only(targets: list[str]) -> None:
    stack = stack_on(model_of("llama"), targets)
    plain, fast = (walk(kind, stack, [3, 9], [1, 0], [], 4) for kind in (Decoding, LlamaDecoding))
    torch.testing.assert_close(fast, plain, atol=1e-9, rtol=1e-9)
    alone = walk(LlamaDecoding, stack, [3, 9], [-1, -1], [], 4)
    assert (alone[0] - fast[0]).abs().max() > 0.1   # the experts do something


def test_an_expert_that_is_no_number_stays_its_own() -> None:
    stack = stack_on(model_of("llama"))
    healthy = walk(LlamaDecoding, stack, [4, 6], [1, -1], [], 3)
    stack.weights[0] = torch.nan
    stack.changed()
    for one, same in zip(healthy, walk(LlamaDecoding, stack, [4, 6], [1, -1], [], 3), strict=True):
        assert torch.equal(one, same)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers_generate(architecture: str) -> None:
    model = model_of(architecture)
    ids, mask = prompts_of([5, 12, 1])
    written = engine.decode(model, tiny.tokenizer(), [row[mask[b] == 1].tolist() for b, row in enumerate(ids)], 80,
                            GenerationConfig())
    reference = model.generate(ids, attention_mask=mask, generation_config=HfGenerationConfig(
        max_new_tokens=80, do_sample=False))[:, ids.shape[1]:].tolist()
    assert len({tuple(row) for row in reference}) == 3
    for ours, theirs in zip(written, reference, strict=True):
        assert len(ours.ids) > 1 and ours.ids == theirs[:len(ours.ids)]


def test_a_scaled_rotation_is_the_models_own() -> None:
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    with TemporaryDirectory() as folder:
        tiny.base(Path(folder))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, rope_parameters=scaled).eval()
    assert model.model.rotary_emb.rope_type == "llama3"
    stack = stack_on(model.requires_grad_(False))
    plain, fast = (walk(kind, stack, [40, 50], [0, 1], [], 5) for kind in (Decoding, LlamaDecoding))
    torch.testing.assert_close(fast, plain, atol=1e-9, rtol=1e-9)


def test_other_models_keep_their_own_forward() -> None:
    assert [decoding.supports_step(model_of(architecture)) for architecture in tiny.ARCHITECTURES] == [True, True,
                                                                                                       False]
    sliding = copy.copy(model_of("qwen2"))
    sliding.config = copy.deepcopy(sliding.config)
    sliding.config.layer_types = ["full_attention", "sliding_attention"]
    assert not decoding.supports_step(sliding)
    stack = stack_on(model_of("llama"))
    stack.blend(torch.tensor([[0.5, 0.5]]))
    assert not decoding.supports_step(stack.model)


# Packed weights.

@pytest.mark.parametrize("pair", [1, 2])
def test_packed_weights_are_the_layers_side_by_side(pair: int) -> None:
    layers = [nn.Linear(12, 8), nn.Linear(12, 2, bias=False)]
    weight, bias_O = native.packed(layers, 4, pair)
    together = torch.cat([layer.weight for layer in layers])
    assert torch.equal(weight.transpose(1, 2).reshape(16, 12), functional.pad(together, (0, 0, 0, 6)))
    assert bias_O is not None and torch.equal(bias_O, functional.pad(layers[0].bias, (0, 8)))
    assert native.packed(layers, 4, pair)[0] is weight


def test_packed_weights_go_with_the_model() -> None:
    before, layers = len(native._packed), [nn.Linear(8, 8)]
    native.packed(layers, 8, 1)
    assert len(native._packed) == before + 1
    layers.clear()
    gc.collect()
    assert len(native._packed) == before


def test_no_more_is_packed_than_the_memory_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Linear(8, 8), nn.Linear(8, 8)]
    assert native.fits_in_memory([layers])
    monkeypatch.setattr(native, "MEMORY_SHARE", 0)
    assert not native.fits_in_memory([layers])
    native.packed(layers, 8, 1)
    assert native.fits_in_memory([layers])   # both are there already
    assert not native.fits_in_memory([layers, [nn.Linear(8, 8)]])


def test_bfloat16_steps_are_as_near_to_float64_as_the_models_own() -> None:
    exact, rough = (stack_on(model_of("llama", dtype)) for dtype in (torch.float64, torch.bfloat16))
    rough.weights.copy_(exact.weights)
    ids, mask = prompts_of([3, 8, 5, 8])
    tokens = torch.randint(3, 250, (4,), generator=torch.Generator().manual_seed(3))
    errors = []
    with torch.inference_mode():
        wanted = after(Decoding, exact, ids, mask, tokens)
        errors = [(after(kind, rough, ids, mask, tokens) - wanted).abs().mean().item()
                  for kind in (Decoding, LlamaDecoding)]
    assert errors[1] < 1.5 * errors[0]


def after(kind: type[Decoding], stack: ExpertStack, ids: torch.Tensor, mask: torch.Tensor,
          tokens: torch.Tensor) -> torch.Tensor:
    stack.select(torch.tensor([0, 1, -1, 0]))
    logits = kind(stack.model, ids, mask).step(tokens)
    stack.select(None)
    return logits
