"""Co-training equals training alone: whatever trains beside an expert, on toy models, double precision or single."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from moa.base.encoding import Encoded
from moa.core.config import TrainParams
from moa.experts import peft_format
from moa.experts.batches import collate, microbatches, row_losses
from moa.experts.cotraining import Learner, cotrain, data_order, seed_for, validation_losses
from moa.experts.lora import ExpertStack, LoraSpec

VOCABULARY = 64
PARAMS = TrainParams(rank=4, epochs=2, batch_rows=3, learning_rate=0.02, batch_tokens=50, validation_rows=4)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One expert of a test: what it is, what it learns from, and how."""

    name: str
    rank: int = 2
    alpha: float = 8.0
    rows: int = 10
    longest: int = 20
    params: TrainParams = PARAMS
    poisoned: bool = False
    warm: bool = False   # begins at weights that have been trained, as far as anybody can see

    def learner(self, expert: int, stack: ExpertStack) -> Learner:
        stack.initialise(expert, seed_for(self.name, self.params.seed))
        if self.warm:
            source = torch.Generator().manual_seed(seed_for(self.name, 1))
            for layer in stack.layers.values():
                part = layer.b_EOR.detach()[expert, :, :self.rank]
                part.copy_(torch.randn(part.shape, generator=source) * 0.05)
        if self.poisoned:
            stack.weights[expert] = float("nan")
        return Learner(self.name, expert, stack, toy_rows(self.name, self.rows, self.longest),
                       toy_rows(f"{self.name}v", 4, self.longest), self.params, self.warm)


Trained = dict[str, tuple[dict[str, torch.Tensor], Learner]]


def toy_model(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    return LlamaForCausalLM(config).to(dtype).eval()


def toy_rows(seed: str, count: int, longest: int = 20) -> list[Encoded]:
    source = random.Random(seed)
    rows = []
    for _ in range(count):
        length = source.randint(3, longest)
        prompt = source.randint(1, length - 1)
        rows.append(Encoded([source.randrange(VOCABULARY) for _ in range(length)],
                            [False] * prompt + [True] * (length - prompt)))
    return rows


def prepared(plans: Sequence[Plan], dtype: torch.dtype = torch.float64) -> tuple[Any, ExpertStack, list[Learner]]:
    model = toy_model(dtype)
    stack = ExpertStack(model, [LoraSpec(plan.rank, plan.alpha) for plan in plans], dtype=dtype).trainable(True)
    return model, stack, [plan.learner(expert, stack) for expert, plan in enumerate(plans)]


def train(plans: Sequence[Plan], batch_tokens: int = 50, dtype: torch.dtype = torch.float64,
          after_step: Callable[[Sequence[Learner]], Any] = lambda _: None) -> Trained:
    """Train `plans` together; per name the expert's tensors and its learner."""
    model, stack, learners = prepared(plans, dtype)
    cotrain(model, stack, learners, batch_tokens, after_step)
    return {plan.name: (peft_format.state(stack, expert), learners[expert]) for expert, plan in enumerate(plans)}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


def assert_as_alone(together: Trained, plan: Plan, tolerance: float, dtype: torch.dtype = torch.float64,
                    weights: float | None = None) -> None:
    """Weights, every epoch's figures, and where it stopped."""
    tensors, learner = together[plan.name]
    alone, alone_learner = train([plan], dtype=dtype)[plan.name]
    assert difference(tensors, alone) < (weights or tolerance)
    for ours, theirs in zip(learner.progress.curve, alone_learner.progress.curve, strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)
    for fact in ("step", "epoch", "best_epoch", "stopped", "failure"):
        assert getattr(learner.progress, fact) == getattr(alone_learner.progress, fact), fact


@st.composite
def plans(draw: st.DrawFn, learning_rate: float = 5e-3) -> list[Plan]:
    """One to four experts in any order, alike in nothing but their base."""
    names = draw(st.permutations("abcd"))[:draw(st.integers(1, 4))]
    return [Plan(name, draw(st.integers(1, 4)), draw(st.sampled_from([0.5, 4.0, 16.0])), draw(st.integers(2, 10)),
                 draw(st.integers(4, 24)), PARAMS.model_copy(update={
                     "epochs": draw(st.integers(1, 3)), "batch_rows": draw(st.integers(1, 5)),
                     "weight_decay": draw(st.sampled_from([0.0, 0.3])), "patience": draw(st.integers(0, 1)),
                     "rows_per_epoch": draw(st.sampled_from([None, 5])), "learning_rate": learning_rate,
                     "max_grad_norm": draw(st.sampled_from([0.05, 1.0]))}), warm=draw(st.booleans()))
            for name in names]


@settings(max_examples=25, deadline=None)
@given(plans=plans(), batch_tokens=st.sampled_from([10, 40, 200]))
def test_cotraining_equals_training_alone(plans: list[Plan], batch_tokens: int) -> None:
    together = train(plans, batch_tokens)
    for plan in plans:
        assert_as_alone(together, plan, 1e-9)


@pytest.mark.parametrize(("learning_rate", "weights"), [(5e-6, 1e-5), (2e-3, 1e-3)])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data(), batch_tokens=st.sampled_from([10, 200]))
def test_cotraining_equals_training_alone_in_single_precision(learning_rate: float, weights: float, data: st.DataObject,
                                                              batch_tokens: int) -> None:
    """Losses to 1e-5. Weights whose gradient is nothing but rounding move by Adam's will: hence the small rate."""
    experts = data.draw(plans(learning_rate))
    together = train(experts, batch_tokens, torch.float32)
    for plan in experts:
        assert_as_alone(together, plan, 1e-5, torch.float32, weights)


