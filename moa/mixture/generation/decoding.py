"""The forward passes of decoding: one over the prompts of a batch, then one for each next token. Each returns logits.

`Decoding` serves any causal language model of transformers. `LlamaDecoding` is faster and serves llama-like models
(root-mean-square norms, rotary embeddings, grouped-query attention, a gated MLP). It computes the passes after the
prompts itself: one batched product for the experts of all layers that read the same input, a preallocated cache, a mask
that is made once, and no repeated key heads. Its operations are those of transformers. In both classes the forward of
transformers reads the prompts.

Shapes: B rows, T positions, V words, H hidden size, N query heads, K key heads, C = 2K keys and values, G = N / K,
D size of a head, I inputs, O outputs of several layers side by side, R ranks, S blocks of O, each W wide.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from moa.base.architecture import text_config
from moa.experts.lora import StackedLoRA


class Decoding:
    """A batch of rows being decoded, whose prompts the constructor reads. Use it in inference mode.

    Rows are padded on the left. `mask_BT` is 1 at the tokens of each row and 0 at its padding, `position_B` is the
    position of each row's next token, and `logits_BV` are the logits of that token.

    Args:
        model: a causal language model of transformers, with the experts of the rows already selected.
        ids_BT: token ids of the prompts, padded on the left.
        mask_BT: 1 where `ids_BT` is a prompt, else 0.
    """

    def __init__(self, model: Any, ids_BT: Tensor, mask_BT: Tensor) -> None:
        self.model, self.mask_BT = model, mask_BT
        self.position_B = mask_BT.sum(1)
        self.cache: Any = DynamicCache(config=text_config(model))
        accepted = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"   # until transformers 5.23
        self._takes_positions, self._takes_logits_to_keep = "position_ids" in accepted, "logits_to_keep" in accepted
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        self.logits_BV = exact(self._forward(ids_BT, positions_BT))

    def step(self, tokens_B: Tensor) -> Tensor:
        """Append a token to each row and return the logits of the token after it, (B, V).

        The result is valid until the next call: `CompiledDecoding` overwrites it.
        """
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(self.mask_BT), 1)], dim=1)
        self.logits_BV = exact(self._next_logits(tokens_B))
        self.position_B = self.position_B + 1
        return self.logits_BV

    def keep(self, rows_B: Tensor) -> None:
        """Continue with these rows of the batch alone. The caller has selected their experts already."""
        self.mask_BT, self.position_B, self.logits_BV = (
            tensor[rows_B] for tensor in (self.mask_BT, self.position_B, self.logits_BV))
        self._keep_rows(rows_B)

    # Subclasses with a cache of their own override these.

    def _next_logits(self, tokens_B: Tensor) -> Tensor:
        """Logits (B, V) after these tokens (B), for which the mask has a column already."""
        return self._forward(tokens_B.unsqueeze(1), self.position_B.unsqueeze(1))

    def _keep_rows(self, rows_B: Tensor) -> None:
        """Remove all other rows from the cache."""
        # Made for beams, but layers of every kind have it: those with recurrent states lack `batch_select_indices`.
        self.cache.reorder_cache(rows_B)

    def _forward(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """The model's own forward, (B, T) to the last position's logits (B, V)."""
        optional: dict[str, Any] = {"position_ids": positions_BT} if self._takes_positions else {}
        if self._takes_logits_to_keep:   # without this argument the model computes logits for every position
            optional["logits_to_keep"] = 1
        output = self.model(input_ids=ids_BT, attention_mask=self.mask_BT, use_cache=True,
                            **{self._cache_name: self.cache}, **optional)
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV


def exact(logits: Tensor) -> Tensor:
    """The logits in the precision in which tokens are sampled: float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


CHUNK = 64   # positions by which a preallocated cache grows


def supports_step(model: Any) -> bool:
    """Whether `LlamaDecoding` can decode with the model and the experts that are selected on it now.

    The model must be of an architecture whose results the tests compare with those of transformers, and each row must
    have at most one expert, not a blend.
    """
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM

    if type(model) not in (LlamaForCausalLM, Qwen2ForCausalLM):
        return False
    attention_types = getattr(model.config, "layer_types", None) or ()
    return (all(attention == "full_attention" for attention in attention_types)
            and all(layer.selection.weights is None for layer in model.modules() if isinstance(layer, StackedLoRA)))


