"""The router: per-layer linear heads over the frozen base's hidden states name the domain of a prompt, or abstain.

Features come from the base without experts, so they never change when experts do. Knows nothing of files or generation.

Shapes: N prompts, L layers, D hidden size, C domains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moa.batches import collate, microbatches
from moa.tokens import Encoded

STEPS, RATE, DECAY = 200, 0.05, 1e-3   # full-batch AdamW on standardised features: converged, and under a second
FEATURE_TOKENS = 2048                  # padded tokens in one forward without gradients


class _Enough(Exception):
    """Raised inside a forward when the deepest layer that anybody asked for has answered."""


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's stack of decoder layers, whatever its architecture calls it."""
    count = model.config.num_hidden_layers
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)


@torch.no_grad()
def features(model: nn.Module, prompts: Sequence[list[int]], depth: int | None = None) -> Tensor:
    """Each layer's hidden states, averaged over the prompt's own tokens: (N, depth, D), float32, on the CPU.

    `depth` counts layers from the input; None is all. The forward stops after the last of them: the layers above, the
    output projection included, are not computed. Experts must be deselected.
    """
    layers = decoder_layers(model)
    depth = depth or len(layers)
    device = next(model.parameters()).device
    rows = [(0, Encoded(ids, [False] * len(ids))) for ids in prompts]
    result = torch.zeros(len(prompts), depth, model.config.hidden_size)
    for group in microbatches(rows, FEATURE_TOKENS):
        batch = collate([rows[index] for index in group], device)
        lengths = torch.tensor([len(prompts[index]) for index in group], device=device)
        mask_BT1 = (torch.arange(batch.ids.shape[1], device=device) < lengths[:, None]).unsqueeze(-1)
        hooks = [layers[level].register_forward_hook(_pool(result, group, level, mask_BT1, level + 1 == depth))
                 for level in range(depth)]
        try:
            model(input_ids=batch.ids, use_cache=False)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
    return result


def _pool(result: Tensor, group: Sequence[int], level: int, mask_BT1: Tensor, last: bool) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        hidden = (output[0] if isinstance(output, tuple) else output).float()
        result[list(group), level] = ((hidden * mask_BT1).sum(1) / mask_BT1.sum(1)).cpu()
        if last:
            raise _Enough
    return hook


@dataclass(frozen=True, slots=True)
class Decision:
    """What the router says of one prompt. `domain` is its best guess; an abstaining router sends it to the base."""

    domain: str
    confidence: float   # calibrated probability of `domain`
    abstained: bool


@dataclass(slots=True)
class Router:
    """Heads of every layer, and the rule that turns them into one decision."""

    labels: list[str]
    mean_LD: Tensor
    scale_LD: Tensor
    weight_LCD: Tensor
    bias_LC: Tensor
    rule: Literal["early", "last", "vote"] = "early"
    layer: int = 0              # the layer that `early` reads, counted from 0
    temperature: float = 1.0
    threshold: float = 0.0      # least confidence that names a domain

    @property
    def depth(self) -> int:
        """How many layers of the base the rule needs."""
        return self.layer + 1 if self.rule == "early" else len(self.weight_LCD)

    def logits(self, features_NLD: Tensor) -> Tensor:
        """Every layer's own logits: (N, L, C); features of the first layers are enough for those layers."""
        depth = features_NLD.shape[1]
        standard = (features_NLD - self.mean_LD[:depth]) / self.scale_LD[:depth]
        return torch.einsum("nld,lcd->nlc", standard, self.weight_LCD[:depth]) + self.bias_LC[:depth]

    def probabilities(self, features_NLD: Tensor) -> Tensor:
        """Calibrated probabilities under the rule: (N, C). `vote` averages the layers' probabilities."""
        scaled = self.logits(features_NLD) / self.temperature
        if self.rule == "vote":
            return scaled.softmax(-1).mean(1)
        return scaled[:, self.layer if self.rule == "early" else -1].softmax(-1)

    def decide(self, features_NLD: Tensor) -> list[Decision]:
        best = self.probabilities(features_NLD).max(-1)
        return [Decision(self.labels[label], confidence, confidence < self.threshold)
                for confidence, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean_LD, "scale": self.scale_LD, "weight": self.weight_LCD, "bias": self.bias_LC}


def fit(labels: Sequence[str], features_NLD: Tensor, targets_N: Tensor, *, seed: int = 0) -> Router:
    """Train every layer's head on domain labels, each domain weighing the same however many prompts it has."""
    mean, scale = features_NLD.mean(0), features_NLD.std(0).clamp(min=1e-6)
    standard = (features_NLD - mean) / scale
    layers, width, classes = standard.shape[1], standard.shape[2], len(labels)
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(layers, classes, width, generator=generator) * 0.01)
    bias = nn.Parameter(torch.zeros(layers, classes))
    counts = torch.bincount(targets_N, minlength=classes).clamp(min=1)
    balance = counts.reciprocal() / counts.reciprocal().sum()
    optimizer = torch.optim.AdamW([weight, bias], lr=RATE, weight_decay=DECAY)
    for _ in range(STEPS):
        logits = torch.einsum("nld,lcd->nlc", standard, weight) + bias
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets_N.repeat_interleave(layers), weight=balance)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Router(list(labels), mean, scale, weight.detach(), bias.detach())


def calibrate(router: Router, features_NLD: Tensor, targets_N: Tensor, *, rule: Literal["early", "last", "vote"],
              tolerance: float, max_abstention: float) -> Router:
    """Choose layer, temperature and threshold on validation prompts.

    `early` takes the shallowest layer within `tolerance` of the best layer's accuracy. The temperature is the one of
    least loss (Guo et al. 2017, arXiv 1706.04599). The threshold is the highest that lets at most `max_abstention` of
    these prompts abstain.
    """
    accuracy_L = (router.logits(features_NLD).argmax(-1) == targets_N[:, None]).float().mean(0)
    router.rule = rule
    router.layer = int((accuracy_L >= accuracy_L.max() - tolerance - 1e-9).nonzero()[0])
    candidates = torch.logspace(-1, 1.5, 60).tolist()
    losses = []
    for router.temperature in candidates:
        chosen = router.probabilities(features_NLD)[torch.arange(len(targets_N)), targets_N]
        losses.append(-chosen.clamp(min=1e-12).log().mean().item())
    router.temperature = candidates[losses.index(min(losses))]
    confidence = router.probabilities(features_NLD).max(-1).values.sort().values
    router.threshold = confidence[int(max_abstention * len(confidence))].item()
    return router
