"""Training and decoding on a GPU equal the CPU, PEFT and experts alone. Without a GPU, the same paths run on the CPU.

These tests need torch, transformers and PEFT alone: `benchmarks/gpu.sh` runs them on machines that have nothing else.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from moa.base.encoding import Encoded
from moa.experts import batches, lora_autograd
from moa.experts.batches import ProjectedLoss, TargetLoss, collate, microbatches, row_losses
from moa.experts.cotraining import Learner, cotrain, recomputing
from moa.experts.lora import BASE_ONLY, ExpertStack, LoraSpec
from moa.experts.lora_autograd import GroupedProduct, LoraProduct, RowGroups
from moa.mixture.generation import static_decoding
from moa.mixture.generation.engine import GenerationConfig, GenerationRequest, generate_batch

pytestmark = pytest.mark.cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY, SPEC = 96, LoraSpec(8, 16.0)
PARAMS = SimpleNamespace(epochs=2, batch_rows=4, rows_per_epoch=0, validation_rows=4, patience=0, learning_rate=5e-3,
                         warmup=0.1, weight_decay=0.01, max_grad_norm=1.0, seed=0)


@pytest.fixture(autouse=True)
def paths_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU computes what a GPU would, and float32 products of a GPU are exact."""
    monkeypatch.setattr(lora_autograd, "GROUPED_ON", ("cuda", "cpu"))
    monkeypatch.setattr(batches, "PROJECTED_ON", ("cuda", "cpu"))
    monkeypatch.setattr(static_decoding, "STATIC_ON", ("cuda", "cpu"))
    monkeypatch.setattr(static_decoding, "ROOM", 8)   # a cache that has to grow
    monkeypatch.setattr(batches, "LOGITS_BYTES", 4 * VOCABULARY * 5)   # several chunks of five targets
    yield


