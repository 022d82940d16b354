"""moa's C against what it stands in for: transformers' modules, the LoRA product in torch; and how it comes to be.

In float32, where both sides have the same precision; bfloat16 by its distance from float64.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moa.base.kernels import build
from moa.base.kernels.attention import LONGEST, short_rows
from moa.base.kernels.llama_ops import fused
from moa.experts.cotraining import recomputing
from moa.experts.lora import ExpertStack, LoraSpec
from moa.experts.lora_autograd import CompiledProduct, LoraProduct, add_lora
from moa.mixture.generation import engine, llama, native
from moa.mixture.generation.decoding import Decoding
from moa.mixture.generation.native import CompiledDecoding
from tests.unit.mixture.generation.test_decoding import prompts_of, walk

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


# Decoding.

@pytest.mark.parametrize("architecture", FAST)
@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(1, 20), st.integers(-1, 1)), min_size=1, max_size=19), data=st.data())
def test_the_compiled_step_computes_what_the_model_does(architecture: str, rows: list[tuple[int, int]],
                                                        data: st.DataObject) -> None:
    """Padding, rows without an expert, rows that leave, more rows than a tile, and a cache that grows."""
    lengths, experts = map(list, zip(*rows, strict=True))
    stay = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=len(rows), unique=True))
    steps = data.draw(st.sampled_from([3, 2 * llama.CHUNK // 3]))
    stack = stack_on(model_of(architecture), 2, 5)
    assert llama.fits(stack.model) and native.fits(stack.model)
    plain, fast = (walk(kind, stack, lengths, experts, [stay], steps) for kind in (Decoding, CompiledDecoding))
    for one, same in zip(plain, fast, strict=True):
        torch.testing.assert_close(same, one, atol=2e-4, rtol=1e-4)


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
    assert native.fits(stack.model)
    plain, fast = (walk(kind, stack, [40, 9, 33], [0, -1, 0], [[2, 0]], 4) for kind in (Decoding, CompiledDecoding))
    for one, same in zip(plain, fast, strict=True):
        torch.testing.assert_close(same, one, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("groups", [(8, 1), (4, 4), (6, 1)])
def test_heads_in_groups_of_any_size(groups: tuple[int, int]) -> None:
    """More queries of a key head than are mixed side by side, one, and a number that leaves a rest."""
    heads, keys = groups
    stack = stack_on(model_of("llama", hidden_size=32 * heads, num_attention_heads=heads, num_key_value_heads=keys), 3)
    assert native.fits(stack.model)
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
    assert llama.fits(narrow) and not native.fits(narrow)
    other = model_of("llama")
    assert engine._way(other) is CompiledDecoding
    assert engine._way(other.double()) is llama.LlamaDecoding
    other = model_of("llama")
    other.config.hidden_act = "gelu"
    assert not native.fits(other)
    monkeypatch.setattr("moa.mixture.generation.packing.SHARE", 0)
    assert not native.fits(model_of("llama"))


# Training.

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


def test_rows_that_c_does_not_read_are_for_torch() -> None:
    def added(rows: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
        return add_lora(draw(2, 3, 32), draw(2, 3, 16), None, draw(4, 2, 16), draw(4, 32, 2), draw(4), rows, None)

    rows = torch.tensor([3, 1])
    torch.testing.assert_close(added(rows.int()), added(rows))


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


# How it comes to be.

def asked(folder: Path, **environment: str) -> str:
    """What another process, whose cache is `folder`, says of the library."""
    script = "from moa.base.kernels.build import library; found = library('step'); print(found and found.lanes())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                          env=os.environ | {"XDG_CACHE_HOME": str(folder)} | environment)
    return done.stdout.strip()


def test_it_is_compiled_once_and_kept(tmp_path: Path) -> None:
    assert asked(tmp_path) in ("8", "16")
    [made] = (tmp_path / "moa").iterdir()
    before = made.stat().st_mtime_ns
    assert asked(tmp_path, PATH="/usr/bin:/bin") in ("8", "16")
    assert [each.stat().st_mtime_ns for each in (tmp_path / "moa").iterdir()] == [before]


def test_processes_that_compile_at_once_leave_one_library(tmp_path: Path) -> None:
    script = "from moa.base.kernels.build import library; print(library('step').lanes())"
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE,
                                  env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}) for _ in range(3)]
    assert len({process.communicate()[0] for process in processes}) == 1
    assert all(process.returncode == 0 for process in processes) and len(list((tmp_path / "moa").iterdir())) == 1


@pytest.mark.parametrize("trouble", ["switched off", "no compiler", "a compiler that refuses", "no room"])
def test_without_it_there_is_none_and_nothing_is_left(tmp_path: Path, trouble: str) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "cc").write_text("#!/bin/sh\nexit 1\n")
    (tools / "cc").chmod(0o755)
    cache = tmp_path / "cache"
    if trouble == "switched off":
        assert asked(cache, MOA_NATIVE="0") == "None"
    elif trouble == "no compiler":
        assert asked(cache, PATH=str(tmp_path)) == "None"
    elif trouble == "a compiler that refuses":
        assert asked(cache, PATH=str(tools)) == "None"
    elif trouble == "no room":
        cache.write_text("a file where the folder should be")
        assert asked(cache) == "None"
        return
    assert not (cache / "moa").exists() or not list((cache / "moa").iterdir())


def test_a_library_that_is_cut_off_is_made_anew(tmp_path: Path) -> None:
    asked(tmp_path)
    [made] = (tmp_path / "moa").iterdir()
    made.write_bytes(made.read_bytes()[:100])
    assert asked(tmp_path) in ("8", "16")


def test_where_nothing_says_what_the_cpu_can_do_there_is_none_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CPUINFO", Path("/nowhere"))
    monkeypatch.setattr(build, "cpu", build.cpu.__wrapped__)
    assert build.library_for("step", torch.bfloat16) is None


def test_another_source_or_cpu_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "cpu", lambda: frozenset({"another"}))
    made = build.library.__wrapped__("step")
    assert isinstance(made, ctypes.CDLL) and len(list((tmp_path / "moa").iterdir())) == 1
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.__wrapped__("step")
    assert len(list((tmp_path / "moa").iterdir())) == 2
