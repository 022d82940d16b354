"""Lossless reading and writing of PEFT LoRA directories, from and to the experts of a stack.

    adapter_config.json         the fields of PEFT's LoraConfig
    adapter_model.safetensors   one lora_A (R, I) and one lora_B (O, R) for each adapted layer

Reading raises an ArtifactError that names the first setting or tensor that a stack cannot represent: ignoring it would
give other answers than PEFT does.
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
PREFIX = "base_model.model."   # before a layer's name in PEFT's tensor names
MATRIX = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")

# Fields of a PEFT configuration that a stack supports, or that do not change what the adapter computes.
SUPPORTED_FIELDS = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "eva_config",
    "runtime_config",
}
# Allowed values of further fields. Any other field must be empty: a new version of PEFT may have added it.
ALLOWED_VALUES: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base's weights when they initialise an adapter.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def state(stack: ExpertStack, expert: int) -> dict[str, Tensor]:
    """Copies of an expert's tensors on the CPU, without zero padding, by their names in PEFT."""
    tensors = {}
    for name, spec in stack.shapes[expert].items():
        layer, rank = stack.layers[name], spec.rank
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.a_ERI.detach()[expert, :rank].cpu().clone()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.b_EOR.detach()[expert, :, :rank].cpu().contiguous().clone()
    return tensors


def save(stack: ExpertStack, expert: int, directory: Path, base: str) -> None:
    """Write an expert of the stack as a PEFT LoRA directory.

    `directory` is created if missing; `base` becomes `base_model_name_or_path`, where PEFT looks for the base model.
    """
    from peft import LoraConfig, TaskType

    spec, shapes = stack.specs[expert], stack.shapes[expert]
    patterns = {re.escape(name): layer for name, layer in shapes.items()}   # PEFT reads them as regular expressions
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, use_rslora=spec.rslora, task_type=TaskType.CAUSAL_LM,  # type: ignore[arg-type]
        rank_pattern={pattern: layer.rank for pattern, layer in patterns.items() if layer.rank != spec.rank},
        alpha_pattern={pattern: layer.alpha for pattern, layer in patterns.items() if layer.alpha != spec.alpha},
        target_modules=_target_modules(stack, shapes), base_model_name_or_path=base, inference_mode=True).to_dict()
    config["target_modules"] = sorted(config["target_modules"])   # a set in PEFT; sorted for equal bytes
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
    save_file(state(stack, expert), directory / WEIGHTS, metadata={"format": "pt"})


def _target_modules(stack: ExpertStack, shapes: Mapping[str, LoraSpec]) -> list[str]:
    """The adapted layers for PEFT's `target_modules`: last parts of their names if these match no other layer of the
    base, else their full names."""
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in shapes})
    matched = {name for name in stack.linear if any(matches(name, suffix) for suffix in suffixes)}
    return suffixes if matched == shapes.keys() else sorted(shapes)


def load(stack: ExpertStack, expert: int, directory: Path) -> None:
    """Fill an expert of the stack from a PEFT LoRA directory, in place.

    Raises ArtifactError where the directory is unreadable, has a setting or tensor that a stack cannot represent, does
    not fit the base's layers, or has weights that are not finite.
    """
    config, matrices = read_config(directory), _read_matrices(directory)
    if foreign := sorted(matrices.keys() - stack.layers.keys()):
        raise ArtifactError(f"{directory} adapts {foreign[0]}, which is no target layer of this base: "
                            "it was trained on another base, or with other targets.")
    shapes = {name: _layer_spec(config, name) for name in stack.layers if name in matrices}   # may be a part of all
    stack.specs[expert], stack.shapes[expert] = _spec(config), shapes
    with torch.no_grad():
        if len(shapes) < len(stack.layers) or any(spec.rank < stack.layers[name].a_ERI.shape[1]
                                                  for name, spec in shapes.items()):
            stack.weights[expert].zero_()   # padding, and layers that this expert does not adapt
        for name, spec in shapes.items():
            _fill(stack.layers[name], expert, matrices[name], spec, f"{directory}: {name}")
    stack.changed()


def _read_matrices(directory: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a directory, by layer, then by "A" or "B". Raises ArtifactError for tensors of other kinds."""
    try:
        tensors = load_file(directory / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{directory / WEIGHTS} cannot be read as safetensors: {error}.") from None
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = MATRIX.fullmatch(key)
        if match is None:
            raise ArtifactError(f"{directory}: {key} is no LoRA matrix of a linear layer, and a mixture supports no "
                                "other tensors: train the adapter without it.")
        layers.setdefault(match["layer"], {})[match["part"]] = tensor
    return layers


def _fill(layer: StackedLoRA, expert: int, matrices: Mapping[str, Tensor], spec: LoraSpec, where: str) -> None:
    """Write one layer's matrices into the stack; `where` begins the message of an ArtifactError."""
    if matrices.keys() != {"A", "B"}:
        raise ArtifactError(f"{where}: one of lora_A and lora_B is missing.")
    a_RI, b_OR = matrices["A"], matrices["B"]
    expected = (spec.rank, layer.base.in_features), (layer.base.out_features, spec.rank)
    if (tuple(a_RI.shape), tuple(b_OR.shape)) != expected or spec.rank > layer.a_ERI.shape[1]:
        raise ArtifactError(f"{where}: lora_A {tuple(a_RI.shape)} and lora_B {tuple(b_OR.shape)} do not fit the "
                            f"base's layer ({layer.base.out_features} x {layer.base.in_features}) at rank {spec.rank}.")
    if not (a_RI.isfinite().all() and b_OR.isfinite().all()):   # not in the layer, which may be on "meta"
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
        allowed = ALLOWED_VALUES.get(field)
        if not (field in SUPPORTED_FIELDS or (value in allowed if allowed else value in (None, False, [], {}))):
            raise ArtifactError(f"{directory}: {field} = {value!r} is not a plain LoRA, and a mixture supports no "
                                "other adapters: train the adapter without it.")
    return config


def read_spec(directory: Path) -> LoraSpec:
    """Spec of a stack that an adapter fits: the largest rank of its layers, and the scaling of its configuration.

    Raises ArtifactError as `read_config` does.
    """
    config = read_config(directory)
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return LoraSpec(rank, config["lora_alpha"], bool(config.get("use_rslora")))


def _check_numbers(config: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError, TypeError or re.error where ranks, alphas or their patterns are invalid."""
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
    """Rank and scaling of one layer by PEFT's patterns, regular expressions that match the last parts of its name."""
    def lookup(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        return default

    general = _spec(config)
    return LoraSpec(lookup(config.get("rank_pattern"), general.rank),
                    lookup(config.get("alpha_pattern"), general.alpha), general.rslora)