def model(device: str = DEVICE, dtype: torch.dtype = torch.float32) -> Any:
    config = Qwen2Config(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                         tie_word_embeddings=False, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return made.to(device, dtype).eval().requires_grad_(False)


def stacked(base: Any, experts: int, spread: float = 0.1) -> ExpertStack:
    """Experts whose B is not zero, the same on every device."""
    stack = ExpertStack(base, [SPEC] * experts)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        stack.weights.copy_(torch.randn(stack.weights.shape, generator=draw) * spread)
    stack.changed()
    return stack


def rows_of(expert: int, count: int) -> list[Encoded]:
    """Rows of different lengths, whose answers repeat their prompt: there is something to learn."""
    draw = torch.Generator().manual_seed(expert)
    rows = []
    for number in range(count):
        prompt = torch.randint(1, VOCABULARY, (5 + number % 4,), generator=draw).tolist()
        rows.append(Encoded([*prompt, *prompt], [False] * len(prompt) + [True] * len(prompt)))
    return rows


def close(one: Tensor, other: Tensor, relative: float = 2e-4) -> bool:
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    return bool((one - other).norm() <= relative * max(other.norm().item(), 1e-6))


# The products.

@pytest.mark.parametrize("rows", [[0, 0, 1, 2, 2], [1, 1, 1], [2, 0, 0], [BASE_ONLY, BASE_ONLY, 0, 2]])
@pytest.mark.parametrize("through", [True, False], ids=["plain layer", "layer with a backward of its own"])
def test_the_grouped_product_has_the_results_and_gradients_of_the_product_row_by_row(rows: list[int],
                                                                                     through: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    experts, rank, inputs, outputs = 3, 8, 32, 48

    def number(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(DEVICE)

    weight_OI, x, upstream = number(outputs, inputs), number(len(rows), 7, inputs), number(len(rows), 7, outputs)
    a, b, scale = number(experts, rank, inputs), number(experts, outputs, rank), number(experts)
    groups = RowGroups.of(rows, DEVICE)
    assert groups is not None
    index = torch.tensor([max(row, 0) for row in rows], device=DEVICE)
    inactive = torch.tensor([row < 0 for row in rows], device=DEVICE).view(-1, 1, 1)
    found = []
    for kind in (LoraProduct, GroupedProduct):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
        y = (leaves[0].detach() if through else leaves[0]) @ weight_OI.t()
        which = (index, inactive if min(rows) < 0 else None) if kind is LoraProduct else (groups,)
        out = kind.apply(y, leaves[0], weight_OI if through else None, leaves[1], leaves[2], scale, *which)
        out.backward(upstream)
        found.append([out, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        assert close(one, other, 1e-5)


def test_rows_that_are_apart_have_no_groups() -> None:
    assert RowGroups.of([0, 1, 0], DEVICE) is None and RowGroups.of([0, BASE_ONLY], DEVICE) is None
    assert RowGroups.of([BASE_ONLY], DEVICE) is None
    found = RowGroups.of([BASE_ONLY, 2, 2, 0], DEVICE)
    assert found is not None and found.first == 1
    assert found.experts_G.tolist() == [2, 0] and found.offsets_G(5).tolist() == [10, 15]


def test_the_loss_through_the_projection_has_the_results_and_gradients_of_the_loss_of_logits() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 16, generator=draw).to(DEVICE) for rows in (23, VOCABULARY))
    targets, upstream = torch.randint(0, VOCABULARY, (23,), generator=draw).to(DEVICE), torch.rand(23, generator=draw)
    found = []
    for projected in (True, False):
        leaf = hidden.clone().requires_grad_()
        nll = ProjectedLoss.apply(leaf, weight, targets) if projected else TargetLoss.apply(leaf @ weight.t(), targets)
        nll.backward(upstream.to(DEVICE))
        found.append((nll, leaf.grad))
    assert all(close(one, other, 1e-5) for one, other in zip(*found, strict=True))
    with torch.no_grad():
        assert close(ProjectedLoss.apply(hidden, weight, targets), found[1][0], 1e-5)
        assert len(ProjectedLoss.apply(hidden[:0], weight, targets[:0])) == 0


@pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "capped logits"])
def test_a_model_that_changes_its_logits_keeps_its_own_loss(cap: float | None) -> None:
    base = model()
    if cap is not None:   # as Gemma 2 does: after the projection, in the model's forward
        forward = base.forward

        def capped(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            output.logits = cap * torch.tanh(output.logits / cap)
            return output

        base.forward = capped
    batch = collate([(0, row) for row in rows_of(0, 6)], DEVICE)
    with torch.no_grad():
        first, second = row_losses(base, batch), row_losses(base, batch)   # the first batch of a model tells
        logits = base(input_ids=batch.ids).logits.flatten(0, 1)[batch.positions].float()
        nll = nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        expected = torch.zeros(6, device=DEVICE).index_add_(0, batch.rows, nll)
    assert close(first, expected, 1e-5) and close(second, expected, 1e-5)


# Training.

def trained(base: Any, experts: Sequence[int], *, recompute: bool = False, stop_after: int | None = None,
            states: dict[int, Any] | None = None) -> tuple[list[Tensor], dict[int, Any]]:
    """Final weights of these experts, co-trained on a copy of the base, and their states at the end."""
    copied = copy.deepcopy(base)
    stack = ExpertStack(copied, [SPEC] * len(experts)).trainable(True)
    learners = []
    for place, expert in enumerate(experts):
        stack.initialise(place, seed=expert)
        learners.append(Learner(str(expert), place, stack, rows_of(expert, 10), rows_of(100 + expert, 4), PARAMS))
    for learner, expert in zip(learners, experts, strict=True):
        if states:
            learner.restore(*states[expert])

    class Stop(Exception):
        pass

    def after_step(_: Any) -> None:
        if stop_after is not None and learners[0].progress.step == stop_after:
            raise Stop

    try:
        with recomputing(copied, recompute):
            cotrain(copied, stack, learners, 64, after_step)
    except Stop:
        pass
    for learner in learners:
        assert learner.progress.failure is None
    kept = {expert: (copy.deepcopy(learner.progress), {key: tensor.cpu().clone() for key, tensor
                                                       in learner.tensors().items()})
            for learner, expert in zip(learners, experts, strict=True)}
    return [stack.weights[place].detach().clone() for place in range(len(experts))], kept


def test_training_equals_the_cpu() -> None:
    there, states = trained(model(), [0, 1])
    here, expected = trained(model("cpu"), [0, 1])
    assert all(close(one, other, 2e-3) for one, other in zip(there, here, strict=True))
    for expert in (0, 1):
        losses = [[each["validation_loss"] for each in kept[expert][0].curve] for kept in (states, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        curve = states[expert][0].curve
        assert curve[-1]["train_loss"] < curve[0]["train_loss"]


@pytest.mark.parametrize("recompute", [False, True])
def test_co_trained_experts_equal_experts_trained_alone(recompute: bool) -> None:
    base = model()
    together, _ = trained(base, [0, 1, 2], recompute=recompute)
    for expert in (0, 1, 2):
        alone, _ = trained(base, [expert], recompute=recompute)
        assert close(together[expert], alone[0], 1e-3)


def test_an_interrupted_training_goes_on_as_if_it_had_not_been() -> None:
    """AdamW's fused kernel reads the step on the device of the weights."""
    base = model()
    whole, _ = trained(base, [0, 1])
    _, states = trained(base, [0, 1], stop_after=3)
    assert states[0][0].step == 3
    resumed, _ = trained(base, [0, 1], states=states)
    assert all(close(one, other, 1e-5) for one, other in zip(resumed, whole, strict=True))


def test_a_step_has_the_loss_and_gradients_of_peft() -> None:
    base = model()
    stack = stacked(copy.deepcopy(base), 2).trainable(True)
    rows = [(expert, row) for expert in (0, 1) for row in rows_of(expert, 3)]
    batch = collate([rows[index] for index in microbatches(rows, 10_000)[0]], DEVICE)
    for _ in range(2):   # the second one through `ProjectedLoss`
        stack.trainable(True).select(batch.experts)
        row_losses(stack.model, batch).sum().backward()
    for expert in (0, 1):
        config = LoraConfig(r=SPEC.rank, lora_alpha=SPEC.alpha, target_modules=[
            name.rpartition(".")[2] for name in list(stack.layers)[:7]])
        wrapped = get_peft_model(copy.deepcopy(base), config)
        theirs = dict(wrapped.named_modules())
        with torch.no_grad():
            for name, layer in stack.layers.items():
                theirs[f"base_model.model.{name}"].lora_A["default"].weight.copy_(layer.a_ERI[expert])
                theirs[f"base_model.model.{name}"].lora_B["default"].weight.copy_(layer.b_EOR[expert])
        own = collate([row for row in rows if row[0] == expert], DEVICE)
        row_losses(wrapped.base_model.model, own).sum().backward()
        for name, layer in stack.layers.items():
            module = theirs[f"base_model.model.{name}"]
            assert close(layer.a_ERI.grad[expert], module.lora_A["default"].weight.grad)
            assert close(layer.b_EOR.grad[expert], module.lora_B["default"].weight.grad)


# Decoding.

def answers(stack: ExpertStack, experts: Sequence[int], options: GenerationConfig, prompts: list[list[int]]
            ) -> list[list[int]]:
    tokenizer = SimpleNamespace(eos_token_id=None, decode=lambda ids, **_: " ".join(map(str, ids)))
    requests = [GenerationRequest(prompt=prompt, limit=12 + number % 3, options=options)
                for number, prompt in enumerate(prompts)]
    written = generate_batch(stack.model, tokenizer, requests,
                             lambda rows: stack.select([experts[row] for row in rows]))
    stack.select(None)
    return [row.ids for row in written]


@pytest.mark.parametrize("experts", [[BASE_ONLY, 0, 0, 1, 2], [2, 0, 1, BASE_ONLY, 0]], ids=["in groups", "apart"])
def test_rows_of_a_mixed_batch_are_decoded_as_alone(experts: list[int]) -> None:
    stack = stacked(model(), 3)
    prompts = [row.ids[:4 + number] for number, row in enumerate(rows_of(7, 5))]
    together = answers(stack, experts, GenerationConfig(), prompts)
    assert len({tuple(ids) for ids in together}) > 1
    for number, (expert, prompt) in enumerate(zip(experts, prompts, strict=True)):
        alone = answers(stack, [expert], GenerationConfig(), [prompt])[0]
        shared = min(len(alone), len(together[number]))
        assert alone[:shared] == together[number][:shared]


def test_an_expert_changes_what_is_written_and_equals_its_merged_weights() -> None:
    base = model()
    stack, merged = stacked(copy.deepcopy(base), 2), copy.deepcopy(base)
    with torch.no_grad():
        for name, layer in stack.layers.items():
            merged.get_submodule(name).weight.add_(SPEC.scale * layer.b_EOR[1] @ layer.a_ERI[1])
    prompts = [row.ids[:6] for row in rows_of(9, 4)]
    empty = stacked(merged, 1, spread=0.0)
    assert answers(stack, [1] * 4, GenerationConfig(), prompts) == answers(empty, [0] * 4, GenerationConfig(), prompts)
    assert answers(stack, [1] * 4, GenerationConfig(), prompts) != answers(stack, [BASE_ONLY] * 4, GenerationConfig(),
                                                                           prompts)


def test_a_seed_repeats_an_answer_in_any_batch() -> None:
    stack = stacked(model(), 2)
    options, prompt = GenerationConfig(temperature=0.8, top_k=20, seed=3), rows_of(5, 1)[0].ids[:6]
    alone = answers(stack, [1], options, [prompt])[0]
    beside = answers(stack, [0, 1, 1], options, [[1, 2, 3], prompt, [4, 5]])[1]
    shared = min(len(alone), len(beside))
    assert alone[:shared] == beside[:shared]
    assert alone != answers(stack, [1], GenerationConfig(temperature=0.8, top_k=20, seed=4), [prompt])[0]


def test_a_batch_does_not_wait_for_the_device_to_select_its_experts() -> None:
    """What a selection decides, it decides of numbers of this process."""
    if DEVICE == "cpu":
        pytest.skip("needs a GPU: nothing waits on a CPU")
    stack = stacked(model(), 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stack.select([0, 1, 1, BASE_ONLY])
        collate([(0, row) for row in rows_of(0, 6)], DEVICE)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bfloat16_trains_without_a_number_that_is_not_finite() -> None:
    states = trained(model(dtype=torch.bfloat16), [0, 1])[1]
    for expert in (0, 1):
        curve = states[expert][0].curve
        assert all(math.isfinite(each["validation_loss"]) for each in curve)
        assert curve[-1]["train_loss"] < curve[0]["train_loss"]
