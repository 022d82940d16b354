"""Bases by name: the real one, and models of published shapes with random weights, which need no hub and no disk.

A step of training or decoding costs the same whatever the weights are; losses of random weights say nothing. Knows
nothing of what any benchmark measures.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from common import pick_device

from moa.base.device import Device

if TYPE_CHECKING:
    from moa.base.load import Base

REAL_NAME = "smollm2"
# What the published config.json says; vocab_size None = the byte tokenizer's.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": None, "tie_word_embeddings": True,
             "max_position_embeddings": 2048},
    "qwen2.5-0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
                     "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
                     "max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen2.5-7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                   "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
                   "max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}
CONFIGS = (REAL_NAME, *SHAPES)
MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def base_of(config: str, device: Device | None = None) -> "Base":
    """The base called `config`, frozen, in eval mode, on `device` in its dtype (default: `common.pick_device()`).

    `smollm2` is `common.real_base`. The others are Qwen2 models whose weights are drawn on the device by a fixed seed;
    their tokenizer has one id a byte, so most of a large vocabulary is never written in a prompt.
    """
    from real import real_base

    from moa.base.load import Base
    from moa.base.pin import BasePin

    device = device or pick_device()
    if config == REAL_NAME:
        return real_base(device)
    if config not in SHAPES:
        raise SystemExit(f"--config {config}: there are {', '.join(CONFIGS)}.")
    tokenizer = byte_tokenizer()
    model = random_model(config, tokenizer, device)
    parameters = sum(parameter.numel() for parameter in model.parameters())   # tied ones once
    pin = BasePin(f"random:{config}", "random", "bytes", "im_start", f"random:{config}", parameters,
                  type(model).__name__)
    return Base(model, tokenizer, pin, device)


def random_model(config: str, tokenizer: Any, device: Device) -> Any:
    """The model of `base_of` alone, which needs torch and transformers and nothing else of moa's requirements."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = dict(SHAPES[config])
    shape["vocab_size"] = shape["vocab_size"] or len(tokenizer)
    settings = Qwen2Config(**shape, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[device.device] if device.device.startswith("cuda") else []):
        torch.manual_seed(0)
        with torch.device(device.device):
            model = AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, device.dtype),
                                                     attn_implementation="sdpa")
    model = model.eval().requires_grad_(False)
    # As moa.base.load does: a strided slice of the last positions is projected much more slowly than its copy.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    return model


def byte_tokenizer() -> Any:
    """One id a byte, three markers, and a chat template that keeps prefixes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [*MARKERS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=MARKERS[0], bos_token=MARKERS[1],
                                   eos_token=MARKERS[2], pad_token=MARKERS[2], chat_template=TEMPLATE)
