"""Stacked LoRA: E experts on the linear layers of one model, where each row of a batch uses its own expert.

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
from moa.experts.lora_autograd import RowGroups, add_lora, grouped_product, of_groups, slices, supports_groups

BASE_ONLY = -1   # in place of an expert's index: the base without an expert


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """Rank and scaling of a LoRA."""

    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scale(self) -> float:
        """The factor of B(Ax)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


Snapshot = tuple[Tensor | None, Tensor | None, Tensor | None, "RowGroups | None"]


class Selection:
    """The experts of the rows of the current batch. One object is shared by all layers of a stack."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None      # (B,) expert of each row, 0 where inactive; None = no selection
        self.inactive: Tensor | None = None  # (B, 1, 1) True where a row has no expert; None = every row has one
        self.weights: Tensor | None = None   # (B, E) weights of a blend of all experts, instead of `rows`
        self.groups: RowGroups | None = None # of `rows`, where the rows of each expert are neighbours
        self.generation = 0                  # increases when the selection or an expert's weights change

    def set(self, rows: Sequence[int] | None, device: torch.device | str = "cpu") -> None:
        """Select expert `rows[b]`, or BASE_ONLY, for row b; None selects no expert for any batch.

        The choice is made here, of numbers of this process, so that no kernel of a GPU has to be waited for.
        """
        self.generation += 1
        self.rows = self.inactive = self.weights = self.groups = None
        if rows is None or all(row == BASE_ONLY for row in rows):
            return
        self.rows = torch.tensor([max(row, 0) for row in rows], dtype=torch.long).to(device, non_blocking=True)
        if BASE_ONLY in rows:
            inactive = torch.tensor([row == BASE_ONLY for row in rows])
            self.inactive = inactive.view(-1, 1, 1).to(device, non_blocking=True)
        self.groups = RowGroups.of(rows, device)

    def blend(self, weights_BE: Tensor) -> None:
        """Select all experts for every row, by these weights."""
        self.set(None)
        self.weights = weights_BE

    @property
    def batch(self) -> int | None:
        """Number of rows of the selection; None without a selection."""
        per_row = self.rows if self.weights is None else self.weights
        return None if per_row is None else len(per_row)

    @property
    def snapshot(self) -> Snapshot:
        """The current selection, for `restored`."""
        return self.rows, self.inactive, self.weights, self.groups

    @contextmanager
    def restored(self, snapshot: Snapshot) -> Iterator[None]:
        """Restore a saved selection within the block: gradient checkpointing runs the forward again."""
        current = self.snapshot
        self.rows, self.inactive, self.weights, self.groups = snapshot
        self.generation += 1
        try:
            yield
        finally:
            self.rows, self.inactive, self.weights, self.groups = current
            self.generation += 1


class StackedLoRA(nn.Module):
    """A frozen linear layer with E stacked experts: (B, T, I) to (B, T, O).

    Experts of lower rank are padded with zeros. The padding stays zero in training: the gradient of a row of A is zero
    if the corresponding column of B is zero, and vice versa.

    Args:
        base: the frozen layer.
        a_ERI: the experts' matrices A.
        b_EOR: the experts' matrices B.
        scale_E: the experts' scales.
        selection: the experts of the rows, shared with the other layers.
    """

    def __init__(self, base: nn.Linear, a_ERI: Tensor, b_EOR: Tensor, scale_E: Tensor, selection: Selection) -> None:
        super().__init__()
        self.base = base
        self.a_ERI = nn.Parameter(a_ERI)
        self.b_EOR = nn.Parameter(b_EOR)
        self.register_buffer("scale_E", scale_E, persistent=False)
        self.selection = selection
        self._gathered: tuple[tuple[int, torch.dtype], Tensor, Tensor] | None = None   # of rows
        self._grouped: tuple[tuple[int, torch.dtype], Tensor, Tensor] | None = None    # of groups of rows

    def forward(self, x: Tensor) -> Tensor:   # (B, T, I) -> (B, T, O)
        batch = self.selection.batch
        if batch is None:
            return self.base(x)
        if x.dim() != 3 or len(x) != batch:
            raise ArtifactError(f"A linear layer was given inputs of shape {tuple(x.shape)}, and the experts of "
                                f"{batch} rows: only layers that see (row, position, feature) can be adapted; leave "
                                "the others out of train.targets.")
        if self.selection.weights is None and torch.is_grad_enabled():
            return self._forward_with_gradients(x)
        y = self.base(x)
        if self.selection.weights is not None:
            return y + self._blended(x, self.selection.weights)
        groups = self.selection.groups
        if groups is not None and supports_groups(x, y, self.a_ERI):
            groups.active(y).add_(grouped_product(x, *self.gather_groups(groups, x.dtype), groups))
            return y
        a_BRI, b_BRO = self.gather(x.dtype)
        if x.shape[1] == 1 and x.device.type == "cpu":
            # A decoding step consists of matrix-vector products, which CPUs compute fastest in float32.
            hidden_BR1 = torch.bmm(a_BRI, x.to(a_BRI.dtype).transpose(1, 2))
            return y.add_(torch.bmm(hidden_BR1.transpose(1, 2), b_BRO))
        hidden_BTR = torch.bmm(x, a_BRI.to(x.dtype).transpose(1, 2))
        return torch.baddbmm(y, hidden_BTR, b_BRO.to(x.dtype))

    def _forward_with_gradients(self, x: Tensor) -> Tensor:
        self.forget_gathered()   # what a validation gathered is stale, and would only take memory
        # `add_lora` computes the input's gradient of a plain linear layer; subclasses have a backward of their own.
        plain_linear = type(self.base) is nn.Linear
        y = self.base(x.detach() if plain_linear else x)
        return add_lora(y, x, self.base.weight if plain_linear else None, self.a_ERI, self.b_EOR, self.scale_E,
                        self.selection.rows, self.selection.inactive, self.selection.groups)

    def gather(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (B, R, I) and scaled B (B, R, O) of each row's selected expert, for forwards without gradients.

        They are gathered once for all forwards of a selection, in `dtype`, but on a CPU in float32 at least.
        """
        if self.a_ERI.device.type == "cpu":
            dtype = torch.promote_types(dtype, torch.float32)
        key = self.selection.generation, dtype
        if self._gathered is None or self._gathered[0] != key:
            rows = self.selection.rows
            assert rows is not None
            self._gathered = key, *slices(self.a_ERI, self.b_EOR, self.scale_E, rows, self.selection.inactive, dtype)
        return self._gathered[1:]

    @property
    def computes_in(self) -> torch.dtype:
        """The dtype of the layer's inputs and outputs."""
        return self.base.weight.dtype

    def gather_groups(self, groups: RowGroups, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (G, R, I) and scaled B (G, O, R) of the experts of the rows, gathered once as by `gather`."""
        key = self.selection.generation, dtype
        if self._grouped is None or self._grouped[0] != key:
            self._grouped = key, *of_groups(self.a_ERI, self.b_EOR, self.scale_E, groups, dtype)
        return self._grouped[1:]

    def forget_gathered(self) -> None:
        """Free the gathered slices."""
        self._gathered = self._grouped = None

    def take_gathered(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The result of `gather`; the layer frees its own reference, so that the caller decides when it is freed."""
        gathered = self.gather(dtype)
        self._gathered = None
        return gathered

    def _blended(self, x: Tensor, weights_BE: Tensor) -> Tensor:
        """The sum of all experts' products, with the weights of each row; differentiable in the weights."""
        rank = self.a_ERI.shape[1]
        gate_B1K = (weights_BE * self.scale_E).repeat_interleave(rank, dim=1).unsqueeze(1)
        a_IK = self.a_ERI.flatten(0, 1).t().to(x.dtype)
        b_KO = self.b_EOR.transpose(1, 2).flatten(0, 1).to(x.dtype)
        return ((x @ a_IK) * gate_B1K.to(x.dtype)) @ b_KO


def target_layers(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that experts adapt, by name in the model's order; the output projection is never one.

    `targets` are layer names or their last parts (`matches`), or "all-linear". Raises ArtifactError when one of them
    matches no layer.
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
    """E experts on one frozen model, which replaces the model's target layers by `StackedLoRA`.

    All weights of expert e are the row `weights[e]` of one matrix (E, P), and its gradients the row `gradients[e]`. So
    gradients are clipped, and weights updated and saved, expert by expert. `select` sets the experts of the following
    forwards; `remove` restores the model.

    Args:
        model: a causal language model of transformers; its parameters are frozen.
        specs: rank and scaling of each expert. The stack has the largest rank; weights are zero at first.
        targets: the layers that experts adapt, as in `target_layers`.
        dtype: of the experts' weights.

    Raises:
        ArtifactError: a target matches no linear layer.
    """

    def __init__(self, model: nn.Module, specs: Sequence[LoraSpec], targets: str | Sequence[str] = "all-linear",
                 dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.specs = list(specs)
        self.shapes: list[dict[str, LoraSpec]] = []   # of each expert: rank and scaling by adapted layer
        self.selection = Selection()
        self.layers: dict[str, StackedLoRA] = {}
        model.requires_grad_(False)
        self.linear = list(target_layers(model, "all-linear"))   # names of all layers that could be adapted
        adapted = target_layers(model, targets)
        device = next(iter(adapted.values())).weight.device
        count, rank = len(specs), max(spec.rank for spec in specs)
        size = sum(rank * (layer.in_features + layer.out_features) for layer in adapted.values())
        self.weights = torch.zeros(count, size, dtype=dtype, device=device)
        self.gradients: Tensor | None = None
        scale_E = torch.tensor([spec.scale for spec in specs], dtype=dtype, device=device)
        start = 0
        for name, layer in adapted.items():
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
        """Set whether backward passes add to `gradients` (E, P), which begin at zero, and return the stack."""
        self.gradients = torch.zeros_like(self.weights) if wanted else None
        start = 0
        for parameter in self.parameters():
            parameter.requires_grad_(wanted)
            stop = start + parameter[0].numel()
            parameter.grad = None if self.gradients is None else self.gradients[:, start:stop].view(parameter.shape)
            start = stop
        return self

    def select(self, rows: Sequence[int] | Tensor | None) -> None:
        """Use expert `rows[b]` for row b of the following batches, and for BASE_ONLY the base without an expert.

        With None, batches of any size use the base. A tensor on a GPU is waited for. Raises IndexError for an expert
        that the stack does not have.
        """
        experts: Sequence[int] | None = rows.tolist() if isinstance(rows, Tensor) else rows
        if unknown := [expert for expert in experts or () if not BASE_ONLY <= expert < len(self)]:
            raise IndexError(f"There is no expert {unknown[0]}: the stack has {len(self)}.")
        self.selection.set(experts, self.weights.device)

    def blend(self, weights_BE: Tensor) -> None:
        """Use the sum of all experts, by these weights, for the rows of the following batches."""
        self.selection.blend(weights_BE)

    def changed(self) -> None:
        """Invalidate gathered slices. Call this after writing to the experts' weights."""
        self.selection.generation += 1

    def forget(self) -> None:
        """End the selection and free its gathered slices."""
        self.select(None)
        for layer in self.layers.values():
            layer.forget_gathered()

    def initialise(self, expert: int, seed: int) -> None:
        """Set an expert's initial weights as PEFT does: A uniform in +-1/sqrt(I), B zero.

        They depend on the seed, the expert's rank and the layers alone.
        """
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
