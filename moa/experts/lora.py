"""The stacked LoRA layer: E experts over the linear layers of one model, each row of a batch using its own.

Shapes: E experts, R largest rank, I and O a layer's inputs and outputs, B rows, T positions, P an expert's parameters,
K = E * R. LoRA is Hu et al. 2021 (arXiv 2106.09685): y = Wx + scale * B(Ax), scale = alpha / rank, or
alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732). `moa.experts.peft_format` reads and
writes PEFT directories.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from moa.core.errors import ArtifactError
from moa.experts.lora_autograd import add_lora, slices

BASE_ONLY = -1


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """Rank, scaling and targets of one expert."""

    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Selection:
    """Which expert each row of the current batch uses, shared by all layers of a stack."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None      # (B,) expert of each row; None = no expert
        self.inactive: Tensor | None = None  # (B, 1, 1) True where a row uses the base alone; None = nowhere
        self.weights: Tensor | None = None   # (B, E) every expert by its weight, instead of one expert a row
        self.generation = 0                  # changes whenever the choice or an expert does

    def set(self, rows: Tensor | None) -> None:
        self.generation += 1
        self.rows = self.inactive = self.weights = None
        if rows is None or bool((rows == BASE_ONLY).all()):
            return
        inactive = rows == BASE_ONLY
        self.rows = rows.clamp(min=0)
        self.inactive = inactive.view(-1, 1, 1) if bool(inactive.any()) else None

    def blend(self, weights_BE: Tensor) -> None:
        self.set(None)
        self.weights = weights_BE

    @property
    def batch(self) -> int | None:
        """Number of rows that the selection was made for; None when there is none."""
        chosen = self.rows if self.weights is None else self.weights
        return None if chosen is None else len(chosen)

    @property
    def snapshot(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The selection as it is now, for `restored`."""
        return self.rows, self.inactive, self.weights

    @contextmanager
    def restored(self, choice: tuple[Tensor | None, Tensor | None, Tensor | None]) -> Iterator[None]:
        """Restore a saved selection within the block: gradient checkpointing runs the forward again."""
        now = self.snapshot
        self.rows, self.inactive, self.weights = choice
        self.generation += 1
        try:
            yield
        finally:
            self.rows, self.inactive, self.weights = now
            self.generation += 1


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
        self._gathered: tuple[tuple[int, torch.dtype], Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:   # (B, T, I) -> (B, T, O)
        batch = self.selection.batch
        if batch is None:
            return self.base(x)
        if x.dim() != 3 or len(x) != batch:
            raise ArtifactError(f"A linear layer was given inputs of shape {tuple(x.shape)}, and the experts of "
                                f"{batch} rows: only layers that see (row, position, feature) can be adapted; leave "
                                "the others out of train.targets.")
        if self.selection.weights is None and torch.is_grad_enabled():
            return self._learning(x)
        y = self.base(x)
        if self.selection.weights is not None:
            return y + self._blended(x, self.selection.weights)
        a_BRI, b_BRO = self.gather(x.dtype)
        if x.shape[1] == 1 and x.device.type == "cpu":
            # A step of decoding is matrix-vector products, and CPUs do these fastest in full precision.
            hidden_BR1 = torch.bmm(a_BRI, x.to(a_BRI.dtype).transpose(1, 2))
            return y.add_(torch.bmm(hidden_BR1.transpose(1, 2), b_BRO))
        hidden_BTR = torch.bmm(x, a_BRI.to(x.dtype).transpose(1, 2))
        return torch.baddbmm(y, hidden_BTR, b_BRO.to(x.dtype))

    def _learning(self, x: Tensor) -> Tensor:
        """The output when gradients are wanted."""
        self._gathered = None                  # slices gathered for a validation are stale
        plain = type(self.base) is nn.Linear   # other classes have gradients of their own
        y = self.base(x.detach() if plain else x)
        return add_lora(y, x, self.base.weight if plain else None, self.a_ERI, self.b_EOR, self.scale_E,
                        self.selection.rows, self.selection.inactive)

    def gather(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The selected slices for forwards without gradients, gathered once for all forwards of a selection.
        On a CPU they are in float32 at least."""
        if self.a_ERI.device.type == "cpu":
            dtype = torch.promote_types(dtype, torch.float32)
        key = self.selection.generation, dtype
        if self._gathered is None or self._gathered[0] != key:
            rows = self.selection.rows
            assert rows is not None
            self._gathered = key, *slices(self.a_ERI, self.b_EOR, self.scale_E, rows, self.selection.inactive, dtype)
        return self._gathered[1:]

    def forget_gathered(self) -> None:
        """Free the gathered slices."""
        self._gathered = None

    def take_gathered(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The slices of `gather`, of which the layer keeps no reference."""
        kept = self.gather(dtype)
        self._gathered = None
        return kept

    def _blended(self, x: Tensor, weights_BE: Tensor) -> Tensor:
        """Every expert's product, weighted row by row; differentiable in the weights."""
        rank = self.a_ERI.shape[1]
        gate_B1K = (weights_BE * self.scale_E).repeat_interleave(rank, dim=1).unsqueeze(1)
        a_IK = self.a_ERI.flatten(0, 1).t().to(x.dtype)
        b_KO = self.b_EOR.transpose(1, 2).flatten(0, 1).to(x.dtype)
        return ((x @ a_IK) * gate_B1K.to(x.dtype)) @ b_KO


def target_layers(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers an expert adapts, by name in the model's order; the output projection never is.

    `targets` are suffixes of layer names, or "all-linear". Raises ArtifactError when one matches nothing.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {name: module for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and module is not head}
    if not linear:
        raise ArtifactError(f"{type(model).__name__} has no nn.Linear layer to adapt (GPT-2's Conv1D is none).")
    if targets == "all-linear":
        return linear
    for suffix in targets:
        if not any(matches(name, suffix) for name in linear):
            suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ArtifactError(f"No linear layer of the base is called {suffix!r}; it has {', '.join(suffixes)}.")
    return {name: layer for name, layer in linear.items() if any(matches(name, suffix) for suffix in targets)}


def matches(name: str, suffix: str) -> bool:
    """Whether `suffix` names this layer: the whole name, or its last parts."""
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
        self.shapes: list[dict[str, LoraSpec]] = []   # of each expert, by the layers that it adapts
        self.selection = Selection()
        self.layers: dict[str, StackedLoRA] = {}
        model.requires_grad_(False)
        self.linear = list(target_layers(model, "all-linear"))   # names of all that could be adapted
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
        self.shapes = [dict.fromkeys(self.layers, spec) for spec in self.specs]
        self.trainable(False)

    def __len__(self) -> int:
        return len(self.specs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The experts' parameters, without the base's."""
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
        """Use expert `rows[b]` for row b of the following batches; -1, or None for all, is the base alone. Raises
        IndexError when there is no such expert."""
        if rows is not None and len(rows) and int(rows.max()) >= len(self):
            raise IndexError(f"There is no expert {int(rows.max())}: the stack has {len(self)}.")
        self.selection.set(rows)

    def blend(self, weights_BE: Tensor) -> None:
        """Use every expert on each row of the following batches, by its weight, instead of one."""
        self.selection.blend(weights_BE)

    def changed(self) -> None:
        """Discard gathered slices after weights were written from outside during a selection."""
        self.selection.generation += 1

    def forget(self) -> None:
        """End the selection and free what was gathered for it."""
        self.select(None)
        for layer in self.layers.values():
            layer.forget_gathered()

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
        self.changed()

    def remove(self) -> nn.Module:
        """Put the base's own layers back and return the model."""
        for name, layer in self.layers.items():
            _replace(self.model, name, layer.base)
        self.layers.clear()
        return self.model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
