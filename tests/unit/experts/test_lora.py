"""The stacked layer equals PEFT row by row, on every kind of base; adapters go in and out whole, or are refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from moa.base.encoding import Encoded
from moa.core.errors import ArtifactError
from moa.experts import peft_format
from moa.experts.batches import collate, row_losses
from moa.experts.cotraining import recomputing
from moa.experts.lora import BASE_ONLY, ExpertStack, LoraSpec, StackedLoRA
from moa.experts.peft_format import CONFIG, WEIGHTS
from tests.tiny import ARCHITECTURES

VOCABULARY = 64
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SPECS = [LoraSpec(4, 8.0), LoraSpec(2, 6.0, rslora=True), LoraSpec(1, 3.0)]


def toy(architecture: str = "llama", dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A model whose every parameter is random, biases and norms too: freshly made ones are zeros and ones."""
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "max_position_embeddings": 64, **ARCHITECTURES.get(architecture, {}), **more}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.to(dtype).eval()


def stacked(model: nn.Module, specs: Sequence[LoraSpec] = SPECS, dtype: torch.dtype = torch.float64,
            targets: Any = "all-linear") -> ExpertStack:
    """Experts of random numbers, whose padding is zero."""
    stack = ExpertStack(model, specs, targets, dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in stack.layers.values():
            for expert, spec in enumerate(specs):
                for part in (layer.a_ERI[expert, :spec.rank], layer.b_EOR[expert, :, :spec.rank]):
                    part.copy_(torch.randn(part.shape, generator=generator) * 0.2)
    return stack


def some_ids(rows: int, seed: int = 2) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Many experts in one batch.

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_row_of_a_mixed_batch_gets_what_peft_gives_it(architecture: str, device: str, tmp_path: Path) -> None:
    model = toy(architecture).to(device)
    rows, ids = torch.tensor([1, 0, BASE_ONLY, 2, 1], device=device), some_ids(5).to(device)
    plain = logits(model, ids)
    stack = stacked(model)
    stack.select(rows)
    ours = logits(model, ids)
    for expert in range(len(SPECS)):
        peft_format.save(stack, expert, tmp_path / str(expert), "toy")
    assert torch.equal(ours[2], plain[2])
    for expert in range(len(SPECS)):
        peft = PeftModel.from_pretrained(toy(architecture).to(device), tmp_path / str(expert)).double().eval()
        theirs = logits(peft, ids)
        assert (theirs - plain).abs().max() > 1e-2
        assert (theirs[rows == expert] - ours[rows == expert]).abs().max() < 1e-9


def test_no_choice_and_rows_of_the_base_alone_are_the_base_bit_by_bit() -> None:
    model, ids = toy(), some_ids(3)
    plain = logits(model, ids)
    stack = stacked(model)
    with torch.no_grad():
        stack.weights[0] = float("nan")   # stands in for rows without an expert
    for rows in (None, torch.full((3,), BASE_ONLY)):
        stack.select(rows)
        assert torch.equal(logits(model, ids), plain)
    stack.select(torch.tensor([BASE_ONLY, 1, BASE_ONLY]))
    mixed = logits(model, ids)
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]]) and not torch.equal(mixed[1], plain[1])


def test_one_choice_serves_every_step_of_decoding() -> None:
    model, ids = toy(), some_ids(3)
    stack = stacked(model)
    stack.select(torch.tensor([2, BASE_ONLY, 0]))
    whole = logits(model, ids)
    with torch.no_grad():
        begun = model(ids[:, :5], use_cache=True)
        step = model(ids[:, 5:], past_key_values=begun.past_key_values).logits
    assert (step - whole[:, 5:]).abs().max() < 1e-9


@pytest.mark.parametrize("change", ["load", "initialise", "outside"])
def test_an_expert_that_changes_under_a_standing_choice_is_seen(change: str, tmp_path: Path) -> None:
    model, ids = toy(), some_ids(2)
    plain = logits(model, ids)
    stack = stacked(model)
    peft_format.save(stack, 1, tmp_path, "toy")
    stack.select(torch.tensor([0, 1]))
    before = logits(model, ids)
    if change == "load":
        peft_format.load(stack, 0, tmp_path)
    elif change == "initialise":
        stack.initialise(0, 7)
    else:
        stack.weights[0] = 0.0
        stack.changed()
    standing = logits(model, ids)
    stack.select(torch.tensor([0, 1]))
    assert torch.equal(standing, logits(model, ids))
    assert not torch.equal(standing[0], before[0]) and torch.equal(standing[1], before[1])
    if change != "load":
        assert torch.equal(standing[0], plain[0])


