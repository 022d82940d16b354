"""Attention over short rows on a CPU as batched matrix products; transformers' own function computes all other calls.

torch's fused kernel saves memory that short rows do not need, and its backward took five times as long as this on rows
of 80 tokens in bfloat16 (`LOG.md`). Models look the function up in transformers by its name.

Shapes: B rows, T positions, N query heads, K key heads, G = N / K, D size of a head, M = B * K.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

NAME = "moa_short_rows"
LONGEST = 256   # positions; from 768 on the fused kernel is faster, and its memory grows with T instead of T squared


@contextmanager
def short_rows(model: Any) -> Iterator[None]:
    """Within the block, `attend` replaces transformers' sdpa attention in `model`. A model that computes sdpa attention
    in code of its own is left as it is."""
    replaceable = model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation()
    if not replaceable or model.device.type != "cpu":
        yield
        return
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)   # None for a causal mask without padding
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = "sdpa"


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
           scaling: float | None = None, is_causal: bool | None = None, **more: Any) -> tuple[Tensor, None]:
    """transformers' attention function: (B, N, T, D), (B, K, T, D) twice -> (B, T, N, D)."""
    rows, heads, length, size = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = dropout or any(more.get(name) is not None for name in ("position_bias", "softcap", "cache", "s_aux"))
    if attention_mask is not None or special or not causal or key.shape[2] != length or not 1 < length <= LONGEST:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **more)
    groups = heads // key.shape[1]
    later_TT = torch.full((length, length), -math.inf, dtype=query.dtype).triu(1)
    # The G query heads of a key head are folded into the position axis (Q = G * T), so that no keys are repeated.
    query_MQD = query.reshape(-1, groups * length, size)
    key_MTD, value_MTD = key.reshape(-1, length, size), value.reshape(-1, length, value.shape[-1])
    scores_MQT = torch.baddbmm(later_TT.repeat(groups, 1), query_MQD, key_MTD.transpose(1, 2),
                               alpha=scaling or size ** -0.5)
    mixed_MQD = torch.bmm(scores_MQT.softmax(-1), value_MTD)
    return mixed_MQD.view(rows, heads, length, -1).transpose(1, 2).contiguous(), None
