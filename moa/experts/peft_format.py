"""PEFT LoRA directories, in and out of a stack, without loss.

    adapter_config.json         what PEFT calls LoraConfig
    adapter_model.safetensors   one lora_A (R, I) and one lora_B (O, R) for each adapted layer

What a stack cannot represent raises an ArtifactError that names it: a wrong mixture is worse than none.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moa.core.errors import ArtifactError
from moa.experts.lora import ExpertStack, LoraSpec, StackedLoRA, matches

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."   # how PEFT names a layer of the wrapped model
MATRIX = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")

# Fields of a PEFT configuration that a stack supports, or that do not change what the adapter computes.
UNDERSTOOD = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "eva_config",
    "runtime_config",
}
# Fields with a value that leaves a plain LoRA. Every other field must be empty: PEFT gains new ones.
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base's weights when they initialise an adapter.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def state(stack: ExpertStack, expert: int) -> dict[str, Tensor]:
    """An expert's tensors under the names PEFT gives them, without the zero padding."""
    tensors = {}
    for name, spec in stack.shapes[expert].items():
        layer, rank = stack.layers[name], spec.rank
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.a_ERI.detach()[expert, :rank].cpu().clone()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.b_EOR.detach()[expert, :, :rank].cpu().contiguous().clone()
    return tensors


def save(stack: ExpertStack, expert: int, directory: Path, base: str) -> None:
    """Write expert `expert` as a PEFT LoRA directory that names `base` as its base model."""
    from peft import LoraConfig, TaskType

    spec, shapes = stack.specs[expert], stack.shapes[expert]
    named = {re.escape(name): each for name, each in shapes.items()}   # PEFT reads patterns as regular expressions
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, use_rslora=spec.rslora, task_type=TaskType.CAUSAL_LM,  # type: ignore[arg-type]
        rank_pattern={name: each.rank for name, each in named.items() if each.rank != spec.rank},
        alpha_pattern={name: each.alpha for name, each in named.items() if each.alpha != spec.alpha},
        target_modules=_targets(stack, shapes), base_model_name_or_path=base, inference_mode=True).to_dict()
    config["target_modules"] = sorted(config["target_modules"])   # PEFT keeps a set: its order is not content
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
    save_file(state(stack, expert), directory / WEIGHTS, metadata={"format": "pt"})


def _targets(stack: ExpertStack, shapes: Mapping[str, LoraSpec]) -> list[str]:
    """The adapted layers by their last name where that means the same, else by their full names."""
    last = sorted({name.rsplit(".", 1)[-1] for name in shapes})
    everywhere = {name for name in stack.linear if any(matches(name, suffix) for suffix in last)}
    return last if everywhere == shapes.keys() else sorted(shapes)


def load(stack: ExpertStack, expert: int, directory: Path) -> None:
    """Fill expert `expert` from a PEFT LoRA directory. Raises ArtifactError on anything a stack cannot represent."""
    config, found = read_config(directory), _matrices(directory)
    if foreign := sorted(found.keys() - stack.layers.keys()):
        raise ArtifactError(f"{directory} adapts {foreign[0]}, which is no target layer of this base: "
                            "it was trained on another base, or with other targets.")
    shapes = {name: _layer_spec(config, name) for name in stack.layers if name in found}   # it need not adapt them all
    stack.specs[expert], stack.shapes[expert] = _spec(config), shapes
    with torch.no_grad():
        if len(shapes) < len(stack.layers) or any(spec.rank < stack.layers[name].a_ERI.shape[1]
                                                  for name, spec in shapes.items()):
            stack.weights[expert].zero_()   # what it does not fill
        for name, spec in shapes.items():
            _fill(stack.layers[name], expert, found[name], spec, f"{directory}: {name}")
    stack.changed()


