"""Co-training equals training alone, and the stacked layer equals PEFT: on toy models, in double precision."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from moa.batches import collate, microbatches, row_losses
from moa.config import TrainParams
from moa.errors import ArtifactError
from moa.lora import CONFIG, ExpertStack, LoraSpec
from moa.tokens import Encoded
from moa.training import Learner, cotrain, data_order, seed_for

VOCABULARY = 64
PARAMS = TrainParams(rank=4, epochs=2, batch_rows=3, learning_rate=0.02, batch_tokens=50, validation_rows=4)


def toy_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    return LlamaForCausalLM(config).double().eval()


def toy_rows(seed: str, count: int, longest: int = 20) -> list[Encoded]:
    source = random.Random(seed)
    rows = []
    for _ in range(count):
        length = source.randint(3, longest)
        prompt = source.randint(1, length - 1)
        rows.append(Encoded([source.randrange(VOCABULARY) for _ in range(length)],
                            [False] * prompt + [True] * (length - prompt)))
    return rows


def train(names: list[str], ranks: dict[str, int], params: TrainParams = PARAMS, poisoned: str = "") -> dict[str, Any]:
    """Train `names` together; per name the expert's tensors and its learner."""
    model = toy_model()
    stack = ExpertStack(model, [LoraSpec(ranks[name], 8.0) for name in names], dtype=torch.float64).trainable(True)
    learners = []
    for expert, name in enumerate(names):
        stack.initialise(expert, seed_for(name, params.seed))
        learners.append(Learner(name, expert, stack, toy_rows(name, 4 + 3 * ranks[name]), toy_rows(f"{name}v", 4),
                                params))
        if name == poisoned:
            stack.weights[expert] = float("nan")
    cotrain(model, stack, learners, params.batch_tokens)
    return {name: (stack.state(expert), learners[expert]) for expert, name in enumerate(names)}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


@settings(max_examples=8, deadline=None)
@given(names=st.permutations("abcd").map(lambda order: order[:3]),
       ranks=st.fixed_dictionaries({name: st.integers(1, 4) for name in "abcd"}),
       batch_tokens=st.sampled_from([10, 40, 200]))
def test_cotraining_equals_training_alone(names: list[str], ranks: dict[str, int], batch_tokens: int) -> None:
    together = train(names, ranks, PARAMS.model_copy(update={"batch_tokens": batch_tokens}))
    for name in names:
        alone, learner = train([name], ranks)[name]
        assert difference(together[name][0], alone) < 1e-9
        for ours, theirs in zip(together[name][1].progress.curve, learner.progress.curve, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-9)


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
    ranks = {"a": 2, "b": 2, "c": 2}
    together = train(["a", "b", "c"], ranks, poisoned="b")
    assert together["b"][1].progress.failure
    for name in "ac":
        assert together[name][1].progress.failure is None
        assert difference(together[name][0], train([name], ranks)[name][0]) < 1e-9


def test_resumed_equals_uninterrupted() -> None:
    whole = train(["a"], {"a": 2})["a"][0]
    model = toy_model()

    def fresh() -> tuple[ExpertStack, Learner]:
        stack = ExpertStack(model, [LoraSpec(2, 8.0)], dtype=torch.float64).trainable(True)
        stack.initialise(0, seed_for("a", 0))
        return stack, Learner("a", 0, stack, toy_rows("a", 10), toy_rows("av", 4), PARAMS)

    class Killed(Exception):
        pass

    def kill(learners: Any) -> None:
        if learners[0].progress.step == 5:
            raise Killed

    stack, learner = fresh()
    with pytest.raises(Killed):
        cotrain(model, stack, [learner], 50, kill)
    tensors = {key: value.clone() for key, value in learner.tensors().items()}
    progress = learner.progress
    stack.remove()
    stack, learner = fresh()
    learner.restore(progress, tensors)
    cotrain(model, stack, [learner], 50)
    assert difference(stack.state(0), whole) == 0


def test_training_twice_gives_the_same_bits() -> None:
    """With threads, and rows enough of one expert that their gradients could meet in any order."""
    def once() -> torch.Tensor:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512,
                                             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
        stack = ExpertStack(model.eval(), [LoraSpec(8, 16.0)]).trainable(True)
        stack.initialise(0, 1)
        params = TrainParams(epochs=1, batch_rows=16, learning_rate=0.01, batch_tokens=2048)
        cotrain(model, stack, [Learner("a", 0, stack, toy_rows("a", 64), toy_rows("v", 4), params)], 2048)
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


def random_stack(model: LlamaForCausalLM, specs: list[LoraSpec]) -> ExpertStack:
    stack = ExpertStack(model, specs, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for layer in stack.layers.values():
        for expert, spec in enumerate(specs):
            with torch.no_grad():
                layer.a_ERI[expert, :spec.rank].normal_(generator=generator)
                layer.b_EOR[expert, :, :spec.rank].normal_(generator=generator)
    return stack


def test_peft_gives_the_same_logits(tmp_path: Path) -> None:
    from peft import PeftModel

    model, specs = toy_model(), [LoraSpec(4, 8.0), LoraSpec(2, 6.0, rslora=True)]
    stack = random_stack(model, specs)
    ids = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))
    stack.select(torch.tensor([0, 1, -1]))
    with torch.no_grad():
        ours = model(ids).logits
    for expert in range(2):
        stack.save(expert, tmp_path / str(expert), "toy")
    stack.remove()
    with torch.no_grad():
        assert torch.equal(model(ids).logits[2], ours[2])
        for expert in range(2):
            peft = PeftModel.from_pretrained(toy_model(), tmp_path / str(expert)).double()
            assert (peft(ids).logits[expert] - ours[expert]).abs().max() < 1e-9
    again = ExpertStack(toy_model(), specs, dtype=torch.float64)
    for expert in range(2):
        again.load(expert, tmp_path / str(expert))
        again.select(torch.full((3,), expert))
        with torch.no_grad():
            assert torch.allclose(again.model(ids).logits[expert], ours[expert])


@pytest.mark.parametrize(("field", "value"), [("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"])])
def test_what_cannot_be_mixed_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    import json

    stack = random_stack(toy_model(), [LoraSpec(2, 4.0)])
    stack.save(0, tmp_path, "toy")
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, field: value}))
    with pytest.raises(ArtifactError, match=field):
        stack.load(0, tmp_path)


def test_another_bases_expert_is_refused(tmp_path: Path) -> None:
    stack = random_stack(toy_model(), [LoraSpec(2, 4.0)])
    stack.save(0, tmp_path, "toy")
    wider = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=48,
                                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)).double()
    with pytest.raises(ArtifactError, match="do not fit"):
        ExpertStack(wider, [LoraSpec(2, 4.0)], dtype=torch.float64).load(0, tmp_path)