def test_training_moves_the_experts_and_not_the_base() -> None:
    model = toy_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stack = ExpertStack(model, [LoraSpec(4, 8.0)], dtype=torch.float64).trainable(True)
    stack.initialise(0, 1)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in stack.parameters()}
    start = stack.weights.clone()
    cotrain(model, stack, [Learner("a", 0, stack, toy_rows("a", 12), toy_rows("v", 4), PARAMS)], 50)
    assert (stack.weights != start).any()
    after = stack.remove().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_one_experts_nan_stays_its_own() -> None:
    plans = [Plan("a"), Plan("b", poisoned=True), Plan("c")]
    together = train(plans)
    assert together["b"][1].progress.failure and together["b"][1].progress.step == 0
    for plan in (plans[0], plans[2]):
        assert together[plan.name][1].progress.failure is None
        assert_as_alone(together, plan, 1e-9)


def test_an_expert_that_breaks_on_the_way_fails_alone_and_keeps_its_best_epoch() -> None:
    plans, best = [Plan("a"), Plan("b"), Plan("c", rank=4)], []

    def poison(learners: Sequence[Learner]) -> None:
        for learner in learners:
            if learner.name == "b" and learner.progress.step == 5:   # in the second epoch
                best.append(learner.best.take())
                with torch.no_grad():
                    learner.weights.fill_(float("nan"))

    together = train(plans, after_step=poison)
    broken = together["b"][1]
    assert "at step 6 its loss (nan)" in str(broken.progress.failure)
    assert broken.progress.best_epoch == 1 and torch.equal(broken.weights, best[0])
    for name in "ac":
        assert_as_alone(together, plans["abc".index(name)], 1e-9)


WILD = PARAMS.model_copy(update={"learning_rate": 0.3, "patience": 1, "epochs": 4})   # gets worse, and stops


def test_one_that_stops_early_does_not_touch_the_others() -> None:
    plans = [Plan("a", params=PARAMS.model_copy(update={"epochs": 4})), Plan("b", params=WILD), Plan("c", rank=3)]
    together = train(plans)
    assert together["b"][1].progress.stopped and together["b"][1].progress.epoch < 4
    assert [together[name][1].progress.epoch for name in "ac"] == [4, 2]
    for plan in plans:
        assert_as_alone(together, plan, 1e-8 if plan.params is WILD else 1e-9)   # such a rate makes rounding grow


def test_the_best_epoch_is_kept_and_its_loss_is_what_the_expert_has() -> None:
    model, stack, learners = prepared([Plan("a"), Plan("b", params=WILD)])
    cotrain(model, stack, learners, 50)
    for name, loss in validation_losses(model, stack, learners, 50).items():
        progress = learners["ab".index(name)].progress
        assert loss == pytest.approx(min(epoch["validation_loss"] for epoch in progress.curve), abs=1e-12)
        assert loss == pytest.approx(progress.curve[progress.best_epoch - 1]["validation_loss"], abs=1e-12)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 5, 9, 13])
