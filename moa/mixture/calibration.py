"""Training a router's heads on labelled prompts, and choosing level, temperature and thresholds on further prompts.

**A router grows without moving.** A successor keeps the standardisation, the level and the heads of the incumbent's
router. Only the heads of new domains are trained, beside the others, and each is then lowered until it wins no known
prompt (`grow_heads`). Which prompts are like a domain depends on that domain's own prompts alone (moa.mixture.router,
moa.mixture.abstention), so no other domain changes that either.

Shapes: N prompts, M training prompts, L levels, D hidden size, C domains, F domains whose logits are given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from moa.mixture import abstention
from moa.mixture.router import Router, Rule

# The levels that `early` may read, as shares of the layers. Test accuracy hardly depends on depth
# (benchmarks/routing.py, levels 0, 5, 7, 29: nine corpora 0.961 0.978 0.983 0.986; eight databases 0.980 0.984 0.984
# 0.973; 32 made domains 0.975 0.973 0.971 0.954), but the AUROC of the nearest training prompt does (benchmarks/out_of_domain.py): it
# is 0.866 and 0.847 at level 0, 0.919 twice at 3, 0.971 and 0.986 at 7, 0.968 and 0.991 at 29. The upper bound keeps
# routing under a quarter of a prefill.
SHALLOWEST, DEEPEST = 1 / 6, 1 / 4
TEMPERATURES = (0.01, 100.0)
ITERATIONS, DECAY = 40, 1e-2   # L-BFGS on standardised features
LOGITS = 1 << 27               # of heads trained at once; a few times as many numbers are in memory


@dataclass(frozen=True)
class Prompts:
    """Labelled prompts. Those of one group depend on each other, for instance as paraphrases."""

    features_NLD: Tensor
    targets_N: Tensor       # number of each prompt's domain
    groups: Sequence[str]   # the group of each; names are unique within a domain

    def of(self, domain: int) -> Tensor:
        """Which prompts are of a domain: (N,), bool."""
        return self.targets_N == domain

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The prompts of all parts, with as many levels as each of them has."""
        depth = min(part.features_NLD.shape[1] for part in parts)
        return cls(torch.cat([part.features_NLD[:, :depth] for part in parts]),
                   torch.cat([part.targets_N for part in parts]), [group for part in parts for group in part.groups])


def train_heads(labels: Sequence[str], train: Prompts) -> Router:
    """Train every level's head on domain labels. Domains weigh the same, whatever their number of prompts.

    The loss is strictly convex (cross-entropy and an L2 penalty on the weights), so the result depends on no seed and
    no starting point. Training starts at zero, so the logits of a prompt always sum to zero. Levels are independent;
    they are trained together as long as their logits are at most LOGITS numbers.

    Args:
        labels: the C domains.
        train: prompts of each of them.

    Returns:
        A router with these heads that is not calibrated.
    """
    mean_LD, scale_LD = train.features_NLD.mean(0), train.features_NLD.std(0).clamp(min=1e-6)
    weight_LCD, bias_LC = _trained(train, mean_LD, scale_LD, len(labels))
    return Router(list(labels), mean_LD, scale_LD, weight_LCD, bias_LC)


def grow_heads(incumbent: Router, labels: Sequence[str], train: Prompts, known: Prompts) -> Router:
    """Heads of a successor: the incumbent's for each domain that it had, and new ones beside them for the others.

    Args:
        incumbent: the router that the successor extends; it has at least one of `labels`.
        labels: the successor's domains.
        train: training prompts of every domain, as for `train_heads`.
        known: further prompts of every domain. Those of the incumbent's domains are to keep their domain.

    Returns:
        A router with the incumbent's standardisation, rule and level, and otherwise not calibrated.
    """
    old = [label for label in labels if label in incumbent.labels]
    new = [label for label in labels if label not in incumbent.labels]
    order, at = [*old, *new], [incumbent.labels.index(label) for label in old]
    grown = Router(order, incumbent.mean_LD, incumbent.scale_LD, incumbent.weight_LCD[:, at], incumbent.bias_LC[:, at],
                   rule=incumbent.rule, layer=incumbent.layer)
    if new:
        place = torch.tensor([order.index(label) for label in labels])
        mine, theirs = (Prompts(part.features_NLD, place[part.targets_N], part.groups) for part in (train, known))
        weight_LCD, bias_LC = _trained(mine, grown.mean_LD, grown.scale_LD, len(new), grown.logits(mine.features_NLD))
        bias_LC = bias_LC - _undeserved(grown, weight_LCD, bias_LC, Prompts.joined([mine, theirs]))
        grown.weight_LCD, grown.bias_LC = (torch.cat(parts, 1) for parts in ((grown.weight_LCD, weight_LCD),
                                                                             (grown.bias_LC, bias_LC)))
    back = [order.index(label) for label in labels]
    grown.labels = list(labels)
    grown.weight_LCD, grown.bias_LC = grown.weight_LCD[:, back].contiguous(), grown.bias_LC[:, back].contiguous()
    return grown


