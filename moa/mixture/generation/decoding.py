"""The forwards of decoding: the prompts of a batch, then one token of each row at a time. Each returns logits.

`Decoding` serves any model that transformers loads. `LlamaDecoding` is for llama-like models (root-mean-square norms,
rotary heads in groups, a gated MLP), with each pass over one token a row written out: layers that read the same input
are one product, the cache is preallocated, the mask is made once, and no head's keys are repeated. Its numbers are
transformers', operation by operation; transformers reads the prompts in both.

Shapes: B rows, T positions, V words, H hidden size, N query heads, K key heads, C = 2K keys and values, G = N / K, D
size of a head, I inputs, O outputs of several layers side by side, R ranks, S blocks of O, each W wide.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from moa.experts.lora import StackedLoRA


class Decoding:
    """A batch whose prompts were read. Rows sit side by side, padded on the left; row b's own tokens are those where
    `mask_BT` is 1, and its next token stands at position `place_B[b]`. To be used in inference mode."""

    def __init__(self, model: Any, ids_BT: Tensor, mask_BT: Tensor) -> None:
        self.model, self.mask_BT = model, mask_BT
        self.place_B = mask_BT.sum(1)
        self.cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
        accepted = inspect.signature(model.forward).parameters
        self._with_positions, self._cuts = "position_ids" in accepted, "logits_to_keep" in accepted
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        self.logits_BV = exact(self._forward(ids_BT, positions_BT))   # of each row's next token

    def step(self, tokens_B: Tensor) -> Tensor:
        """Take the next token of each row, and return the logits of the one after it, (B, V), until the next step."""
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(self.mask_BT), 1)], dim=1)
        self.logits_BV = exact(self._step(tokens_B))
        self.place_B = self.place_B + 1
        return self.logits_BV

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these rows only, for which the experts are already chosen."""
        self.mask_BT, self.place_B, self.logits_BV = (
            each[rows_B] for each in (self.mask_BT, self.place_B, self.logits_BV))
        self._keep(rows_B)

    # What the cache is made of.

    def _step(self, tokens_B: Tensor) -> Tensor:
        """(B) -> (B, V); the mask has a column for the tokens already."""
        return self._forward(tokens_B.unsqueeze(1), self.place_B.unsqueeze(1))

    def _keep(self, rows_B: Tensor) -> None:
        self.cache.batch_select_indices(rows_B)

    def _forward(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        named: dict[str, Any] = {"position_ids": positions_BT} if self._with_positions else {}
        if self._cuts:   # otherwise every position's words are computed
            named["logits_to_keep"] = 1
        output = self.model(input_ids=ids_BT, attention_mask=self.mask_BT, past_key_values=self.cache, use_cache=True,
                            **named)
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV


def exact(logits: Tensor) -> Tensor:
    """The logits in the precision in which tokens are sampled: float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


CHUNK = 64   # positions by which the cache grows


def supports_step(model: Any) -> bool:
    """Whether the model is one of those that this step was compared with, and every row has at most one expert."""
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM

    if type(model) not in (LlamaForCausalLM, Qwen2ForCausalLM):
        return False
    kinds = getattr(model.config, "layer_types", None) or ()
    return (all(kind == "full_attention" for kind in kinds)
            and all(layer.selection.weights is None for layer in model.modules() if isinstance(layer, StackedLoRA)))


class LlamaDecoding(Decoding):
    """`Decoding` of a model that fits. Its cache is (layer, B, C, T, D): keys of K heads, then values of K heads."""

    def __init__(self, model: Any, ids_BT: Tensor, mask_BT: Tensor) -> None:
        super().__init__(model, ids_BT, mask_BT)
        self._prepare()
        self._settle(self._read())

    def _prepare(self) -> None:
        """What steps are made of but for the cache."""
        self.layers: Any = [_Layer(layer) for layer in self.model.model.layers]

    def _read(self) -> Tensor:
        """What transformers kept of the prompts, which it then forgets."""
        rows, heads, length, size = self.cache.layers[0].keys.shape
        filled = self.cache.layers[0].keys.new_empty(len(self.cache.layers), rows, 2 * heads, length, size)
        for columns_BCTD, layer in zip(filled, self.cache.layers, strict=True):
            columns_BCTD[:, :heads] = layer.keys
            columns_BCTD[:, heads:] = layer.values
        del self.cache
        return filled

    def _settle(self, filled: Tensor) -> None:
        """Move keys and values to where there is room for more. Columns in which no row has a token stay behind."""
        first = int(self.mask_BT.any(0).int().argmax())
        filled, self.mask_BT = filled[:, :, :, first:], self.mask_BT[:, first:]
        layers, rows, heads, self.length, size = filled.shape
        room = self.length + CHUNK
        self.columns = filled.new_empty(layers, rows, heads, room, size)
        self.columns[:, :, :, :self.length] = filled
        self.ignored_B11T: Tensor | None = None   # added to the scores: minus infinity where a row is padded
        if not self.mask_BT.all():
            ignored_BT = filled.new_zeros(rows, room)
            ignored_BT[:, :self.length].masked_fill_(self.mask_BT[:, :self.length] == 0, -math.inf)
            self.ignored_B11T = ignored_BT[:, None, None]

    def _keep(self, rows_B: Tensor) -> None:
        for layer in self.layers:
            layer.keep(rows_B)
        self._settle(self.columns[:, rows_B, :, :self.length])

    def _step(self, tokens_B: Tensor) -> Tensor:
        if self.length == self.columns.shape[3]:
            self._settle(self.columns)
        self.length += 1
        stem = self.model.model
        x_BH = stem.embed_tokens(tokens_B)
        turn = self._turn(*stem.rotary_emb(x_BH, self.place_B.unsqueeze(1)))
        ignored = None if self.ignored_B11T is None else self.ignored_B11T[..., :self.length]
        for layer, columns in zip(self.layers, self.columns[:, :, :, :self.length].unbind(), strict=True):
            x_BH = layer(x_BH, turn, columns, ignored)
        logits_BV: Tensor = self.model.lm_head(stem.norm(x_BH))
        return logits_BV

    def _turn(self, cos_B1D: Tensor, sin_B1D: Tensor) -> tuple[Tensor, Tensor]:
        """What heads side by side, (B, N + C, D), are multiplied with, as they are and rolled by half a head, to turn
        queries and keys by their position and leave values as they are."""
        still = self.columns.shape[2] // 2
        turned = self.model.config.num_attention_heads + still
        half = sin_B1D.shape[-1] // 2
        sin_B1D = torch.cat([-sin_B1D[..., :half], sin_B1D[..., half:]], dim=-1)
        return (torch.cat([cos_B1D.expand(-1, turned, -1), torch.ones_like(cos_B1D).expand(-1, still, -1)], dim=1),
                torch.cat([sin_B1D.expand(-1, turned, -1), torch.zeros_like(sin_B1D).expand(-1, still, -1)], dim=1))


class _Layer:
    """One decoder layer."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.between, self.activate = layer.input_layernorm, layer.post_attention_layernorm, mlp.act_fn
        self.scale = attention.scaling
        self.qkv = _Group([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = _Group([attention.o_proj])
        self.gate_up = _Group([mlp.gate_proj, mlp.up_proj])
        self.down = _Group([mlp.down_proj])

    def keep(self, rows_B: Tensor) -> None:
        for group in (self.qkv, self.out, self.gate_up, self.down):
            group.keep(rows_B)

    def __call__(self, x_BH: Tensor, turn: tuple[Tensor, Tensor], columns_BCTD: Tensor,
                 ignored_B11T: Tensor | None) -> Tensor:
        """The hidden state after the layer; its keys and values are written into the last column."""
        x_BH = x_BH + self.out(self._attend(self.qkv(self.before(x_BH)), turn, columns_BCTD, ignored_B11T))
        gate, up = self.gate_up(self.between(x_BH)).chunk(2, dim=-1)
        return x_BH + self.down(self.activate(gate) * up)

    def _attend(self, qkv_BO: Tensor, turn: tuple[Tensor, Tensor], columns_BCTD: Tensor,
                ignored_B11T: Tensor | None) -> Tensor:   # -> (B, N * D)
        rows, both, _, size = columns_BCTD.shape
        heads = qkv_BO.view(rows, -1, size)
        heads = heads * turn[0] + heads.roll(size // 2, -1) * turn[1]
        columns_BCTD[:, :, -1] = heads[:, -both:]
        keys_BKTD, values_BKTD = columns_BCTD.chunk(2, dim=1)
        # With one query position, the G query heads of a key head fold into the position axis: no causal mask applies.
        queries_BKGD = heads[:, :-both].view(rows, both // 2, -1, size)
        return functional.scaled_dot_product_attention(queries_BKGD, keys_BKTD, values_BKTD, ignored_B11T,
                                                       scale=self.scale).reshape(rows, -1)


class _Group:
    """Layers that read the same input, as one product, with the experts on those that have some."""

    def __init__(self, layers: Sequence[nn.Linear | StackedLoRA]) -> None:
        plain = [layer.base if isinstance(layer, StackedLoRA) else layer for layer in layers]
        self.layers = plain
        self._collect(layers, [layer.out_features for layer in plain])

    def _collect(self, layers: Sequence[nn.Linear | StackedLoRA], widths: Sequence[int]) -> None:
        """What the rows' experts add, as the choice stands now.

        CPUs are quickest at a row times a matrix whose rows follow each other. So all halves A are one such matrix a
        row; halves B, having inputs of their own, are cut into S blocks of one width, which makes them one batch.
        """
        self.a_BIR: Tensor | None = None
        halves = [layer.take_gathered(layer.base.weight.dtype) if isinstance(layer, StackedLoRA)
                  and layer.selection.rows is not None else None for layer in layers]
        some = next((half for half in halves if half is not None), None)
        if some is None:
            return
        rows, self.rank, _ = some[0].shape
        width = math.gcd(*widths)
        blocks, owners = [], []
        for place, (half, outputs) in enumerate(zip(halves, widths, strict=True)):
            b_BRO = some[1].new_zeros(rows, self.rank, outputs) if half is None else half[1]
            blocks.append(b_BRO.view(rows, self.rank, -1, width).transpose(1, 2))
            owners += [place] * (outputs // width)
        self.a_BIR = torch.cat([torch.zeros_like(some[0]) if half is None else half[0] for half in halves],
                               dim=1).transpose(1, 2).contiguous()
        self.b_SRW = torch.cat(blocks, dim=1).flatten(0, 1)   # all S of the first row, then those of the second
        in_turn = owners == list(range(len(halves)))
        self.owner_S = None if in_turn else torch.tensor(owners, device=self.a_BIR.device)

    def keep(self, rows_B: Tensor) -> None:
        if self.a_BIR is not None:
            b_BSRW = self.b_SRW.unflatten(0, (len(self.a_BIR), -1))
            self.a_BIR, self.b_SRW = self.a_BIR[rows_B], b_BSRW[rows_B].flatten(0, 1)

    def __call__(self, x_BI: Tensor) -> Tensor:   # (B, I) -> (B, O)
        parts = [layer(x_BI) for layer in self.layers]
        y_BO = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if self.a_BIR is not None:
            hidden_B1R = torch.bmm(x_BI.to(self.a_BIR.dtype).unsqueeze(1), self.a_BIR)
            if self.owner_S is not None:
                hidden_B1R = hidden_B1R.view(len(x_BI), -1, self.rank).index_select(1, self.owner_S)
            y_BO.add_(torch.bmm(hidden_B1R.view(-1, 1, self.rank), self.b_SRW).view(y_BO.shape))
        return y_BO
