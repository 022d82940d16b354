"""docs/compatibility.md says of each architecture what equals PEFT and transformers. MOA_WRITE_DOCS=1 writes its lines.

Every architecture is a tiny model with random weights, two experts on all its linear layers, and a row of the base.
"""

import copy
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moa.base.encoding import Encoded
from moa.core.errors import ArtifactError
from moa.experts import peft_format
from moa.experts.batches import collate, row_losses
from moa.experts.cotraining import recomputing
from moa.experts.lora import BASE_ONLY, ExpertStack, LoraSpec
from moa.mixture.generation.engine import GenerationConfig, GenerationRequest, generate_batch
from moa.mixture.router import features, mean_pool

PAGE = Path(__file__).parents[3] / "docs" / "compatibility.md"
BEGIN, END = "<!-- architectures -->\n", "<!-- end architectures -->"
VOCABULARY, SPECS = 64, [LoraSpec(4, 8.0), LoraSpec(4, 8.0)]
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
           "shared_expert_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
           "topk_group": 1, "first_k_dense_replace": 1, "decoder_sparse_step": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
          "num_key_value_heads": 4}
# What each needs besides COMMON; a value of None removes a key.
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "apertus": {}, "arcee": {}, "bloom": {"n_layer": 2, "n_head": 4}, "codegen": {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4, "n_inner": 48},
    "cohere": {}, "cohere2": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "deepseek_v2": {**MIXTURE, **LATENT}, "dots1": MIXTURE, "ernie4_5": {},
    "exaone4": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
    "gemma": {}, "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8}, "gemma3_text": {
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8},
    "glm": {}, "glm4": {}, "glm4_moe": MIXTURE, "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {}, "gpt_oss": {**MIXTURE, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4, "n_inner": 48},
    "granite": {}, "granitemoe": MIXTURE, "granitemoehybrid": {
        **MIXTURE, "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1,
        "mamba_d_state": 8, "mamba_expand": 2, "shared_intermediate_size": 16},
    "helium": {}, "hunyuan_v1_dense": {}, "jetmoe": {**MIXTURE, "kv_channels": 8, "num_key_value_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}, "llama": {}, "minimax_m2": MIXTURE,
    "mistral": {"sliding_window": 8}, "mixtral": MIXTURE, "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "nemotron": {}, "olmo": {}, "olmo2": {}, "olmoe": MIXTURE, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {}, "phi": {}, "phi3": {"rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
        "long_factor": [2.0] * 4, "short_factor": [1.0] * 4}, "original_max_position_embeddings": 16},
    "phimoe": MIXTURE, "qwen2": {}, "qwen2_moe": MIXTURE, "qwen3": {}, "qwen3_moe": MIXTURE, "qwen3_next": {
        **MIXTURE, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "seed_oss": {}, "smollm3": {}, "stablelm": {}, "starcoder2": {}, "xglm": {
        "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}}
# What is known to differ, and named below the table; whoever mends it takes it out of here.
OPEN = {"dots1", "glm4_moe",   # PEFT loads the matrices of shared experts under other names
        "phi3"}                # longrope: a row's numbers depend on its neighbours' lengths
COLUMNS = ("prompts", "loss and gradients", "recomputation", "routing", "decoding")


def build(name: str) -> Any:
    settings = {key: value for key, value in {**COMMON, **ARCHITECTURES[name]}.items() if value is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings), dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:   # norms and the like keep their values: some models divide by them
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.15)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.eval().requires_grad_(False)


def random_experts(stack: ExpertStack) -> None:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        stack.weights.copy_(torch.randn(stack.weights.shape, generator=draw) * 0.15)
    stack.changed()


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-4 * max(1.0, float(other.abs().max())))


