"""The router: per-layer linear heads over the hidden states of a prompt predict its domain, or abstain.

A *level* is a layer's input: level l is the mean, over a prompt's own tokens, of the hidden states that enter decoder
layer l, as in the paper, where a layer's router reads that layer's input (Feng et al. 2024, arXiv 2403.03432, section
3.2). Level 0 is the embeddings; reading level l costs l layers.

Shapes: N prompts, B prompts in one forward, T positions, L levels, D hidden size, C domains.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from moa.base.encoding import Encoded
from moa.experts.batches import collate, microbatches

Rule = Literal["early", "last", "vote"]
Score = Literal["max_probability", "nearest"]
Stream = Literal["base", "experts", "blend"]   # no experts; those each layer chooses; all of them, by probability
DECIDING = ("rule", "layer", "temperature", "threshold", "score", "stream")   # facts that a decision depends on
FIGURES = ("accuracy", "best_level_accuracy", "ece", "ece_uncalibrated", "abstention", "validation_rows", "levels")
MOST_ODDS = 1e6                        # in place of infinite log-odds, which JSON lacks
FEATURE_TOKENS = 2048                  # padded tokens in one forward without gradients


# Features.

class _DepthReached(Exception):
    """Ends a forward once the deepest level that `features` was called for has been read."""


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers, found by their number, because architectures name the attribute differently."""
    count = model.config.num_hidden_layers
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states (B, T, D) among the arguments of a decoder layer: the first positional one, or by name."""
    return args[0] if args else kwargs["hidden_states"]


def mean_pool(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the positions where `mask_BT` is true: (B, D), summed in float32, differentiable.

    Positions outside the mask are replaced, not multiplied, so that NaN there does not spread. A row with an empty mask
    gives zeros.
    """
    masked = torch.where(mask_BT.bool().unsqueeze(-1), hidden_BTD.float(), 0.0)
    return masked.sum(1) / mask_BT.sum(1, keepdim=True).clamp(min=1)