class LlamaDecoding(Decoding):
    """`Decoding` with its own passes after the prompts, for models that `supports_step` admits.

    Its cache is one tensor (layers, B, C, T, D): on axis C the keys of the K heads, then their values.
    """

    def __init__(self, model: Any, ids_BT: Tensor, mask_BT: Tensor) -> None:
        super().__init__(model, ids_BT, mask_BT)
        self._prepare_layers()
        self._store_cache(self._take_prompt_cache())

    def _prepare_layers(self) -> None:
        """Collect the weights of the passes, with those of the selected experts."""
        self.layers: Any = [Layer(layer) for layer in self.model.model.layers]

    def _take_prompt_cache(self) -> Tensor:
        """Keys and values of the prompts, (layers, B, C, T, D); the cache of transformers is deleted."""
        rows, heads, length, size = self.cache.layers[0].keys.shape
        filled = self.cache.layers[0].keys.new_empty(len(self.cache.layers), rows, 2 * heads, length, size)
        for columns_BCTD, layer in zip(filled, self.cache.layers, strict=True):
            columns_BCTD[:, :heads] = layer.keys
            columns_BCTD[:, heads:] = layer.values
        del self.cache
        return filled

    def _store_cache(self, filled: Tensor) -> None:
        """Copy keys and values (layers, B, C, T, D) into a tensor with room for `CHUNK` more positions, without the
        leading positions in which every row is padded."""
        first = int(self.mask_BT.any(0).int().argmax())
        filled, self.mask_BT = filled[:, :, :, first:], self.mask_BT[:, first:]
        layers, rows, heads, self.length, size = filled.shape
        room = self.length + CHUNK
        self.columns = filled.new_empty(layers, rows, heads, room, size)
        self.columns[:, :, :, :self.length] = filled
        self.padding_B11T: Tensor | None = None   # added to the scores: minus infinity at padding; None without any
        if not self.mask_BT.all():
            padding_BT = filled.new_zeros(rows, room)
            padding_BT[:, :self.length].masked_fill_(self.mask_BT[:, :self.length] == 0, -math.inf)
            self.padding_B11T = padding_BT[:, None, None]

    def _keep_rows(self, rows_B: Tensor) -> None:
        for layer in self.layers:
            layer.keep_rows(rows_B)
        self._store_cache(self.columns[:, rows_B, :, :self.length])

    def _next_logits(self, tokens_B: Tensor) -> Tensor:
        if self.length == self.columns.shape[3]:
            self._store_cache(self.columns)
        self.length += 1
        decoder = self.model.model
        x_BH = decoder.embed_tokens(tokens_B)
        rotation = self._rotation(*decoder.rotary_emb(x_BH, self.position_B.unsqueeze(1)))
        padding_B11T = None if self.padding_B11T is None else self.padding_B11T[..., :self.length]
        for layer, columns in zip(self.layers, self.columns[:, :, :, :self.length].unbind(), strict=True):
            x_BH = layer(x_BH, rotation, columns, padding_B11T)
        logits_BV: Tensor = self.model.lm_head(decoder.norm(x_BH))
        return logits_BV

    def _rotation(self, cos_B1D: Tensor, sin_B1D: Tensor) -> tuple[Tensor, Tensor]:
        """The rotary embedding as two factors (B, N + C, D): heads * first + (heads rolled by D / 2) * second.

        On axis N + C are queries, keys and values side by side; for values the factors are 1 and 0.
        """
        values = self.columns.shape[2] // 2
        rotated = self.model.config.num_attention_heads + values   # queries, and as many keys as values
        half = sin_B1D.shape[-1] // 2
        sin_B1D = torch.cat([-sin_B1D[..., :half], sin_B1D[..., half:]], dim=-1)
        return (torch.cat([cos_B1D.expand(-1, rotated, -1), torch.ones_like(cos_B1D).expand(-1, values, -1)], dim=1),
                torch.cat([sin_B1D.expand(-1, rotated, -1), torch.zeros_like(sin_B1D).expand(-1, values, -1)], dim=1))


