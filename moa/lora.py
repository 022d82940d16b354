"""The stacked LoRA layer: E experts over the linear layers of one model, each row of a batch using its own.

Knows nothing of domains' data, routing or training loops.

Shapes: E experts, R largest rank, I and O a layer's inputs and outputs, B rows, T positions, P an expert's parameters.
LoRA is Hu et al. 2021 (arXiv 2106.09685): y = Wx + scale * B(Ax), scale = alpha / rank, or alpha / sqrt(rank) for
rsLoRA (Kalajdzievski 2023, arXiv 2312.03732).
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moa.errors import ArtifactError

BASE_ONLY = -1
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."   # how PEFT names a layer of the wrapped model

# What a PEFT LoRA configuration may say that this layer cannot represent: field -> the values it can.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False, None), "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None), "lora_bias": (False, None), "layer_replication": (None, []),
    "trainable_token_indices": (None, []), "megatron_config": (None,), "alora_invocation_tokens": (None, []),
    "target_parameters": (None, []),
}


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """What one expert is, before it has weights."""

    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Selection:
    """Which expert each row of the current batch uses, shared by all layers of a stack."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None      # (B,) expert of each row; None = the base alone
        self.inactive: Tensor | None = None  # (B, 1, 1) True where a row uses the base alone; None = nowhere
        self.generation = 0                  # changes whenever the choice does

    def set(self, rows: Tensor | None) -> None:
        self.generation += 1
        if rows is None or bool((rows == BASE_ONLY).all()):
            self.rows = self.inactive = None
            return
        inactive = rows == BASE_ONLY
        self.rows = rows.clamp(min=0)
        self.inactive = inactive.view(-1, 1, 1) if bool(inactive.any()) else None