# Experts blended.

def test_a_blend_of_one_expert_is_that_expert() -> None:
    model, ids, rows = toy(), some_ids(3), torch.tensor([2, 0, 1])
    stack = stacked(model)
    stack.select(rows)
    alone = logits(model, ids)
    stack.blend(nn.functional.one_hot(rows, 3).double())
    assert (logits(model, ids) - alone).abs().max() < 1e-12
    stack.select(None)
    assert stack.selection.weights is None


def test_a_blend_of_all_is_the_mean_of_what_each_adds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7)).double()
    stack, x = stacked(model), torch.randn(2, 4, 5, dtype=torch.float64)
    plain, added = model(x), []
    for expert in range(3):
        stack.select(torch.full((2,), expert))
        added.append(model(x) - plain)
    stack.blend(torch.full((2, 3), 1 / 3, dtype=torch.float64))
    assert (model(x) - plain - torch.stack(added).mean(0)).abs().max() < 1e-12
    weights = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)

    def blended(weights_BE: Tensor) -> Tensor:
        stack.blend(weights_BE)
        return model(x)

    assert torch.autograd.gradcheck(blended, weights)


# What is trained, and in which precision.

@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_experts_are_trainable_and_the_base_comes_back(architecture: str) -> None:
    model = toy(architecture)
    before, modules = copies(model), dict(model.named_modules())
    stack = stacked(model).trainable(True)
    assert not any(isinstance(layer, StackedLoRA) for layer in (model.get_output_embeddings(), model.lm_head))
    assert {id(each) for each in model.parameters() if each.requires_grad} == {id(each) for each in stack.parameters()}
    stack.select(torch.tensor([0, 1]))
    model(some_ids(2)).logits.sum().backward()
    assert stack.gradients is not None
    assert stack.gradients[:2].abs().sum(1).min() > 0 and stack.gradients[2].abs().max() == 0
    stack.select(None)
    assert same(copies(stack.remove()), before)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys() and all(after[name] is modules[name] for name in modules)
    assert not any(each.requires_grad or each.grad is not None for each in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_has_experts_in_full(dtype: torch.dtype, device: str) -> None:
    model = toy(dtype=dtype).to(device)
    stack = stacked(model, dtype=torch.float32).trainable(True)
    stack.select(torch.tensor([0, BASE_ONLY, 2], device=device))
    result = model(some_ids(3).to(device)).logits
    assert result.dtype == dtype
    result.float().square().mean().backward()
    mine = {id(each) for each in stack.parameters()}
    for parameter in model.parameters():
        if id(parameter) in mine:
            assert parameter.dtype == torch.float32 and parameter.grad is not None
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
        else:
            assert parameter.dtype == dtype and parameter.grad is None
    assert stack.gradients is not None and stack.gradients.abs().sum(1).gt(0).tolist() == [True, False, True]
    stack.blend(torch.full((3, 3), 1 / 3, device=device))
    assert model(some_ids(3).to(device)).logits.dtype == dtype


DROPOUT: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.5}, "gpt_neox": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    "falcon": {"attention_dropout": 0.5, "hidden_dropout": 0.5}}   # its layers ask themselves whether they train


@pytest.mark.parametrize("architecture", DROPOUT)
@pytest.mark.parametrize("blend", [False, True])
def test_recomputing_changes_neither_losses_nor_gradients(architecture: str, blend: bool) -> None:
    model = toy(architecture, **DROPOUT[architecture])
    stack = stacked(model).trainable(True)
    choices = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    batch = collate([(row % 3, Encoded(ids, [False] * 4 + [True] * (len(ids) - 4)))
                     for row, ids in enumerate(some_ids(4).tolist())])
    calls: list[int] = []
    counted = next(iter(stack.layers.values())).register_forward_hook(lambda *_: calls.append(1))
    hooks = [layer.register_forward_pre_hook(lambda *_, weights=weights: stack.blend(weights))   # as heads do
             for layer, weights in zip(decoder(model), choices, strict=True)] if blend else []

    def once() -> tuple[Tensor, Tensor]:
        assert stack.gradients is not None
        stack.gradients.zero_()
        stack.select(batch.owners)
        losses = row_losses(model, batch)
        losses.sum().backward()
        return losses.detach(), stack.gradients.clone()

    modes = [module.training for module in model.modules()]
    kept, calls[:] = once(), []
    with recomputing(model):
        again, recomputed = once(), len(calls)
    for ours, theirs in zip(again, kept, strict=True):
        assert (ours - theirs).abs().max() < 1e-10
    assert recomputed == 2 and kept[1].abs().max() > 1e-3
    assert [module.training for module in model.modules()] == modes
    assert not model.is_activation_checkpointing and not model.get_input_embeddings()._forward_hooks
    calls.clear()
    with recomputing(model, wanted=False):
        once()
    assert len(calls) == 1
    for hook in (counted, *hooks):
        hook.remove()