def _undeserved(old: Router, weight_LCD: Tensor, bias_LC: Tensor, prompts: Prompts) -> Tensor:
    """By how much each new head has to be lowered so that it wins no prompt of an old domain: (L, C), 0 or more."""
    theirs = prompts.targets_N < len(old.labels)
    features_NLD = prompts.features_NLD[theirs]
    depth = features_NLD.shape[1]
    best_NL = old.logits(features_NLD).amax(-1)
    new = Router(["new"], old.mean_LD, old.scale_LD, weight_LCD, bias_LC)
    lead_NLC = new.logits(features_NLD) - best_NL[..., None]
    lowered_LC = torch.zeros_like(bias_LC)
    lowered_LC[:depth] = (lead_NLC.amax(0) + abstention.ROUNDING).clamp(min=0)
    return lowered_LC


def _trained(train: Prompts, mean_LD: Tensor, scale_LD: Tensor, new: int, fixed_NLF: Tensor | None = None) -> tuple[
        Tensor, Tensor]:
    """Weights (L, C, D) and biases (L, C) of `new` heads; `targets_N` counts the F domains with fixed logits first."""
    features_NLD, targets_N = train.features_NLD, train.targets_N
    fixed_NLF = features_NLD.new_zeros(*features_NLD.shape[:2], 0) if fixed_NLF is None else fixed_NLF
    levels, labels = features_NLD.shape[1], new + fixed_NLF.shape[-1]
    at_once = max(LOGITS // (len(targets_N) * labels), 1)
    heads = [_heads(((features_NLD[:, some] - mean_LD[some]) / scale_LD[some]).transpose(0, 1).contiguous(),
                    fixed_NLF[:, some].transpose(0, 1).contiguous(), targets_N, labels)
             for some in (slice(first, first + at_once) for first in range(0, levels, at_once))]
    weight_LCD, bias_LC = (torch.cat(parts) for parts in zip(*heads, strict=True))
    return weight_LCD, bias_LC


def _heads(standard_LND: Tensor, fixed_LNF: Tensor, targets_N: Tensor, labels: int) -> tuple[Tensor, Tensor]:
    """Weights (L, C - F, D) and biases (L, C - F) that minimise the loss beside the fixed logits."""
    levels, rows, width = standard_LND.shape
    new = labels - fixed_LNF.shape[-1]
    weight_LDC = torch.zeros(levels, width, new, requires_grad=True)
    bias_L1C = torch.zeros(levels, 1, new, requires_grad=True)
    counts_C = torch.bincount(targets_N, minlength=labels).clamp(min=1)
    share_N = counts_C.reciprocal()[targets_N] / labels
    optimizer = torch.optim.LBFGS([weight_LDC, bias_L1C], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits_LNC = torch.cat([fixed_LNF, torch.baddbmm(bias_L1C, standard_LND, weight_LDC)], -1)
        log_LNC = logits_LNC.log_softmax(-1)
        total = -(log_LNC[:, torch.arange(rows), targets_N] * share_N).sum() + DECAY / 2 * weight_LDC.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return weight_LDC.detach().transpose(1, 2).contiguous(), bias_L1C.detach()[:, 0].contiguous()


def choose_level(router: Router, rule: Rule, tolerance: float, validation: Prompts) -> None:
    """Set the rule, and for `early` its level: the shallowest within `tolerance` of the best level's accuracy, among
    those from SHALLOWEST to DEEPEST."""
    right_NL = router.logits(validation.features_NLD).argmax(-1) == validation.targets_N[:, None]
    accuracy_L = right_NL.double().mean(0)
    levels = readable_levels(len(accuracy_L))
    allowed = accuracy_L[levels.start:levels.stop]
    router.rule = rule
    router.layer = levels.start + int((allowed >= allowed.max() - tolerance - 1e-9).nonzero()[0])


def readable_levels(levels: int) -> range:
    """The levels that `early` may read, of a base with so many."""
    floor, ceiling = int(levels * SHALLOWEST), int((levels - 1) * DEEPEST)
    return range(floor, max(floor, ceiling) + 1)


def calibrate(router: Router, train: Prompts, validation: Prompts, further: Prompts | None = None, *,
              max_abstention: float | None) -> Router:
    """Keep the training prompts, and choose temperature and thresholds. Changes `router` and returns it.

    The temperature minimises the loss of the validation prompts (Guo et al. 2017, arXiv 1706.04599) against Platt's
    targets. Each domain's threshold keeps the promise of `moa.mixture.abstention` on its own prompts.

    Args:
        train: the prompts that the heads were trained on. Those of each domain are kept, and tell how like a prompt is.
        validation: prompts that no head was trained on.
        further: more of them, for the thresholds alone; they may have fewer levels.
        max_abstention: the largest share of a domain's fresh prompts that is left to the base; None = none is.
    """
    before = _confidences(router, validation)
    router.temperature = _temperature(router, validation.features_NLD, validation.targets_N)
    router.seen_MD = nn.functional.normalize(router.standard(train.features_NLD, router.reads), dim=-1)
    router.seen_M, router.threshold_C = train.targets_N, None
    promises = {} if max_abstention is None else _promises(router, train, validation, further, max_abstention)
    if promises:
        router.threshold_C = torch.tensor([promises[label].threshold for label in router.labels], dtype=torch.float64)
    decisions = router.decide(validation.features_NLD)
    correct = torch.tensor([decision.domain == router.labels[target]
                            for decision, target in zip(decisions, validation.targets_N.tolist(), strict=True)])
    confidence = torch.tensor([decision.confidence for decision in decisions])
    levels = by_level(router, validation.features_NLD, validation.targets_N)
    router.figures |= {"accuracy": correct.double().mean().item(),
                       "best_level_accuracy": max(level["accuracy"] for level in levels),
                       "ece": expected_calibration_error(confidence, correct),
                       "ece_uncalibrated": expected_calibration_error(*before),
                       "abstention": sum(decision.abstained for decision in decisions) / len(decisions),
                       "validation_rows": len(decisions), "levels": levels,
                       "promises": {label: each.as_dict() for label, each in promises.items()}}
    return router


def _promises(router: Router, train: Prompts, validation: Prompts, further: Prompts | None, share: float) -> dict[
        str, abstention.Promise]:
    """The promise of each domain, from the similarity of its prompts to its training prompts of other groups."""
    assert router.seen_MD is not None
    prompts = Prompts.joined([train, validation, *([further] if further is not None else [])])
    found = {}
    for domain, label in enumerate(router.labels):
        own = prompts.of(domain)
        groups = [group for group, mine in zip(prompts.groups, own.tolist(), strict=True) if mine]
        seen = [group for group, mine in zip(train.groups, train.of(domain).tolist(), strict=True) if mine]
        standard_ND = nn.functional.normalize(router.standard(prompts.features_NLD[own], router.reads), dim=-1)
        cosine_NM = standard_ND @ router.seen_MD[train.of(domain)].T
        code = {group: number for number, group in enumerate(dict.fromkeys([*groups, *seen]))}
        same_NM = (torch.tensor([code[group] for group in groups])[:, None]
                   == torch.tensor([code[group] for group in seen]))
        nearest_N = cosine_NM.masked_fill(same_NM, -1.0).amax(-1)
        found[label] = abstention.promise(nearest_N.double().numpy(), groups, share)
    return found


def by_level(router: Router, features_NLD: Tensor, targets_N: Tensor) -> list[dict[str, float]]:
    """Accuracy of each level's head by itself, and its agreement with the router, from level 0 on.

    `accuracy` is the share of prompts whose domain is the head's best guess, `agreement` the share of prompts for which
    the head's best guess is the router's, right or wrong; both over all prompts, NaN without any. In a jointly trained
    mixture each head selects its layer's experts, so `agreement` is the share of equal selections.
    """
    best_NL = router.logits(features_NLD).argmax(-1)
    decided_N = router.probabilities(features_NLD).argmax(-1)
    shares = ((best_NL == each_N[:, None]).double().mean(0).tolist() for each_N in (targets_N, decided_N))
    return [{"level": level, "accuracy": accuracy, "agreement": agreement}
            for level, (accuracy, agreement) in enumerate(zip(*shares, strict=True))]


def _confidences(router: Router, prompts: Prompts) -> tuple[Tensor, Tensor]:
    best = router.probabilities(prompts.features_NLD).max(-1)
    return best.values, best.indices == prompts.targets_N


def _temperature(router: Router, features_NLD: Tensor, targets_N: Tensor) -> float:
    """The temperature that minimises the cross-entropy against Platt's smoothed targets (Platt 1999, section 2.2).

    With n validation prompts the right domain gets (n + 1) / (n + 2) and the others share the rest, which is what n
    right answers out of n support under a uniform prior. Against hard targets, heads that are right on every
    validation prompt would get temperature 0, which means certainty.
    """
    right, others = (len(targets_N) + 1) / (len(targets_N) + 2), max(len(router.labels) - 1, 1)
    soft_NC = torch.full((len(targets_N), len(router.labels)), (1 - right) / others, dtype=torch.float64)
    soft_NC[torch.arange(len(targets_N)), targets_N] = right
    logits_NLC = router.used(features_NLD)   # once: no temperature changes them

    def loss(exponent: float) -> float:
        router.temperature = math.exp(exponent)
        return -(soft_NC * router.calibrated(logits_NLC)).sum(-1).mean().item()

    low, high = (math.log(bound) for bound in TEMPERATURES)
    while high - low > 0.01:   # a grid of 17, then a finer one around its best: no assumption of a single minimum
        step = (high - low) / 16
        best = min((low + step * place for place in range(17)), key=loss)
        low, high = best - step, best + step
    return math.exp(best)


def expected_calibration_error(confidence_N: Tensor, correct_N: Tensor, bins: int = 15) -> float:
    """Sum over equal-width bins of confidence of |accuracy - mean confidence| in a bin, weighted by its share of rows.

    Numerator: rows in the bin times that gap; denominator: all rows; empty bins add nothing; NaN without rows
    (Guo et al. 2017, equation 3).
    """
    confidence, correct = confidence_N.double(), correct_N.double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, place, correct - confidence)
    return (gaps.abs().sum() / len(confidence)).item() if len(confidence) else math.nan
