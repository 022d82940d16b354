"""Routing within the forward: the head of each decoder layer reads the layer's input and can select its experts.

This is the router of Feng et al. 2024: a head reads hidden states that the experts of the layers below have computed.
Joint training uses it (`moa.mixture.joint_training`), and so does a jointly trained mixture when it routes.

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
    """A router's heads as a module with trainable weights. The standardisation of their inputs is fixed.

    `forward` takes the number of a level and mean hidden states (B, D) of the prompts, and returns logits (B, C).
    """

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
        """Copy the trained weights into the router."""
        router.weight_LCD = self.weight_LCD.detach().cpu().clone()
        router.bias_LC = self.bias_LC.detach().cpu().clone()


@contextmanager
def layer_routing(model: nn.Module, stack: ExpertStack, heads: Heads, prompts_BT: Tensor, use: Use) -> Iterator[
        list[Tensor]]:
    """Within the block, the head of each decoder layer reads the prompts where they enter the layer.

    Args:
        model: the base, with the layers of `stack` in it.
        stack: the experts, in the order of the heads' domains.
        heads: the router's heads.
        prompts_BT: True at the positions of the prompts.
        use: "labels" leaves the selection of experts as it is; "choose" selects the most probable expert for each
            layer; "blend" blends all experts by their probabilities. The first forward decides for each layer, and
            later forwards, which are decoding steps, repeat its decisions.

    Yields:
        An empty list, to which the first forward appends the logits (B, C) of each level.
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
    """Select experts for the next layers by a head's logits (B, C): a blend of all by their probabilities, or the most
    probable one."""
    if blend:
        stack.blend(logits_BC.softmax(-1))
    else:
        stack.select(logits_BC.argmax(-1))


def layer_selector(stack: ExpertStack, router: Router) -> Callable[[int, Tensor], None] | None:
    """The callback of `moa.mixture.router.features` that selects experts layer by layer for a jointly trained router.

    None for a router whose heads read the base without experts.
    """
    if router.stream == "base":
        return None
    heads = Heads(router).to(stack.weights.device)

    @torch.no_grad()
    def choose(level: int, pooled_BD: Tensor) -> None:
        choice(stack, heads(level, pooled_BD), blend=router.stream == "blend")

    return choose


def prompt_mask(batch: Batch) -> Tensor:
    """True at the positions before each row's last answer, (B, T): the prompts that the router reads in serving."""
    positions_T = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    return positions_T < batch.prompts[:, None]