class StackedLoRA(nn.Module):
    """A frozen linear layer with E stacked experts. Lower ranks are padded with zeros, which is exact:
    a zero row of A and the zero column of B opposite get zero gradients from each other."""

    def __init__(self, base: nn.Linear, a_ERI: Tensor, b_EOR: Tensor, scale_E: Tensor, selection: Selection) -> None:
        super().__init__()
        self.base = base
        self.a_ERI = nn.Parameter(a_ERI)
        self.b_EOR = nn.Parameter(b_EOR)
        self.register_buffer("scale_E", scale_E, persistent=False)
        self.selection = selection
        self._gathered: tuple[int, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:   # (B, T, I) -> (B, T, O)
        y = self.base(x)
        if self.selection.rows is None:
            return y
        a_BIR, b_BRO = self._gather(x.dtype)
        delta = torch.bmm(torch.bmm(x, a_BIR), b_BRO)
        if self.selection.inactive is not None:
            delta = delta.masked_fill(self.selection.inactive, 0.0)
        return y + delta

    def _gather(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The chosen slice for each row: no loop over experts, and no row ever meets another expert's numbers.

        While no gradient is wanted, as in decoding, one choice serves many forwards and is gathered once.
        """
        selection, training = self.selection, torch.is_grad_enabled()
        if not training and self._gathered is not None and self._gathered[0] == selection.generation:
            return self._gathered[1], self._gathered[2]
        # index_select, not [rows]: the gradient of the latter adds up in whatever order the threads arrive.
        scale_B11 = self.scale_E.index_select(0, selection.rows).view(-1, 1, 1)
        a_BIR = self.a_ERI.index_select(0, selection.rows).to(dtype).transpose(1, 2)
        b_BRO = (self.b_EOR.index_select(0, selection.rows) * scale_B11).to(dtype).transpose(1, 2)
        self._gathered = None if training else (selection.generation, a_BIR, b_BRO)
        return a_BIR, b_BRO


def target_layers(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers an expert adapts, by name in the model's order; the output projection never is.

    `targets` are suffixes of layer names, or "all-linear". Raises ArtifactError when one matches nothing.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {name: module for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and module is not head}
    if targets == "all-linear":
        return linear
    for suffix in targets:
        if not any(_matches(name, suffix) for name in linear):
            suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ArtifactError(f"No linear layer of the base is called {suffix!r}; it has {', '.join(suffixes)}.")
    return {name: layer for name, layer in linear.items() if any(_matches(name, suffix) for suffix in targets)}


def _matches(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


class ExpertStack:
    """E experts on one frozen model. All weights of expert e are the row `weights[e]` of one matrix (E, P), and its
    gradients the row `gradients[e]`, so that an expert can be clipped, stepped, saved and compared by itself.

    `select` says which expert the rows of the next forward use; `remove` gives the model back as it was.
    """

    def __init__(self, model: nn.Module, specs: Sequence[LoraSpec], targets: str | Sequence[str] = "all-linear",
                 dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.specs = list(specs)
        self.selection = Selection()
        self.layers: dict[str, StackedLoRA] = {}
        model.requires_grad_(False)
        found = target_layers(model, targets)
        device = next(iter(found.values())).weight.device
        count, rank = len(specs), max(spec.rank for spec in specs)
        size = sum(rank * (layer.in_features + layer.out_features) for layer in found.values())
        self.weights = torch.zeros(count, size, dtype=dtype, device=device)
        self.gradients: Tensor | None = None
        scale_E = torch.tensor([spec.scale for spec in specs], dtype=dtype, device=device)
        start = 0
        for name, layer in found.items():
            middle = start + rank * layer.in_features
            stop = middle + rank * layer.out_features
            stacked = StackedLoRA(layer, self.weights[:, start:middle].view(count, rank, layer.in_features),
                                  self.weights[:, middle:stop].view(count, layer.out_features, rank),
                                  scale_E.clone(), self.selection)
            _replace(model, name, stacked)
            self.layers[name] = stacked
            start = stop
        self.trainable(False)

    def __len__(self) -> int:
        return len(self.specs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The experts' own parameters, and nothing of the base."""
        for layer in self.layers.values():
            yield layer.a_ERI
            yield layer.b_EOR

    def trainable(self, wanted: bool) -> Self:
        """Collect gradients into `gradients` (E, P), or stop doing so."""
        self.gradients = torch.zeros_like(self.weights) if wanted else None
        start = 0
        for parameter in self.parameters():
            parameter.requires_grad_(wanted)
            stop = start + parameter[0].numel()
            parameter.grad = None if self.gradients is None else self.gradients[:, start:stop].view(parameter.shape)
            start = stop
        return self

    def select(self, rows: Tensor | None) -> None:
        """Use expert `rows[b]` for row b of the following batches; -1, or None for all, is the base alone."""
        self.selection.set(rows)

    def initialise(self, expert: int, seed: int) -> None:
        """PEFT's own start: A uniform in +-1/sqrt(I), B zero. Depends on nothing but the seed and the layers."""
        generator = torch.Generator().manual_seed(seed)
        rank = self.specs[expert].rank
        for layer in self.layers.values():
            bound = 1 / math.sqrt(layer.base.in_features)
            start = torch.empty(rank, layer.base.in_features).uniform_(-bound, bound, generator=generator)
            with torch.no_grad():
                layer.a_ERI[expert].zero_()
                layer.a_ERI[expert, :rank] = start.to(layer.a_ERI)
                layer.b_EOR[expert].zero_()

    def remove(self) -> nn.Module:
        """Put the base's own layers back and return the model."""
        for name, layer in self.layers.items():
            _replace(self.model, name, layer.base)
        self.layers.clear()
        return self.model

    # PEFT directories, in and out.

    def state(self, expert: int) -> dict[str, Tensor]:
        """An expert's tensors under the names PEFT gives them, without the zero padding."""
        rank = self.specs[expert].rank
        tensors = {}
        for name, layer in self.layers.items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.a_ERI.detach()[expert, :rank].cpu().clone()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.b_EOR.detach()[expert, :, :rank].cpu().contiguous().clone()
        return tensors

    def save(self, expert: int, directory: Path, base: str) -> None:
        """Write expert `expert` as a PEFT LoRA directory that names `base` as its base model."""
        from peft import LoraConfig, TaskType

        spec = self.specs[expert]
        config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, use_rslora=spec.rslora, task_type=TaskType.CAUSAL_LM,
                            target_modules=sorted({name.rsplit(".", 1)[-1] for name in self.layers}),
                            base_model_name_or_path=base, inference_mode=True).to_dict()
        config["target_modules"] = sorted(config["target_modules"])   # PEFT keeps a set: its order is not content
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
        save_file(self.state(expert), directory / WEIGHTS, metadata={"format": "pt"})

    def load(self, expert: int, directory: Path) -> None:
        """Fill expert `expert` from a PEFT LoRA directory. Raises ArtifactError on anything it cannot represent."""
        config = read_config(directory)
        tensors = load_file(directory / WEIGHTS)
        stored = {name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in tensors}
        if missing := sorted(stored - self.layers.keys()):
            raise ArtifactError(f"{directory} adapts {missing[0]}, which is no target layer of this base: "
                                "it was trained on another base.")
        for name, layer in self.layers.items():
            a_RI, b_OR = (tensors.get(f"{PREFIX}{name}.lora_{part}.weight") for part in "AB")
            _fill(layer, expert, a_RI, b_OR, _layer_scale(config, name), f"{directory}: {name}")


def _layer_scale(config: dict[str, Any], name: str) -> float:
    """Scaling of one layer, after PEFT's per-layer patterns (a pattern is a regular expression or a name's end)."""
    import re

    def lookup(patterns: dict[str, Any] | None, default: Any) -> Any:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        return default

    rank = lookup(config.get("rank_pattern"), config["r"])
    alpha = lookup(config.get("alpha_pattern"), config["lora_alpha"])
    return LoraSpec(rank, alpha, bool(config.get("use_rslora"))).scale


def _fill(layer: StackedLoRA, expert: int, a_RI: Tensor | None, b_OR: Tensor | None, scale: float, where: str) -> None:
    with torch.no_grad():
        layer.a_ERI[expert].zero_()
        layer.b_EOR[expert].zero_()
        layer.scale_E[expert] = scale
        if a_RI is None and b_OR is None:
            return   # an expert need not adapt every layer
        if a_RI is None or b_OR is None:
            raise ArtifactError(f"{where}: one of lora_A and lora_B is missing.")
        rank = a_RI.shape[0]
        wanted = (rank, layer.base.in_features), (layer.base.out_features, rank)
        if (tuple(a_RI.shape), tuple(b_OR.shape)) != wanted or rank > layer.a_ERI.shape[1]:
            raise ArtifactError(f"{where}: lora_A {tuple(a_RI.shape)} and lora_B {tuple(b_OR.shape)} do not fit the "
                                f"base's layer ({layer.base.out_features} x {layer.base.in_features}).")
        if not (a_RI.isfinite().all() and b_OR.isfinite().all()):
            raise ArtifactError(f"{where}: the weights are not finite numbers.")
        layer.a_ERI[expert, :rank] = a_RI.to(layer.a_ERI)
        layer.b_EOR[expert, :, :rank] = b_OR.to(layer.b_EOR)


def read_config(directory: Path) -> dict[str, Any]:
    """A PEFT adapter's configuration. Raises ArtifactError, naming the field, when this layer cannot represent it."""
    path = directory / CONFIG
    if not path.is_file() or not (directory / WEIGHTS).is_file():
        raise ArtifactError(f"{directory} is no PEFT adapter: it needs {CONFIG} and {WEIGHTS}.")
    config = json.loads(path.read_text(encoding="utf-8"))
    for field, allowed in PLAIN.items():
        if field in config and config[field] not in allowed:
            raise ArtifactError(f"{directory}: {field} = {config[field]!r} is not a plain LoRA, which is all that "
                                "can be mixed; train it without.")
    return config


def read_spec(directory: Path) -> LoraSpec:
    """Largest rank and scaling of a PEFT adapter on disk."""
    config = read_config(directory)
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return LoraSpec(rank, config["lora_alpha"], bool(config.get("use_rslora")))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