class Scene:
    """A base, the same with a stack of two experts, and PEFT's model of each expert."""

    def __init__(self, name: str, folder: Path) -> None:
        self.base = build(name)
        self.stack = ExpertStack(copy.deepcopy(self.base), SPECS)
        random_experts(self.stack)
        self.theirs: list[Any] = []
        for expert in range(2):
            (folder / str(expert)).mkdir()
            peft_format.save(self.stack, expert, folder / str(expert), name)
            self.theirs.append(PeftModel.from_pretrained(copy.deepcopy(self.base), folder / str(expert),
                                                         is_trainable=True).eval())

    @property
    def model(self) -> Any:
        return self.stack.model

    def prompts(self) -> bool:
        ids = torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(2))
        self.stack.select([0, 1, BASE_ONLY])
        with torch.no_grad():
            ours = self.model(ids, use_cache=False).logits
            expected = torch.cat([each(ids[row:row + 1], use_cache=False).logits
                                  for row, each in enumerate([*self.theirs, self.base])])
        self.stack.select(None)
        return close(ours, expected)

    def rows(self) -> list[tuple[int, Encoded]]:
        draw = torch.Generator().manual_seed(3)
        return [(expert, Encoded(torch.randint(3, VOCABULARY, (7 + 4 * expert,), generator=draw).tolist(),
                                 [False] * 4 + [True] * (3 + 4 * expert))) for expert in (0, 1)]

    def gradients(self) -> tuple[Tensor, Tensor]:
        self.stack.trainable(True).select([0, 1])
        losses = row_losses(self.model, collate(self.rows()))
        losses.sum().backward()
        self.stack.select(None)
        assert self.stack.gradients is not None
        return losses.detach(), self.stack.gradients.clone()

    def loss_and_gradients(self) -> bool:
        losses, gradients = self.gradients()
        same = []
        for expert, row in self.rows():
            theirs = self.theirs[expert]
            theirs.zero_grad()
            loss = row_losses(theirs.base_model.model, collate([(0, row)]))
            loss.sum().backward()
            same.append(close(losses[expert], loss.detach()[0]))
            modules = dict(theirs.named_modules())
            for name, layer in self.stack.layers.items():
                module = modules[f"base_model.model.{name}"]
                for ours, other in ((layer.a_ERI.grad[expert], module.lora_A["default"].weight.grad),
                                    (layer.b_EOR.grad[expert], module.lora_B["default"].weight.grad)):
                    same.append(close(ours, torch.zeros_like(ours) if other is None else other))
        return all(same) and bool(gradients.abs().max() > 0)

    def recomputation(self) -> bool:
        _, expected = self.gradients()
        with recomputing(self.model):
            _, found = self.gradients()
        return close(found, expected)

    def routing(self) -> bool:
        self.stack.select(None)
        ids = [[5, 9, 12, 7, 30], [8, 4, 3]]
        found = features(self.model, ids)
        for number, prompt in enumerate(ids):
            states = self.base(torch.tensor([prompt]), output_hidden_states=True, use_cache=False).hidden_states[:-1]
            expected = torch.stack([mean_pool(state, torch.ones(1, len(prompt)))[0] for state in states])
            if not close(found[number], expected):
                return False
        return True

    def decoding(self) -> bool:
        """Rows of different lengths, which leave the batch at different times, and on both sides of any limit."""
        draw = torch.Generator().manual_seed(4)
        prompts = [torch.randint(3, VOCABULARY, (length,), generator=draw).tolist() for length in (3, 9, 5, 20)]
        experts, limits = [0, 1, BASE_ONLY, 1], [4, 7, 12, 9]
        tokenizer: Any = SimpleNamespace(eos_token_id=None, decode=lambda ids, **_: " ".join(map(str, ids)))
        requests = [GenerationRequest(prompt=prompt, limit=limit, options=GenerationConfig())
                    for prompt, limit in zip(prompts, limits, strict=True)]
        written = generate_batch(self.model, tokenizer, requests,
                                 lambda rows: self.stack.select([experts[row] for row in rows]))
        self.stack.select(None)
        for prompt, limit, expert, row in zip(prompts, limits, experts, written, strict=True):
            theirs = self.base if expert == BASE_ONLY else self.theirs[expert]
            expected = theirs.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                                       max_new_tokens=limit, do_sample=False, eos_token_id=None, pad_token_id=0)
            if row.ids != expected[0, len(prompt):].tolist():
                return False
        return True


def cell(check: Callable[[], bool]) -> str:
    """`refused` is the sentence that names the layers which can be adapted."""
    try:
        return "exact" if check() else "differs"
    except ArtifactError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"


def line(name: str, folder: Path) -> str:
    """The row of the table for one architecture."""
    try:
        scene = Scene(name, folder)
    except ArtifactError as error:
        return f"| {name} | refused: {error} |" + " |" * (len(COLUMNS) - 1)
    checks = (scene.prompts, scene.loss_and_gradients, scene.recomputation, scene.routing, scene.decoding)
    return f"| {name} | {' | '.join(map(cell, checks))} |"


def lines_of_the_page() -> dict[str, str]:
    present = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    return {match[1]: each for each in present.splitlines() if (match := re.match(r"\| (\w+) \| ", each))}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_page_says_what_is_exact_and_nothing_differs(name: str, tmp_path: Path) -> None:
    found = line(name, tmp_path)
    if os.environ.get("MOA_WRITE_DOCS"):
        write(lines_of_the_page() | {name: found})
    assert lines_of_the_page().get(name) == found
    cells = set(found.strip("|").split(" | ")[1:])
    if name not in OPEN:
        assert "exact" in found or "refused" in found
        assert not [each for each in cells if not each.strip().startswith(("exact", "refused")) and each.strip(" |")]


def write(lines: Mapping[str, str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    table = [f"| architecture | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|",
             *(lines[name] for name in sorted(lines) if name in ARCHITECTURES)]
    PAGE.write_text(f"{before}{BEGIN}{chr(10).join(table)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