def decoder(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def test_an_error_while_recomputing_leaves_the_model_as_it_was() -> None:
    model = toy()
    with pytest.raises(RuntimeError, match="anything"), recomputing(model):
        assert model.is_activation_checkpointing
        raise RuntimeError("anything")
    assert not model.is_activation_checkpointing and not any(module.training for module in model.modules())


# Bases that cannot be adapted.

def test_a_base_without_linear_layers_is_refused_in_one_sentence() -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ArtifactError, match=r"^GPT2LMHeadModel has no nn\.Linear .*Conv1D[^\n]*\.$"):
        ExpertStack(model, SPECS)


def test_a_target_that_no_layer_has_is_refused_with_those_there_are() -> None:
    with pytest.raises(ArtifactError, match=r"called 'query_key_value'; it has .*down_proj.*q_proj"):
        ExpertStack(toy(), SPECS, ["q_proj", "query_key_value"])


def test_only_the_targets_are_adapted() -> None:
    stack = ExpertStack(toy(), SPECS, ["q_proj", "layers.1.mlp.down_proj"])
    assert list(stack.layers) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
                                  "model.layers.1.mlp.down_proj"]


def test_inputs_that_are_not_the_chosen_rows_are_refused() -> None:
    model = toy()
    stack = stacked(model)
    stack.select(torch.tensor([0, 1, 2]))
    with pytest.raises(ArtifactError, match=r"shape \(2, 9, 32\), and the experts of 3 rows"):
        model(some_ids(2))
    flat = torch.zeros(3, 32, dtype=torch.float64)
    with pytest.raises(ArtifactError, match=r"shape \(3, 32\).*only layers that see \(row, position, feature\)"):
        next(iter(stack.layers.values()))(flat)
    stack.blend(torch.ones(3, 3, dtype=torch.float64))
    with pytest.raises(ArtifactError, match="experts of 3 rows"):
        model(some_ids(1))


def test_a_base_that_flattens_its_rows_is_refused_before_it_answers_wrongly() -> None:
    model = toy("opt", ffn_dim=48, word_embed_proj_dim=32)   # the inputs of its MLP are (B * T, D)
    stack = stacked(model)
    stack.select(torch.tensor([0, 1]))
    with pytest.raises(ArtifactError, match=r"shape \(18, 32\).*train\.targets"):
        model(some_ids(2))
    stack.remove()
    stacked(model, targets=["q_proj", "v_proj"]).select(torch.tensor([0, 1]))
    model(some_ids(2))


# PEFT directories, trained elsewhere.

def patterns(architecture: str) -> dict[str, Any]:
    attention = "query_key_value" if architecture == "gpt_neox" else "q_proj"
    out = "dense_4h_to_h" if architecture == "gpt_neox" else "down_proj"
    return {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": [attention, out],
            "rank_pattern": {rf"layers\.1\..*{attention}": 6, out: 2}, "alpha_pattern": {attention: 24, "1.mlp.*": 7}}


