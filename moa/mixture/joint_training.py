"""Joint training of the experts of a mixture and the heads of its router (Feng et al. 2024, section 3).

    loss = loss_LM + eta * loss_routing

The forward of the language model's loss also gives the heads their inputs: each reads the prompt where it enters the
head's layer. With labels (eta > 0), all layers use the expert of the row's domain, and loss_routing is the mean
cross-entropy of the heads' predictions of that domain. Without labels (eta = 0), each layer blends all experts by the
probabilities of its head, and the heads learn from loss_LM alone. The base stays frozen.

Shapes: L levels, B rows, C domains (one expert each, in the router's order).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moa.core.config import TrainParams
from moa.experts.batches import Batch, row_losses
from moa.experts.cotraining import Learner, cotrain, measure_initial_loss
from moa.experts.lora import ExpertStack
from moa.mixture.layer_routing import Heads, Use, layer_routing, prompt_mask
from moa.mixture.router import Router

# AdamW's learning rate of the heads: their inputs are standardised, so a few hundred steps move logits by whole units.
HEAD_LEARNING_RATE = 2e-3


def forget_labels(router: Router) -> None:
    """Set the router's heads to zero, so that training without labels starts from equal probabilities for all domains.

    The standardisation of the heads' inputs stays.
    """
    router.weight_LCD, router.bias_LC = torch.zeros_like(router.weight_LCD), torch.zeros_like(router.bias_LC)


def train_jointly(model: nn.Module, stack: ExpertStack, router: Router, learners: Sequence[Learner],
                  params: TrainParams, eta: float, after_step: Callable[[Sequence[Learner]], Any] = lambda _: None,
                  keep_start: bool = True) -> None:
    """Train experts and the router's heads together. Changes the stack and the router in place.

    Each expert ends with the weights of its best epoch by its own validation loss.

    Args:
        model: the base, with the layers of `stack` in it.
        stack: the experts; expert e is the one of `router.labels[e]`.
        router: its heads are the start of the training.
        learners: one for each expert that is trained.
        params: training parameters. A `learning_rate` of 0 trains the heads alone.
        eta: weight of the routing loss; 0 trains without labels.
        after_step: called with the active learners after each step.
        keep_start: whether the weights before training count as an epoch: then no expert ends with a higher validation
            loss than it had.
    """
    heads = Heads(router).to(stack.weights.device)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=HEAD_LEARNING_RATE, weight_decay=0.0)
    use: Use = "labels" if eta else "blend"
    for parameter in stack.parameters():
        parameter.requires_grad_(params.learning_rate > 0)

    def forward(model: nn.Module, stack: ExpertStack, batch: Batch) -> tuple[Tensor, Tensor | None]:
        if eta:
            stack.select(batch.experts)
        with layer_routing(model, stack, heads, prompt_mask(batch), use) as logits:
            loss_B = row_losses(model, batch)
        if not eta:
            return loss_B, None
        levels = torch.stack(logits)   # (L, B, C)
        routing_LB = nn.functional.cross_entropy(levels.flatten(0, 1), batch.owners.repeat(len(levels)),
                                                 reduction="none").view(len(levels), -1)
        return loss_B, eta * routing_LB.mean(0)

    def step(active: Sequence[Learner]) -> None:
        gradients = [parameter.grad for parameter in heads.parameters() if parameter.grad is not None]
        # An expert whose loss is not finite fails alone: the heads skip the step.
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            optimizer.step()
        optimizer.zero_grad()
        after_step(active)

    if keep_start:
        measure_initial_loss(model, stack, learners, params.batch_tokens, forward)
    cotrain(model, stack, learners, params.batch_tokens, step, forward)
    heads.into(router)
    router.stream = "experts" if eta else "blend"
