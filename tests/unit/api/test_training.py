"""Experts stacked on a model of transformers and trained together, without a workspace."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import moa
from tests import tiny

pytestmark = pytest.mark.slow
CONFIGS = {"math": moa.LoraConfig(r=4, lora_alpha=8), "sql": moa.LoraConfig(r=2, use_rslora=True)}
ONE = moa.TrainingArguments(num_train_epochs=1, learning_rate=1e-2, batch_tokens=2048)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base: Path) -> Iterator[Any]:
    yield AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def rows(domain: str, count: int = 20) -> list[dict[str, str]]:
    return [tiny.row(domain, number) for number in range(count)]


def test_each_row_of_a_batch_uses_its_own_expert(model: Any) -> None:
    ids = torch.arange(10).repeat(3, 1)
    before = model(ids).logits
    stack = moa.ExpertStack(model, CONFIGS)
    assert stack.names == ("math", "sql") and len(stack) == 2 and repr(stack) == "ExpertStack(math: r=4, sql: r=2)"
    moa.cotrain(stack, {name: rows(name) for name in CONFIGS}, ONE)
    with stack.using(["math", None, "sql"]):
        mixed = model(ids).logits
    assert torch.equal(model(ids).logits, before)   # without a selection, and after training: the model alone
    assert not torch.allclose(mixed[0], before[0]) and not torch.allclose(mixed[2], mixed[0])
    assert torch.allclose(mixed[1], before[1], atol=1e-5)
    with pytest.raises(moa.errors.UsageError, match="no expert 'code'"), stack.using(["code"]):
        pass
    assert stack.unload() is model and torch.equal(model(ids).logits, before)


def test_an_expert_learns_beside_others_what_it_learns_alone(base: Path) -> None:
    def trained(*names: str) -> moa.TrainingResult:
        fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return moa.cotrain(moa.ExpertStack(fresh, {name: moa.LoraConfig(r=4) for name in names}),
                           {name: rows(name) for name in names}, ONE)

    together, alone = trained("math", "sql"), trained("sql")
    assert together["sql"].validation_loss == pytest.approx(alone["sql"].validation_loss, rel=1e-4)
    assert together["sql"].tokens == alone["sql"].tokens


def test_the_result_is_a_table_of_epochs(model: Any) -> None:
    stack = moa.ExpertStack(model, CONFIGS)
    result = moa.cotrain(stack, {"math": rows("math")}, moa.TrainingArguments(
        num_train_epochs=2, learning_rate=1e-2, warmup_steps=2, gradient_checkpointing=True))
    assert [expert.name for expert in result.experts] == ["math"]
    math = result["math"]
    assert [epoch.epoch for epoch in math.epochs] == [1, 2] and math.best_epoch in (1, 2) and math.tokens > 0
    assert math.epochs[1].train_loss < math.epochs[0].train_loss
    assert list(result.to_frame()["epoch"]) == [1, 2] and "train_loss" in result._repr_html_()
    with pytest.raises(KeyError):
        result["sql"]


def test_saved_experts_are_plain_peft(model: Any, base: Path, tmp_path: Path) -> None:
    stack = moa.ExpertStack(model, CONFIGS)
    moa.cotrain(stack, {name: rows(name) for name in CONFIGS}, ONE)
    stack.save_pretrained(tmp_path)
    ids = torch.arange(8).repeat(2, 1)
    with stack.using(["math", "sql"]), torch.no_grad():
        ours = model(ids).logits
    for row, name in enumerate(CONFIGS):
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / name)
        assert torch.allclose(theirs(ids).logits[row], ours[row], atol=1e-4)


def test_rows_may_be_any_table_and_validation_rows_given(model: Any) -> None:
    stack = moa.ExpertStack(model, CONFIGS)
    given = {"math": datasets.Dataset.from_list(rows("math", 8)), "sql": pandas.DataFrame(rows("sql", 8))}
    result = moa.cotrain(stack, given, ONE, eval_rows={name: rows(name, 2) for name in CONFIGS})
    assert {expert.name for expert in result.experts} == {"math", "sql"}


@pytest.mark.parametrize(("given", "error", "message"), [
    ({}, moa.errors.UsageError, "at least one expert"),
    ({"code": rows("code")}, moa.errors.UsageError, "no expert 'code'"),
    ({"math": rows("math", 1)}, moa.errors.DataError, "0 rows to train on and 1 for validation"),
    ({"math": [{"instruction": "no answer"}]}, moa.errors.DataError, "Row 1 of 'math': output is missing")])
def test_what_cannot_train_is_refused(model: Any, given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        moa.cotrain(moa.ExpertStack(model, CONFIGS), given, ONE)


def test_validation_rows_of_each_expert_are_needed_once_any_are_given(model: Any) -> None:
    with pytest.raises(moa.errors.UsageError, match="no rows of 'sql'"):
        moa.cotrain(moa.ExpertStack(model, CONFIGS), {"sql": rows("sql")}, ONE, eval_rows={"math": rows("math")})


def test_a_training_that_diverges_is_named(model: Any) -> None:
    with pytest.raises(RuntimeError, match="The training of 'math' failed: at step"):
        moa.cotrain(moa.ExpertStack(model, CONFIGS), {name: rows(name) for name in CONFIGS},
                    moa.TrainingArguments(learning_rate=1e30, warmup_steps=0))


def test_a_stack_needs_experts_of_the_same_layers(model: Any) -> None:
    with pytest.raises(moa.errors.UsageError, match="at least one"):
        moa.ExpertStack(model, {})
    with pytest.raises(moa.errors.UsageError, match="target_modules differ"):
        moa.ExpertStack(model, {"a": moa.LoraConfig(target_modules=["q_proj"]), "b": moa.LoraConfig()})
    with pytest.raises(moa.errors.ArtifactError, match="No linear layer of the base is called 'nowhere'"):
        moa.ExpertStack(model, {"a": moa.LoraConfig(target_modules="nowhere")})
    stack = moa.ExpertStack(model, {"a": moa.LoraConfig(target_modules=["v_proj", "q_proj"]),
                                    "b": moa.LoraConfig(target_modules=("q_proj", "v_proj"))})
    assert len(stack) == 2


def test_a_model_without_a_tokenizer_says_so(model: Any, tmp_path: Path) -> None:
    model.name_or_path = str(tmp_path)
    with pytest.raises(moa.errors.BaseModelError, match="pass tokenizer"):
        moa.cotrain(moa.ExpertStack(model, CONFIGS), {"math": rows("math")}, ONE)
    untold = moa.ExpertStack(model, CONFIGS, tokenizer=tiny.tokenizer())
    assert moa.cotrain(untold, {"math": rows("math")}, ONE)["math"].tokens > 0


@pytest.mark.parametrize(("options", "message"), [
    ({"num_train_epochs": 0}, "num_train_epochs is 0"), ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ({"per_device_train_batch_size": 1.5}, "per_device_train_batch_size is 1.5"), ({"warmup_steps": -1}, "warmup")])
def test_wrong_arguments_are_named_as_they_were_given(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moa.TrainingArguments(**options)


@pytest.mark.parametrize("options", [{"r": 0}, {"r": 1.5}, {"lora_alpha": 0}])
def test_wrong_settings_of_lora_are_named(options: Any) -> None:
    with pytest.raises(moa.errors.UsageError, match=next(iter(options))):
        moa.LoraConfig(**options)
