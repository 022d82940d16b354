"""`LlamaDecoding` (`moa.mixture.generation.decoding`) with tensors of fixed shape and place, for a GPU.

A decoding step of a small batch is hundreds of kernels of a few microseconds, which Python starts more slowly than a
GPU computes them. With a cache of fixed size, a step is the same sequence of kernels on the same memory each time: it
is recorded once as a CUDA graph, and replayed with one call. Rows of one expert share its matrices (`RowGroups`).
Without CUDA, the same steps are computed without a graph.

Shapes: those of `moa.mixture.generation.decoding`; G experts of the batch, P layers with the same input.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moa.experts.lora import StackedLoRA
from moa.experts.lora_autograd import RowGroups, grouped, groups_fit
from moa.mixture.generation.decoding import Group, Layer, LlamaDecoding

STATIC_ON = ("cuda",)   # kinds of device on which `StaticDecoding` is used
ROOM = 256              # positions by which the cache grows; each growth records a new graph


class StaticDecoding(LlamaDecoding):
    """`LlamaDecoding` whose steps read and write tensors that stay where they are."""

    def _prepare_layers(self) -> None:
        self.layers = [_StaticLayer(layer) for layer in self.model.model.layers]

    def _store_cache(self, filled: Tensor) -> None:
        first = int(self.mask_BT.any(0).int().argmax())
        filled, self.mask_BT = filled[:, :, :, first:], self.mask_BT[:, first:]
        layers, rows, heads, self.length, size = filled.shape
        room = (self.length // ROOM + 1) * ROOM
        # Zeros, not whatever lies there: a masked score of NaN would still be NaN.
        self.columns = filled.new_zeros(layers, rows, heads, room, size)
        self.columns[:, :, :, :self.length] = filled
        # Added to the scores: 0 at positions that a row has read, else minus infinity.
        self.visible_B11T = filled.new_full((rows, 1, 1, room), -math.inf)
        self.visible_B11T[:, 0, 0, :self.length].masked_fill_(self.mask_BT[:, :self.length] != 0, 0.0)
        self.at_1 = torch.zeros(1, dtype=torch.long, device=filled.device)
        self.tokens_B = torch.zeros(rows, dtype=torch.long, device=filled.device)
        self.rotation: tuple[Tensor, Tensor] | None = None
        self.graph: Any = None

    def _next_logits(self, tokens_B: Tensor) -> Tensor:
        if self.length == self.columns.shape[3]:
            self._store_cache(self.columns)
        decoder = self.model.model
        self.tokens_B.copy_(tokens_B)
        self.at_1.fill_(self.length)
        self.visible_B11T[..., self.length] = 0.0
        self.length += 1
        # Outside of the graph: some models choose their frequencies by the longest position.
        like = self.columns.new_empty(0)
        rotation = self._rotation(*decoder.rotary_emb(like, self.position_B.unsqueeze(1)))
        if self.rotation is None:
            self.rotation = rotation
        else:
            for kept, new in zip(self.rotation, rotation, strict=True):
                kept.copy_(new)
        if self.columns.device.type != "cuda":
            return self._pass()
        if self.graph is None:
            self._record()
        self.graph.replay()
        return self.recorded_BV

    def _record(self) -> None:
        """Record the graph of a step. Its kernels also run once before, on a stream of their own, as recording needs;
        they write what the replay writes."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._pass()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.recorded_BV = self._pass()

    def _pass(self) -> Tensor:
        """The logits (B, V) after `tokens_B`, whose keys and values are written into the cache."""
        decoder = self.model.model
        assert self.rotation is not None
        x_BH = decoder.embed_tokens(self.tokens_B)
        for layer, columns in zip(self.layers, self.columns.unbind(), strict=True):
            x_BH = layer.at(x_BH, self.rotation, columns, self.visible_B11T, self.at_1)
        logits_BV: Tensor = self.model.lm_head(decoder.norm(x_BH))
        return logits_BV


