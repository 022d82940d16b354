"""The passes of a decode: the prompts of a batch, then one token of each row at a time; out come the next's logits.

Knows nothing of text, of options or of where a row ends. This is the way of any model that transformers loads; models
of a common kind have a faster one (moa.mixture.generation.llama).

Shapes: B rows, T positions, V words.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


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
    """In the precision in which words are chosen: the computation's, and float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