def test_resumed_equals_uninterrupted(at: int) -> None:
    """Three experts, of which the second stops in the middle."""
    plans = [Plan("a", params=PARAMS.model_copy(update={"epochs": 4, "weight_decay": 0.1})), Plan("b", params=WILD),
             Plan("c", rank=3, rows=12)]
    whole, steps = train(plans), []
    early = whole["b"][1].progress.step
    assert early < 13 < whole["a"][1].progress.step == 16

    def kill(active: Sequence[Learner]) -> None:
        steps.append(len(active))
        if len(steps) == at:
            raise Killed

    model, stack, learners = prepared(plans)
    with pytest.raises(Killed):
        cotrain(model, stack, learners, 50, kill)
    assert learners[1].done == (at >= early)
    saved = [(learner.progress, {key: value.clone() for key, value in learner.tensors().items()})
             for learner in learners]
    model, stack, again = prepared(plans)   # of another process
    for learner, (progress, tensors) in zip(again, saved, strict=True):
        learner.restore(progress, tensors)
    cotrain(model, stack, again, 50)
    for expert, plan in enumerate(plans):
        assert difference(peft_format.state(stack, expert), whole[plan.name][0]) == 0
        assert again[expert].progress == whole[plan.name][1].progress


def test_training_twice_gives_the_same_bits() -> None:
    """With threads, and rows enough of one expert that their gradients could meet in any order: indexed slices fail."""
    def once() -> torch.Tensor:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512,
                                             num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2))
        stack = ExpertStack(model.eval(), [LoraSpec(8, 16.0)]).trainable(True)
        stack.initialise(0, 1)
        params = TrainParams(epochs=1, batch_rows=16, learning_rate=0.01, batch_tokens=2048)
        cotrain(model, stack, [Learner("a", 0, stack, toy_rows("a", 16), toy_rows("v", 4), params)], 2048)
        return stack.weights

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(once(), first) for first in [once()] for _ in range(4))
    finally:
        torch.set_num_threads(threads)


def test_order_shows_every_row_before_any_twice() -> None:
    params = TrainParams(epochs=4, rows_per_epoch=5, batch_rows=2)
    order = data_order(20, params, 3)
    assert sorted(index for step in order for index in step) == list(range(20))
    assert [len(step) for step in order] == [2, 2, 1] * 4


@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=20), budget=st.integers(1, 80))
def test_microbatches_keep_every_row_and_the_budget(lengths: list[int], budget: int) -> None:
    rows = [(0, Encoded([1] * length, [False] + [True] * (length - 1))) for length in lengths]
    groups = microbatches(rows, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(rows)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[index] for index in group) <= budget


def test_padding_and_prompts_count_nothing() -> None:
    model, rows = toy_model(), toy_rows("x", 5)
    together = row_losses(model, collate([(0, row) for row in rows]))
    for row, loss in zip(rows, together, strict=True):
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        expected = -sum(logits[t - 1, row.ids[t]] for t in range(1, len(row.ids)) if row.targets[t])
        assert torch.allclose(loss, expected)


def test_what_the_padding_is_changes_no_loss_and_no_gradient() -> None:
    model, stack, _ = prepared([Plan("a"), Plan("b")])
    batch = collate([(number % 2, row) for number, row in enumerate(toy_rows("x", 5))])
    stack.weights.normal_(generator=torch.Generator().manual_seed(0))
    stack.select(batch.owners)
    lengths = torch.tensor([len(row.ids) for row in toy_rows("x", 5)])
    padding = torch.arange(batch.ids.shape[1]) >= lengths[:, None]
    assert padding.any() and stack.gradients is not None
    found = []
    for token in (0, 17):
        stack.gradients.zero_()
        losses = row_losses(model, dataclasses.replace(batch, ids=batch.ids.masked_fill(padding, token)))
        losses.sum().backward()
        found.append((losses.detach(), stack.gradients.clone()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