ELSEWHERE: dict[str, Callable[[str], dict[str, Any]]] = {
    "default": lambda _: {},
    "patterns": patterns,
    "layers": lambda architecture: {"r": 2, "layers_to_transform": [1],
                                    "target_modules": patterns(architecture)["target_modules"]},
    "all-linear": lambda _: {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": 0.1},
    "expression": lambda _: {"target_modules": r".*layers\.0\..*(v_proj|query_key_value|mlp\.d.*)"},
}


def trained(architecture: str, directory: Path, **how: Any) -> tuple[Any, Tensor]:
    """An adapter of plain PEFT's, two steps old, in `directory`; its base and its logits."""
    torch.manual_seed(3)
    peft = get_peft_model(toy(architecture, torch.float32), LoraConfig(**{"task_type": "CAUSAL_LM", **how}))
    optimizer = torch.optim.AdamW([each for each in peft.parameters() if each.requires_grad], lr=0.05)
    for step in range(2):
        ids = some_ids(4, seed=step)
        peft(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peft.save_pretrained(directory)
    result = logits(peft.eval(), some_ids(3))
    return peft.unload(), result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_an_adapter_of_plain_peft_goes_in_and_out_whole(architecture: str, kind: str, tmp_path: Path) -> None:
    model, theirs = trained(architecture, tmp_path / "in", **ELSEWHERE[kind](architecture))
    plain = logits(model, some_ids(3))
    spec = peft_format.read_spec(tmp_path / "in")
    stack = ExpertStack(model, [LoraSpec(7, 1.0), spec])   # beside a larger one
    peft_format.load(stack, 1, tmp_path / "in")
    stack.select(torch.ones(3, dtype=torch.long))
    assert (theirs - plain).abs().max() > 1e-2
    assert torch.allclose(logits(model, some_ids(3)), theirs, atol=1e-5, rtol=1e-5)
    peft_format.save(stack, 1, tmp_path / "out", "toy")
    assert same(load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "in" / WEIGHTS))
    again = PeftModel.from_pretrained(toy(architecture, torch.float32), tmp_path / "out").eval()
    assert torch.equal(logits(again, some_ids(3)), theirs)
    assert peft_format.read_spec(tmp_path / "out") == spec
    peft_format.load(stack, 0, tmp_path / "out")   # and in again, over whatever was there
    assert same(peft_format.state(stack, 0), peft_format.state(stack, 1))


def test_saving_the_same_expert_again_gives_the_same_bytes(tmp_path: Path) -> None:
    for number in range(2):
        peft_format.save(stacked(toy()), 1, tmp_path / str(number), "toy")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "1" / file).read_bytes()


# Adapters that cannot be mixed. Those that PEFT makes are made by it.