@torch.no_grad()
def features(model: nn.Module, prompts: Sequence[list[int]], depth: int | None = None,
             choose: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Each level of each prompt: (N, depth, D), float32, on the CPU.

    `depth` counts levels; None is all, one a layer. The forward stops as layer depth-1 is entered: that layer, those
    above and the output projection are not computed. `choose(level, pooled_BD)` is called at each level, with its
    features on the model's device, before the layer computes: a router inside the model selects experts there.
    """
    layers = decoder_layers(model)
    depth = depth or len(layers)
    device = next(model.parameters()).device
    rows = [(0, Encoded(ids, [False] * len(ids))) for ids in prompts]
    result = torch.zeros(len(prompts), depth, model.config.hidden_size)
    for group in microbatches(rows, FEATURE_TOKENS):
        batch = collate([rows[index] for index in group], device)
        lengths = torch.tensor([len(prompts[index]) for index in group], device=device)
        mask_BT = torch.arange(batch.ids.shape[1], device=device) < lengths[:, None]
        levels: list[Tensor] = []   # stay on the device until the forward is over: one copy, not one a layer

        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                 mask_BT: Tensor = mask_BT, levels: list[Tensor] = levels) -> None:
            levels.append(mean_pool(layer_input(args, kwargs), mask_BT))
            if choose is not None:
                choose(len(levels) - 1, levels[-1])
            if len(levels) == depth:
                raise _DepthReached

        hooks = [layer.register_forward_pre_hook(read, with_kwargs=True) for layer in layers[:depth]]
        try:
            model(input_ids=batch.ids, use_cache=False)
        except _DepthReached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        result[group] = torch.stack(levels, 1).cpu()
    return result


# Decisions.

@dataclass(frozen=True, slots=True)
class Decision:
    """The router's decision on one prompt. `domain` is its best guess; where it abstained, the base answers."""

    domain: str
    confidence: float   # calibrated probability of `domain`
    abstained: bool     # score < the router's threshold
    score: float        # similarity of the prompt to the known domains; higher is more similar


@dataclass(frozen=True, slots=True)
class Choice:
    """The decision of one level's head on one prompt."""

    level: int
    domain: str
    probability: float


@dataclass(slots=True)
class Router:
    """Heads of every level, and the rule that turns them into one decision."""

    labels: list[str]
    mean_LD: Tensor
    scale_LD: Tensor
    weight_LCD: Tensor
    bias_LC: Tensor
    rule: Rule = "early"
    layer: int = 0                # the level that `early` reads
    temperature: float = 1.0
    threshold: float = -math.inf  # least score that names a domain
    score: Score = "max_probability"   # until calibration sets another; needs only the heads
    stream: Stream = "base"       # hidden states that the heads were trained on; recorded only
    seen_MD: Tensor | None = None        # nearest: training prompts at level `reads`, standardised, of length one
    seen_M: Tensor | None = None         # nearest: the domain of each
    usual_C: Tensor | None = None        # nearest: mean cosine of each domain's own prompts
    figures: dict[str, Any] = field(default_factory=dict)     # of the calibration; reported, never read
    train: tuple[Tensor, Tensor] | None = field(default=None, repr=False)   # of `fit`, for `nearest`

    @property
    def depth(self) -> int:
        """How many levels the rule needs; the base computes one layer fewer."""
        return self.reads + 1

    @property
    def reads(self) -> int:
        """The deepest level that the rule needs."""
        return self.layer if self.rule == "early" else len(self.weight_LCD) - 1

    def logits(self, features_NLD: Tensor) -> Tensor:
        """Every level's own logits: (N, L, C); features of the first levels are enough for those levels."""
        depth = features_NLD.shape[1]
        standard = (features_NLD - self.mean_LD[:depth]) / self.scale_LD[:depth]
        return torch.einsum("nld,lcd->nlc", standard, self.weight_LCD[:depth]) + self.bias_LC[:depth]

    def used(self, features_NLD: Tensor) -> Tensor:
        """Logits of the levels that the rule decides by, all under `vote`, else one: (N, L, C), float64."""
        used = slice(None) if self.rule == "vote" else slice(self.reads, self.reads + 1)
        return self.logits(features_NLD)[:, used].double()

    def log_probabilities(self, features_NLD: Tensor) -> Tensor:
        """Calibrated log-probabilities under the rule: (N, C), float64. `vote` averages the levels' probabilities."""
        return self.calibrated(self.used(features_NLD))

    def calibrated(self, logits_NLC: Tensor) -> Tensor:
        """`log_probabilities` of the logits that `used` returns."""
        log_NLC = (logits_NLC / self.temperature).log_softmax(-1)
        return log_NLC.logsumexp(1) - math.log(log_NLC.shape[1])

    def probabilities(self, features_NLD: Tensor) -> Tensor:
        """Calibrated probabilities under the rule: (N, C), float64."""
        return self.log_probabilities(features_NLD).exp()

    def standard(self, features_NLD: Tensor, level: int) -> Tensor:
        """One level's features as the heads see them: (N, D), mean 0 and deviation 1 over the training prompts."""
        return (features_NLD[:, level] - self.mean_LD[level]) / self.scale_LD[level]

    def scores(self, features_NLD: Tensor) -> Tensor:
        """How similar each prompt is to the known domains, by `score`: (N,), float64, higher is more similar.

        max_probability: log-odds of the best domain, best minus log-sum-exp of the others. They order prompts as its
            probability does, also where that rounds to 1 (Hendrycks and Gimpel 2017, arXiv 1610.02136).
        nearest: cosine with the nearest training prompt (Sun et al. 2022, arXiv 2204.06507, with one neighbour), less
            half of the mean cosine of that prompt's domain. Domains differ in spread, and a new domain moves the origin
            and with it all cosines of a domain, so that other prompts would fall below the threshold.
        """
        if self.score == "max_probability":
            log_NC = self.log_probabilities(features_NLD)
            best = log_NC.max(-1, keepdim=True)
            others = log_NC.scatter(-1, best.indices, -math.inf).logsumexp(-1)
            return (best.values[:, 0] - others).clamp(max=MOST_ODDS)   # a single domain has no others
        assert self.seen_MD is not None
        standard_ND = self.standard(features_NLD, self.reads)
        best = (nn.functional.normalize(standard_ND, dim=-1) @ self.seen_MD.T).max(1)
        if self.seen_M is None or self.usual_C is None:   # a mixture made before these two were saved
            return best.values.double()
        return best.values.double() - self.usual_C[self.seen_M[best.indices]].double() / 2

    def decide(self, features_NLD: Tensor) -> list[Decision]:
        """The decision on each prompt."""
        best = self.probabilities(features_NLD).max(-1)
        return [Decision(self.labels[label], confidence, score < self.threshold, score)
                for confidence, label, score in zip(best.values.tolist(), best.indices.tolist(),
                                                    self.scores(features_NLD).tolist(), strict=True)]

    def trace(self, features_NLD: Tensor) -> list[list[Choice]]:
        """For each prompt, what the head of each level given would choose alone, at the router's temperature."""
        best = (self.logits(features_NLD).double() / self.temperature).softmax(-1).max(-1)
        return [[Choice(level, self.labels[label], probability)
                 for level, (label, probability) in enumerate(zip(labels, probabilities, strict=True))]
                for labels, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        """The router's tensors by the names they are saved under, none of which is an adapter's."""
        found = {"mean": self.mean_LD, "scale": self.scale_LD, "weight": self.weight_LCD, "bias": self.bias_LC,
                 "seen": self.seen_MD, "seen_of": self.seen_M, "usual": self.usual_C}
        return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}

    def facts(self) -> dict[str, Any]:
        """The scalars for a manifest: those in `DECIDING`, and the figures of the calibration."""
        return {name: getattr(self, name) for name in DECIDING} | self.figures

    @classmethod
    def restore(cls, labels: Sequence[str], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        """The inverse of `tensors` and `facts`; facts of other names are ignored."""
        return cls(list(labels), tensors["mean"], tensors["scale"], tensors["weight"], tensors["bias"],
                   **{name: facts[name] for name in DECIDING},
                   seen_MD=tensors.get("seen"), seen_M=tensors.get("seen_of"), usual_C=tensors.get("usual"),
                   figures={name: facts[name] for name in FIGURES if name in facts})