class _StaticLayer(Layer):
    """`Layer` that writes at a position which a tensor has."""

    def group(self, layers: Sequence[nn.Linear | StackedLoRA]) -> Group:
        return _ExpertGroup(layers)

    def at(self, x_BH: Tensor, rotation: tuple[Tensor, Tensor], columns_BCTD: Tensor, visible_B11T: Tensor,
           at_1: Tensor) -> Tensor:
        """As `Layer.__call__`, at the position `at_1`."""
        self.at_1 = at_1
        return self(x_BH, rotation, columns_BCTD, visible_B11T)

    def _attend(self, qkv_BO: Tensor, rotation: tuple[Tensor, Tensor], columns_BCTD: Tensor,
                padding_B11T: Tensor | None) -> Tensor:   # -> (B, N * D)
        rows, both, _, size = columns_BCTD.shape
        heads = qkv_BO.view(rows, -1, size)
        heads = heads * rotation[0] + heads.roll(size // 2, -1) * rotation[1]
        columns_BCTD.index_copy_(2, self.at_1, heads[:, -both:].unsqueeze(2))
        keys_BKTD, values_BKTD = columns_BCTD.chunk(2, dim=1)
        queries_BKGD = heads[:, :-both].view(rows, both // 2, -1, size)
        return functional.scaled_dot_product_attention(queries_BKGD, keys_BKTD, values_BKTD, padding_B11T,
                                                       scale=self.scale).reshape(rows, -1)


class _ExpertGroup(Group):
    """`Group` whose experts are multiplied once for all their rows, where the batch has its rows by expert."""

    def _collect_experts(self, layers: Sequence[nn.Linear | StackedLoRA], widths: Sequence[int]) -> None:
        self.sources = list(layers), list(widths)
        self.groups: RowGroups | None = None
        adapted = [layer if isinstance(layer, StackedLoRA) else None for layer in layers]
        one = next((layer for layer in adapted if layer is not None), None)
        groups = None if one is None else one.selection.groups
        if one is None or groups is None or not groups_fit(
                one.a_ERI.device, one.computes_in, one.base.in_features, sum(widths), one.a_ERI.shape[1]):
            super()._collect_experts(layers, widths)
            return
        self.groups, rank = groups, one.a_ERI.shape[1]
        matrices = [None if layer is None else layer.gather_groups(groups, one.computes_in) for layer in adapted]
        # The layers' B stand on the diagonal of one matrix, so that one product serves all P layers.
        count, ranks_of_all = len(groups.experts_G), len(layers) * rank
        self.a_GIK = _zeros(one, count, one.base.in_features, ranks_of_all)
        self.b_GKO = _zeros(one, count, ranks_of_all, sum(widths))
        start = 0
        for part, (pair, width) in enumerate(zip(matrices, widths, strict=True)):
            ranks = slice(part * rank, (part + 1) * rank)
            if pair is not None:
                self.a_GIK[..., ranks] = pair[0].transpose(1, 2)
                self.b_GKO[:, ranks, start:start + width] = pair[1].transpose(1, 2)
            start += width
        for layer in adapted:
            if layer is not None:
                layer.forget_gathered()
        self.a_BIR = None

    def keep_rows(self, rows_B: Tensor) -> None:   # noqa: ARG002 - rows that stay, whose experts are selected already
        self._collect_experts(*self.sources)

    def __call__(self, x_BI: Tensor) -> Tensor:   # (B, I) -> (B, O)
        y_BO = super().__call__(x_BI)
        if self.groups is not None:
            first, offsets_G = self.groups.first, self.groups.offsets_G(1)
            y_BO[first:].add_(grouped(grouped(x_BI[first:], self.a_GIK, offsets_G), self.b_GKO, offsets_G))
        return y_BO


def _zeros(layer: StackedLoRA, *shape: int) -> Tensor:
    """Zeros in the dtype that the layer computes in, on its device."""
    return torch.zeros(shape, dtype=layer.computes_in, device=layer.a_ERI.device)