@pytest.mark.parametrize(("how", "named"), [
    ({"use_dora": True}, "use_dora = True"),
    ({"bias": "all"}, "bias = 'all'"),
    ({"modules_to_save": ["norm"]}, r"modules_to_save = \['norm'\]"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
    ({"lora_bias": True}, "lora_bias = True"),
    ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices = \[1, 2\]"),
    ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication = "),
    ({"target_modules": ["embed_tokens", "q_proj"]}, r"embed_tokens\.\S+ is no LoRA matrix"),
    ({"target_modules": ["lm_head"]}, r"lm_head\.\S+ is no LoRA matrix"),
])
def test_what_peft_can_and_a_stack_cannot_is_refused_by_name(tmp_path: Path, how: dict[str, Any], named: str) -> None:
    get_peft_model(toy(dtype=torch.float32), LoraConfig(task_type="CAUSAL_LM", **how)).save_pretrained(tmp_path)
    refused(tmp_path, named)


def test_another_method_is_refused_by_name(tmp_path: Path) -> None:
    from peft import IA3Config

    get_peft_model(toy(dtype=torch.float32), IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    refused(tmp_path, "peft_type is 'IA3'; only LORA")


def refused(directory: Path, named: str) -> None:
    """Loading says in one sentence what is wrong, and the directory of it."""
    stack = ExpertStack(toy(), [LoraSpec(8, 8.0)])
    with pytest.raises(ArtifactError, match=named) as caught:
        peft_format.load(stack, 0, directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A directory that can be mixed, to be spoilt."""
    peft_format.save(stacked(toy(), [LoraSpec(2, 4.0)]), 0, tmp_path, "toy")
    peft_format.load(ExpertStack(toy(), [LoraSpec(8, 8.0)]), 0, tmp_path)
    return tmp_path


@pytest.mark.parametrize(("change", "named"), [
    ({"use_something_new": True}, "use_something_new = True"),
    ({"something_config": {"a": 1}}, "something_config = "),
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA"),
    ({"peft_type": None}, "peft_type is None; only LORA"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
    ({"loftq_config": {"loftq_bits": 4}}, "loftq_config = "),
    ({"target_parameters": ["x"]}, "target_parameters = "),
    ({"r": 0}, "rank is 0"), ({"r": -2}, "rank is -2"), ({"r": "many"}, "rank is 'many'"),
    ({"r": None}, "no LoRA configuration"), ({"lora_alpha": "much"}, "no LoRA configuration"),
    ({"rank_pattern": {"q_proj": "many"}}, "no LoRA configuration"), ({"rank_pattern": {"q_proj": 0}}, "rank is 0"),
    ({"rank_pattern": {"q_proj(": 3}}, "no LoRA configuration"), ({"rank_pattern": [3]}, "no LoRA configuration"),
    ({"alpha_pattern": {"q_proj": None}}, "no LoRA configuration"),
    ({"lora_alpha": float("nan")}, "alpha is nan"),
    ({"rank_pattern": {"q_proj": 4}}, "q_proj.*do not fit"),
])
def test_a_field_that_cannot_be_followed_is_refused_by_name(plain: Path, change: dict[str, Any], named: str) -> None:
    config = json.loads((plain / CONFIG).read_text())
    (plain / CONFIG).write_text(json.dumps({**config, **change}))
    refused(plain, named)


def test_a_field_of_the_future_that_says_nothing_is_no_reason_to_refuse(plain: Path) -> None:
    config = json.loads((plain / CONFIG).read_text())
    (plain / CONFIG).write_text(json.dumps({**config, "use_new": False, "new_config": {}, "more": None, "new": []}))
    peft_format.load(ExpertStack(toy(), [LoraSpec(8, 8.0)]), 0, plain)


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(directory / WEIGHTS)), directory / WEIGHTS)


LAYER = "base_model.model.model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(("spoil", "named"), [
    (lambda folder: rewrite(folder, lambda found: {**found, f"{LAYER}.lora_magnitude_vector": torch.ones(48)}),
     "lora_magnitude_vector is no LoRA matrix"),
    (lambda folder: rewrite(folder, lambda found: {**found, "base_model.model.model.embed_tokens.lora_embedding_A":
                                                   torch.ones(2, 64)}), "lora_embedding_A is no LoRA matrix"),
    (lambda folder: rewrite(folder, lambda found: {**found, "base_model.model.lm_head.weight": torch.ones(4)}),
     r"lm_head\.weight is no LoRA matrix"),
    (lambda folder: rewrite(folder, lambda found: {k: v for k, v in found.items() if k != f"{LAYER}.lora_B.weight"}),
     r"layers\.1\.mlp\.up_proj: one of lora_A and lora_B is missing"),
    (lambda folder: rewrite(folder, lambda found: {**found, f"{LAYER}.lora_A.weight": torch.full((2, 32), torch.nan)}),
     r"layers\.1\.mlp\.up_proj: the weights are not finite"),
    (lambda folder: rewrite(folder, lambda found: {**found, f"{LAYER}.lora_A.weight": torch.ones(2, 33)}),
     r"layers\.1\.mlp\.up_proj: lora_A \(2, 33\) .*do not fit"),
    (lambda folder: rewrite(folder, lambda found: {
        key.replace("layers.1.mlp.up_proj", "layers.7.mlp.up_proj"): value for key, value in found.items()}),
     r"adapts model\.layers\.7\.mlp\.up_proj, .*another base"),
    (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-40]), f"{WEIGHTS} cannot be read"),
    (lambda folder: (folder / WEIGHTS).write_bytes(b"no header"), f"{WEIGHTS} cannot be read"),
    (lambda folder: (folder / WEIGHTS).unlink(), f"is no PEFT adapter: it needs .*{WEIGHTS}"),
    (lambda folder: (folder / CONFIG).unlink(), f"is no PEFT adapter: it needs {CONFIG}"),
    (lambda folder: (folder / CONFIG).write_text('{"r": 2,'), f"{CONFIG} is no LoRA configuration: JSONDecodeError"),
    (lambda folder: (folder / CONFIG).write_bytes(b"\xff"), f"{CONFIG} is no LoRA configuration: UnicodeDecodeError"),
    (lambda folder: (folder / CONFIG).write_text("[1]"), f"{CONFIG} is no LoRA configuration"),
])
def test_a_spoilt_directory_is_refused_by_what_is_wrong(plain: Path, spoil: Callable[[Path], None], named: str) -> None:
    spoil(plain)
    refused(plain, named)


def test_an_expert_too_large_for_the_stack_is_refused(plain: Path) -> None:
    with pytest.raises(ArtifactError, match=r"do not fit .* at rank 2"):
        peft_format.load(ExpertStack(toy(), [LoraSpec(1, 1.0)]), 0, plain)


def test_another_bases_expert_is_refused(plain: Path) -> None:
    with pytest.raises(ArtifactError, match="do not fit"):
        peft_format.load(ExpertStack(toy(hidden_size=64), [LoraSpec(2, 4.0)], dtype=torch.float64), 0, plain)


@pytest.mark.parametrize("rows", [[0, 3], [-2, 0], torch.tensor([0, 3]), torch.tensor([-2])])
def test_an_expert_that_there_is_not_is_refused_and_the_selection_stays(rows: Any) -> None:
    stack = stacked(toy())
    stack.select([0, 1])
    with pytest.raises(IndexError, match=r"There is no expert (3|-2): the stack has 3\."):
        stack.select(rows)
    assert stack.selection.rows is not None and stack.selection.rows.tolist() == [0, 1]
