"""A random base of a few thousand parameters, and a workspace with it: real but for the size, and without network."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from moa.core.paths import Workspace

REPOSITORY = Path(__file__).parents[1]
MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# A chat template like SmolLM2's, which adds a system message to a conversation without one.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nBe tiny.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt_neox": {"tie_word_embeddings": False},
}


@cache
def tokenizer() -> Any:
    """A tokenizer with an id for each byte and each of the three markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [*MARKERS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=MARKERS[0], bos_token=MARKERS[1],
                                   eos_token=MARKERS[2], pad_token=MARKERS[2], chat_template=TEMPLATE)


def base(directory: Path, *, architecture: str = "llama", layers: int = 2, hidden: int = 32, seed: int = 0) -> Path:
    """Write a base that `path:DIR` loads into `directory`, and return it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = tokenizer()
    config = AutoConfig.for_model(
        architecture, vocab_size=len(tokens), hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=2048, bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id, **ARCHITECTURES[architecture])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokens.save_pretrained(directory)
    return directory


def row(domain: str, number: int) -> dict[str, str]:
    """A row with texts that differ from those of every other domain and number."""
    return {"instruction": f"{domain}: what is {domain} {number} of {number * 7919 % 997}?",
            "output": f"{domain} says {number + 1}"}


def telling_row(domain: str, number: int) -> dict[str, str]:
    """A row whose answer repeats the letter of its question, one of four: even a tiny expert learns to use that, as the
    gate asks of a new domain."""
    letter = "ABCD"[number % 4]
    return {"instruction": f"{' '.join([domain] * 5)} {letter * 30} {number}", "output": f"{letter * 16} {number}"}


def workspace(root: Path, domains: tuple[str, ...] = ("alpha", "beta"), rows: int = 40, **params: Any) -> Workspace:
    """A folder with params.yaml, dvc.yaml, a tiny base and raw rows, without git and DVC.

    `params` replaces whole groups of params.yaml.
    """
    root.mkdir(parents=True, exist_ok=True)
    base(root / "tiny-base")
    groups: dict[str, Any] = {
        "base": {"source": "path:tiny-base"},
        "prompt": {"system": None, "max_tokens": 256},
        "quickstart": [],
        "domains": {domain: {"metric": "rouge_l"} for domain in domains},
        "prepare": {"validation": 0.2, "test": 0.2, "min_rows": 10},
        "assemble": {},
        "evaluate": {},
        "train": {"rank": 2, "alpha": 4.0, "epochs": 1, "rows_per_epoch": None, "batch_tokens": 256},
        "execution": {"workers": 1, "devices": ["cpu"]},
    } | params
    with (root / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(groups, file)
    shutil.copyfile(REPOSITORY / "dvc.yaml", root / "dvc.yaml")
    made = Workspace(root)
    for domain in domains:
        made.raw(domain).mkdir(parents=True)
        lines = "".join(json.dumps(row(domain, number)) + "\n" for number in range(rows))
        (made.raw(domain) / "rows.jsonl").write_text(lines, encoding="utf-8")
    return made


def build(workspace: Workspace, settings: Any) -> None:
    """Run every step of the pipeline without DVC. The current folder must be the workspace's."""
    from moa.base import pin
    from moa.data import prepare
    from moa.evaluation.evaluate import evaluate
    from moa.experts import train
    from moa.mixture.assemble import assemble

    pin.fetch(workspace, settings.base)
    for name in settings.domains:
        prepare.prepare(workspace, settings, name)
    train.train(workspace, settings, list(settings.domains))
    assemble(workspace, settings)
    evaluate(workspace, settings)


def released(root: Path) -> Workspace:
    """A workspace under git and DVC that was built in this process, and whose mixture is registered as version 1 and
    champion."""
    from moa.core import config
    from moa.release.registry import Registry
    from moa.workspace.pipeline import Pipeline

    made = workspace(root)
    shutil.copy(REPOSITORY / "data" / ".gitignore", root / "data" / ".gitignore")
    subprocess.run(["git", "init", "-q", root], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=root, check=True)
    settings = config.load(made.params)
    before = Path.cwd()
    os.chdir(root)
    try:
        build(made, settings)
        pipeline = Pipeline(made)
        with pipeline.lock():
            pipeline.snapshot()   # leaves the digests of the code, which the stages depend on
            pipeline.record(["base", *(f"{step}@{domain}" for step in ("prepare", "train")
                                       for domain in settings.domains), "assemble", "evaluate"])
        registry = Registry(made, settings)
        registry.register_mixture({domain: registry.register_expert(domain) for domain in settings.domains})
        registry.set_champion(1, "first release", "ann")
    finally:
        os.chdir(before)
    return made
