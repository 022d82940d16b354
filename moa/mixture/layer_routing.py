"""Routing inside the forward: each decoder layer's head reads what enters the layer, and may choose its experts.

This is the router of Feng et al. 2024: it sees the stream that the experts of the layers below have shaped. Joint
training learns with it (`moa.mixture.joint_training`), and a mixture trained so is routed by it.

Shapes: B rows, T positions, D hidden size, C domains (one expert each, in the router's order).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moa.experts.batches import Batch
from moa.experts.lora import ExpertStack
from moa.mixture.router import Router, decoder_layers, layer_input, mean_pool

Use = Literal["labels", "choose", "blend"]


class Heads(nn.Module):
    """The heads of a router as trainable parameters. The standardisation of their inputs stays fixed."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.register_buffer("mean_LD", router.mean_LD.clone())
        self.register_buffer("scale_LD", router.scale_LD.clone())
        self.weight_LCD = nn.Parameter(router.weight_LCD.clone())
        self.bias_LC = nn.Parameter(router.bias_LC.clone())

    def forward(self, level: int, pooled_BD: Tensor) -> Tensor:   # (B, C)
        standard_BD = (pooled_BD - self.mean_LD[level]) / self.scale_LD[level]
        return standard_BD @ self.weight_LCD[level].T + self.bias_LC[level]

    def into(self, router: Router) -> None:
        """Give the router these weights."""
        router.weight_LCD = self.weight_LCD.detach().cpu().clone()
        router.bias_LC = self.bias_LC.detach().cpu().clone()


@contextmanager
def layer_routing(model: nn.Module, stack: ExpertStack, heads: Heads, prompts_BT: Tensor, use: Use) -> Iterator[
        list[Tensor]]:
    """Within the block, each decoder layer's head reads the prompt as it enters the layer.

    Args:
        model: the base.
        stack: the experts on it.
        heads: the router's heads.
        prompts_BT: True on the prompts' positions.
        use: "labels" leaves the selection of experts as it is; "choose" selects the most probable expert for each
            layer; "blend" all experts by their probabilities. The selection of the first forward holds for later ones,
            which are decoding steps.

    Yields:
        The heads' logits (B, C) by level, which the forward appends.
    """
    logits: list[Tensor] = []

    def enter(level: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if level == len(logits):
                logits.append(heads(level, mean_pool(layer_input(args, kwargs), prompts_BT)))
            if use != "labels":
                choice(stack, logits[level], blend=use == "blend")
        return hook

    hooks = [layer.register_forward_pre_hook(enter(level), with_kwargs=True)
             for level, layer in enumerate(decoder_layers(model))]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


def choice(stack: ExpertStack, logits_BC: Tensor, *, blend: bool) -> None:
    """Select experts for the next layers by a head's logits: all by their probability, or the most probable."""
    if blend:
        stack.blend(logits_BC.softmax(-1))
    else:
        stack.select(logits_BC.argmax(-1))


def layer_selector(stack: ExpertStack, router: Router) -> Callable[[int, Tensor], None] | None:
    """What `moa.mixture.router.features` needs to follow a jointly trained router; None for one that reads the base."""
    if router.stream == "base":
        return None
    heads = Heads(router).to(stack.weights.device)

    @torch.no_grad()
    def choose(level: int, pooled_BD: Tensor) -> None:
        choice(stack, heads(level, pooled_BD), blend=router.stream == "blend")

    return choose


def prompt_mask(batch: Batch) -> Tensor:
    """True on the positions before a row's last answer, which the router reads when it serves: (B, T)."""
    places_T = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    return places_T < batch.prompts[:, None]
