"""Joint training: all experts of a mixture and the router's heads continue together (Feng et al. 2024, section 3).

    loss = loss_LM + eta * loss_routing

The heads read the prompt in the forward that the answers' loss is computed in. With labels the domain's expert is used
in all layers and every head learns to name it; without (eta = 0) each layer blends the experts by its head's
probabilities, and the heads learn from the answers alone. Only the experts and the heads are trained.

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

HEAD_RATE = 2e-3   # AdamW on standardised features, a few hundred steps: logits move by whole units


def forget_labels(router: Router) -> None:
    """Set the heads to zero: training without labels starts with equal probabilities. Standardisation stays."""
    router.weight_LCD, router.bias_LC = torch.zeros_like(router.weight_LCD), torch.zeros_like(router.bias_LC)


def train_jointly(model: nn.Module, stack: ExpertStack, router: Router, learners: Sequence[Learner],
                  params: TrainParams, eta: float, after_step: Callable[[Sequence[Learner]], Any] = lambda _: None,
                  keep_start: bool = True) -> None:
    """Train the learners' experts and the router's heads together; expert e belongs to `router.labels[e]`.

    With labels, each expert ends with its best epoch by its own validation loss, the start included if `keep_start`:
    an expert that learns nothing here is not changed. `params.learning_rate` 0 trains the heads alone.
    """
    heads = Heads(router).to(stack.weights.device)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=HEAD_RATE, weight_decay=0.0)
    use: Use = "labels" if eta else "blend"
    for parameter in stack.parameters():
        parameter.requires_grad_(params.learning_rate > 0)

    def forward(model: nn.Module, stack: ExpertStack, batch: Batch) -> tuple[Tensor, Tensor | None]:
        if eta:
            stack.select(batch.owners)
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
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            optimizer.step()   # an expert that broke fails by itself, and does not take the heads along
        optimizer.zero_grad()
        after_step(active)

    if keep_start:
        measure_initial_loss(model, stack, learners, params.batch_tokens, forward)
    cotrain(model, stack, learners, params.batch_tokens, step, forward)
    heads.into(router)
    router.stream = "experts" if eta else "blend"