class Layer:
    """A decoder layer's pass over one position of each row."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.activation, self.scale = mlp.act_fn, attention.scaling
        self.qkv = self.group([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = self.group([attention.o_proj])
        self.gate_up = self.group([mlp.gate_proj, mlp.up_proj])
        self.down = self.group([mlp.down_proj])

    def group(self, layers: Sequence[nn.Linear | StackedLoRA]) -> "Group":
        """The product of layers that read the same input."""
        return Group(layers)

    def keep_rows(self, rows_B: Tensor) -> None:
        for group in (self.qkv, self.out, self.gate_up, self.down):
            group.keep_rows(rows_B)

    def __call__(self, x_BH: Tensor, rotation: tuple[Tensor, Tensor], columns_BCTD: Tensor,
                 padding_B11T: Tensor | None) -> Tensor:
        """The hidden state after the layer. Writes the new keys and values into the last position of the cache."""
        x_BH = x_BH + self.out(self._attend(self.qkv(self.attention_norm(x_BH)), rotation, columns_BCTD, padding_B11T))
        gate, up = self.gate_up(self.mlp_norm(x_BH)).chunk(2, dim=-1)
        return x_BH + self.down(self.activation(gate) * up)

    def _attend(self, qkv_BO: Tensor, rotation: tuple[Tensor, Tensor], columns_BCTD: Tensor,
                padding_B11T: Tensor | None) -> Tensor:   # -> (B, N * D)
        rows, both, _, size = columns_BCTD.shape
        heads = qkv_BO.view(rows, -1, size)
        heads = heads * rotation[0] + heads.roll(size // 2, -1) * rotation[1]
        columns_BCTD[:, :, -1] = heads[:, -both:]
        keys_BKTD, values_BKTD = columns_BCTD.chunk(2, dim=1)
        # With one query position, the G query heads of a key head fold into the position axis: no causal mask applies.
        queries_BKGD = heads[:, :-both].view(rows, both // 2, -1, size)
        return functional.scaled_dot_product_attention(queries_BKGD, keys_BKTD, values_BKTD, padding_B11T,
                                                       scale=self.scale).reshape(rows, -1)


class Group:
    """Linear layers that read the same input, with each row's selected expert: (B, I) to (B, O)."""

    def __init__(self, layers: Sequence[nn.Linear | StackedLoRA]) -> None:
        self.layers = [layer.base if isinstance(layer, StackedLoRA) else layer for layer in layers]
        self._collect_experts(layers, [layer.out_features for layer in self.layers])

    def _collect_experts(self, layers: Sequence[nn.Linear | StackedLoRA], widths: Sequence[int]) -> None:
        """Gather A and B of each row's selected expert, for two batched products.

        A CPU multiplies a row by a matrix fastest when the matrix is contiguous. So the matrices A of all layers are
        side by side in one matrix a row. Each layer's B has inputs of its own: the matrices B are cut into S blocks of
        equal width W, which together are one batch.
        """
        self.a_BIR: Tensor | None = None   # None where no selected expert adapts any of the layers
        # The selected A (B, R, I) and B (B, R, O) of each layer; None where no expert adapts it.
        gathered = [layer.take_gathered(layer.base.weight.dtype) if isinstance(layer, StackedLoRA)
                    and layer.selection.rows is not None else None for layer in layers]
        adapted = next((matrices for matrices in gathered if matrices is not None), None)
        if adapted is None:
            return
        rows, self.rank, _ = adapted[0].shape
        width = math.gcd(*widths)
        blocks, owners = [], []
        for owner, (matrices, outputs) in enumerate(zip(gathered, widths, strict=True)):
            b_BRO = adapted[1].new_zeros(rows, self.rank, outputs) if matrices is None else matrices[1]
            blocks.append(b_BRO.view(rows, self.rank, -1, width).transpose(1, 2))
            owners += [owner] * (outputs // width)
        self.a_BIR = torch.cat([torch.zeros_like(adapted[0]) if matrices is None else matrices[0]
                                for matrices in gathered], dim=1).transpose(1, 2).contiguous()
        self.b_SRW = torch.cat(blocks, dim=1).flatten(0, 1)   # axis 0: the S blocks of row 0, then those of row 1 ...
        one_block_each = owners == list(range(len(gathered)))
        # The layer of each block; None where every layer is one block.
        self.owner_S = None if one_block_each else torch.tensor(owners, device=self.a_BIR.device)

    def keep_rows(self, rows_B: Tensor) -> None:
        if self.a_BIR is not None:
            b_BSRW = self.b_SRW.unflatten(0, (len(self.a_BIR), -1))
            self.a_BIR, self.b_SRW = self.a_BIR[rows_B], b_BSRW[rows_B].flatten(0, 1)

    def __call__(self, x_BI: Tensor) -> Tensor:   # (B, I) -> (B, O)
        outputs = [layer(x_BI) for layer in self.layers]
        y_BO = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        if self.a_BIR is not None:
            hidden_B1R = torch.bmm(x_BI.to(self.a_BIR.dtype).unsqueeze(1), self.a_BIR)
            if self.owner_S is not None:
                hidden_B1R = hidden_B1R.view(len(x_BI), -1, self.rank).index_select(1, self.owner_S)
            y_BO.add_(torch.bmm(hidden_B1R.view(-1, 1, self.rank), self.b_SRW).view(y_BO.shape))
        return y_BO
