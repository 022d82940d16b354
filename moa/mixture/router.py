"""The router: per-layer linear heads over the hidden states of a prompt predict its domain, or abstain.

Domains that arrive later have heads beside those of the domains before them, which stay as they are (`own_logits`).

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

from moa.base.architecture import text_config
from moa.base.encoding import Encoded
from moa.experts.batches import collate, microbatches

Rule = Literal["early", "last", "vote"]
Stream = Literal["base", "experts", "blend"]   # no experts; those each layer chooses; all of them, by probability
DECIDING = ("rule", "layer", "temperature", "stream")   # facts that a decision depends on
FIGURES = ("accuracy", "best_level_accuracy", "ece", "ece_uncalibrated", "abstention", "validation_rows", "levels",
           "promises", "extends", "settings")
FEATURE_TOKENS = 2048                  # padded tokens in one forward without gradients


# Features.

class _DepthReached(Exception):
    """Ends a forward once the deepest level that `features` was called for has been read."""


def decoder_layers(model: Any) -> nn.ModuleList:
    """The model's decoder layers, found by their number, because architectures name the attribute differently.

    Those of a part that sees, which some models have beside the decoder, may be as many.
    """
    count, decoder = text_config(model).num_hidden_layers, model.get_decoder()
    return next(module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == count)


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
    result = torch.zeros(len(prompts), depth, text_config(model).hidden_size)
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
    confidence: float         # calibrated probability of `domain` among the known domains
    abstained: bool           # the prompt is unlike every domain
    score: float              # similarity to the training prompts of `domain`, -1 to 1; 0 before calibration
    threshold: float | None   # least similarity of a prompt that is like `domain`; None = the router never abstains


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
    stream: Stream = "base"       # hidden states that the heads were trained on; recorded only
    generation_C: Tensor | None = None   # when each domain arrived; None = all at the same time, 0
    within_RD: Tensor | None = None      # how prompts of one domain differ: see `directions`
    seen_MD: Tensor | None = None        # `directions` of training prompts
    seen_M: Tensor | None = None         # the domain of each
    threshold_C: Tensor | None = None    # least similarity to each domain's prompts; None = never abstain
    figures: dict[str, Any] = field(default_factory=dict)     # of the calibration; reported, never decided by

    @property
    def depth(self) -> int:
        """How many levels the rule needs; the base computes one layer fewer."""
        return self.reads + 1

    @property
    def reads(self) -> int:
        """The deepest level that the rule needs."""
        return self.layer if self.rule == "early" else len(self.weight_LCD) - 1

    @property
    def deciding(self) -> slice:
        """The levels that the rule decides by: all under `vote`, else one."""
        return slice(0, len(self.weight_LCD)) if self.rule == "vote" else slice(self.reads, self.reads + 1)

    def logits(self, features_NLD: Tensor) -> Tensor:
        """Every level's logits: (N, L, C); features of the first levels are enough for those levels."""
        return self._composed(self.own_logits(features_NLD, slice(0, features_NLD.shape[1])))

    def own_logits(self, features_NLD: Tensor, levels: slice) -> Tensor:
        """What each head says by itself, at these levels of which `features_NLD` are: (N, L, C).

        For the first domains these are their logits. A domain that arrived later has a head of its own, which is above
        0 where a prompt is the domain's rather than an older one's.
        """
        standard_NLD = (features_NLD - self.mean_LD[levels]) / self.scale_LD[levels]
        return torch.einsum("nld,lcd->nlc", standard_NLD, self.weight_LCD[levels]) + self.bias_LC[levels]

    def _composed(self, own_NLC: Tensor) -> Tensor:
        """Logits: to what the head of a later domain says, the best logit of the older domains is added.

        So the later domain wins where its head is above 0, and the order of the older domains stays as it was. An older
        domain of -inf is out of the question; where all are, the later ones are compared with each other.
        """
        if self.generation_C is None:
            return own_NLC
        found_NLC = own_NLC.clone()
        for generation in range(1, int(self.generation_C.max()) + 1):
            older_C = self.generation_C < generation
            if older_C.any():
                best_NL1 = found_NLC[..., older_C].amax(-1, keepdim=True)
                found_NLC[..., self.generation_C == generation] += best_NL1.where(best_NL1.isfinite(), 0.0)
        return found_NLC

    def used(self, features_NLD: Tensor) -> Tensor:
        """Logits of the levels that the rule decides by: (N, L, C), float64."""
        return self._composed(self.own_logits(features_NLD[:, self.deciding], self.deciding)).double()

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

    def directions(self, features_ND: Tensor) -> Tensor:
        """Features of the level `reads` as vectors of length one, whose products are similarities: (N, D).

        They are standardised as the heads see them. Then the directions in which prompts of one domain differ most are
        made shorter, since they say little about the domain: x - W'Wx, with W = `within_RD`.
        """
        standard_ND = (features_ND - self.mean_LD[self.reads]) / self.scale_LD[self.reads]
        if self.within_RD is not None:
            standard_ND = standard_ND - (standard_ND @ self.within_RD.T) @ self.within_RD
        return nn.functional.normalize(standard_ND, dim=-1)

    def similarities(self, features_NLD: Tensor) -> Tensor:
        """Cosine of each prompt with the nearest training prompt of each domain: (N, C), float64, -1 to 1.

        It takes features of the first levels, or of the level `reads` alone: (N, D).

        One nearest neighbour by cosine, as in Sun et al. 2022, arXiv 2204.06507. A domain's column depends on its own
        training prompts and on the standardisation alone, so that no other domain changes which prompts are like it.
        """
        assert self.seen_MD is not None and self.seen_M is not None, "the router keeps no training prompts"
        features_ND = features_NLD if features_NLD.dim() == 2 else features_NLD[:, self.reads]
        cosine_NM = self.directions(features_ND) @ self.seen_MD.T
        nearest_NC = torch.full((len(cosine_NM), len(self.labels)), -1.0)
        return nearest_NC.scatter_reduce(1, self.seen_M.expand_as(cosine_NM), cosine_NM, "amax").double()

    def decide(self, features_NLD: Tensor) -> list[Decision]:
        """The decision on each prompt: the most probable of the domains that the prompt is like.

        Where it is like none the router abstains, and its best guess is the most probable of all.
        """
        own_NLC = self.own_logits(features_NLD[:, self.deciding], self.deciding)
        probability_NC = self.calibrated(self._composed(own_NLC).double()).exp()
        similarity_NC = self.similarities(features_NLD) if self.seen_MD is not None else None
        abstained_N = torch.zeros(len(probability_NC), dtype=torch.bool)
        allowed_NC = probability_NC
        if self.threshold_C is not None and similarity_NC is not None:
            like_NC = similarity_NC >= self.threshold_C
            abstained_N = ~like_NC.any(1)
            like_NC |= abstained_N[:, None]
            allowed_NC = self.calibrated(self._composed(own_NLC.masked_fill(~like_NC[:, None], -math.inf)).double())
        best_N = allowed_NC.argmax(-1)
        return [Decision(self.labels[best], probability_NC[index, best].item(), abstained,
                         0.0 if similarity_NC is None else similarity_NC[index, best].item(),
                         None if self.threshold_C is None else self.threshold_C[best].item())
                for index, (best, abstained) in enumerate(zip(best_N.tolist(), abstained_N.tolist(), strict=True))]

    def trace(self, features_NLD: Tensor) -> list[list[Choice]]:
        """For each prompt, what the head of each level given would choose alone, at the router's temperature."""
        best = (self.logits(features_NLD).double() / self.temperature).softmax(-1).max(-1)
        return [[Choice(level, self.labels[label], probability)
                 for level, (label, probability) in enumerate(zip(labels, probabilities, strict=True))]
                for labels, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        """The router's tensors by the names they are saved under, none of which is an adapter's."""
        found = {"mean": self.mean_LD, "scale": self.scale_LD, "weight": self.weight_LCD, "bias": self.bias_LC,
                 "generation": self.generation_C, "within": self.within_RD, "seen": self.seen_MD,
                 "seen_of": self.seen_M, "threshold": self.threshold_C}
        return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}

    def facts(self) -> dict[str, Any]:
        """The scalars for a manifest: those in `DECIDING`, and the figures of the calibration."""
        return {name: getattr(self, name) for name in DECIDING} | self.figures

    @classmethod
    def restore(cls, labels: Sequence[str], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        """The inverse of `tensors` and `facts`; facts of other names are ignored.

        Routers used to have one threshold for the cosine less half of the domain's usual cosine: its threshold for each
        domain is their sum. KeyError for a router that is older still.
        """
        threshold_C = tensors.get("threshold")
        if threshold_C is None and facts.get("threshold") is not None:
            threshold_C = facts["threshold"] + tensors["usual"].double() / 2
        return cls(list(labels), tensors["mean"], tensors["scale"], tensors["weight"], tensors["bias"],
                   **{name: facts[name] for name in DECIDING}, generation_C=tensors.get("generation"),
                   within_RD=tensors.get("within"), seen_MD=tensors.get("seen"), seen_M=tensors.get("seen_of"),
                   threshold_C=threshold_C,
                   figures={name: facts[name] for name in FIGURES if name in facts})