def _matrices(directory: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors on disk by layer, then "A" or "B"."""
    try:
        tensors = load_file(directory / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{directory / WEIGHTS} cannot be read as safetensors: {error}.") from None
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        named = MATRIX.fullmatch(key)
        if named is None:
            raise ArtifactError(f"{directory}: {key} is no LoRA matrix of a linear layer, and nothing else can be "
                                "mixed; train it without.")
        layers.setdefault(named["layer"], {})[named["part"]] = tensor
    return layers


def _fill(layer: StackedLoRA, expert: int, matrices: Mapping[str, Tensor], spec: LoraSpec, where: str) -> None:
    if matrices.keys() != {"A", "B"}:
        raise ArtifactError(f"{where}: one of lora_A and lora_B is missing.")
    a_RI, b_OR = matrices["A"], matrices["B"]
    wanted = (spec.rank, layer.base.in_features), (layer.base.out_features, spec.rank)
    if (tuple(a_RI.shape), tuple(b_OR.shape)) != wanted or spec.rank > layer.a_ERI.shape[1]:
        raise ArtifactError(f"{where}: lora_A {tuple(a_RI.shape)} and lora_B {tuple(b_OR.shape)} do not fit the "
                            f"base's layer ({layer.base.out_features} x {layer.base.in_features}) at rank {spec.rank}.")
    if not (a_RI.isfinite().all() and b_OR.isfinite().all()):   # of what is on disk: the layer may be on "meta"
        raise ArtifactError(f"{where}: the weights are not finite numbers.")
    layer.a_ERI[expert, :spec.rank] = a_RI
    layer.b_EOR[expert, :, :spec.rank] = b_OR
    layer.scale_E[expert] = spec.scale


# Configurations.

def read_config(directory: Path) -> dict[str, Any]:
    """A PEFT adapter's configuration. Raises ArtifactError, naming the field, when a stack cannot represent it."""
    path = directory / CONFIG
    if not path.is_file() or not (directory / WEIGHTS).is_file():
        raise ArtifactError(f"{directory} is no PEFT adapter: it needs {CONFIG} and {WEIGHTS}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("peft_type") == "LORA":
            _check_numbers(config)
    except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise ArtifactError(f"{path} is no LoRA configuration: {error!r}.") from None
    if config.get("peft_type") != "LORA":
        raise ArtifactError(f"{directory}: peft_type is {config.get('peft_type')!r}; only LORA can be mixed.")
    for field, value in config.items():
        allowed = PLAIN.get(field)
        if not (field in UNDERSTOOD or (value in allowed if allowed else value in (None, False, [], {}))):
            raise ArtifactError(f"{directory}: {field} = {value!r} is not a plain LoRA, which is all that can be "
                                "mixed; train it without.")
    return config


def read_spec(directory: Path) -> LoraSpec:
    """Spec of a stack that has room for the adapter: its largest rank, with its general scaling."""
    config = read_config(directory)
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return LoraSpec(rank, config["lora_alpha"], bool(config.get("use_rslora")))


def _check_numbers(config: Mapping[str, Any]) -> None:
    """Raises what reading them later would, or ValueError when ranks and scalings are not numbers that can be used."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for rank in (config["r"], *ranks.values()):
        if type(rank) is not int or rank < 1:
            raise ValueError(f"a rank is {rank!r}")
    for alpha in (config["lora_alpha"], *alphas.values()):
        if not math.isfinite(alpha):
            raise ValueError(f"an alpha is {alpha!r}")
    for pattern in (*ranks, *alphas):
        re.compile(pattern)


def _spec(config: Mapping[str, Any]) -> LoraSpec:
    return LoraSpec(int(config["r"]), float(config["lora_alpha"]), bool(config.get("use_rslora")))


def _layer_spec(config: Mapping[str, Any], name: str) -> LoraSpec:
    """One layer's rank and scaling, after PEFT's patterns: a regular expression for the end of a name."""
    def lookup(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        return default

    general = _spec(config)
    return LoraSpec(lookup(config.get("rank_pattern"), general.rank),
                    lookup(config.get("alpha_pattern"), general.alpha), general.rslora)
