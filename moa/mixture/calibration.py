"""Training a router's heads on labelled prompts, and choosing level, temperature and thresholds on further prompts.

**A router grows without moving.** A successor keeps the standardisation, the level and the heads of the incumbent's
router. A new domain gets a head of its own beside them, which tells its prompts from all others, and which is lowered
until it wins no known prompt of an older domain (`add_heads`). Which prompts are like a domain depends on that domain's
own prompts alone (moa.mixture.router, moa.mixture.abstention), so no other domain changes that either.

Shapes: N prompts, M training prompts, L levels, D hidden size, C domains, J new domains.
"""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from moa.mixture import abstention
from moa.mixture.router import Router, Rule

# The levels that `early` may read, as shares of the layers. Test accuracy hardly depends on depth
# (benchmarks/routing.py, levels 0, 5, 7, 29: nine corpora 0.961 0.978 0.983 0.986; eight databases 0.980 0.984 0.984
# 0.973; 32 made domains 0.975 0.973 0.971 0.954), but the AUROC of the similarity to the nearest training prompt does
# (benchmarks/RESULTS.md, "Out of domain"): 0.866 and 0.847 at level 0, 0.919 twice at 3, 0.971 and 0.986 at 7, 0.968
# and 0.991 at 29. The upper bound keeps routing under a quarter of a prefill.
SHALLOWEST, DEEPEST = 1 / 6, 1 / 4
TEMPERATURES = (0.01, 100.0)
ITERATIONS, DECAY = 40, 1e-2   # L-BFGS on standardised features
# How like a domain a prompt is: the nearest of KEPT training prompts, after the WITHIN directions in which prompts of
# one domain differ most are made shorter. Chosen on the corpora of benchmarks/corpora.py that report nothing (LOG.md).
KEPT, WITHIN, SHRINKAGE = 120, 64, 0.7
FOLDS = 5                      # of the cross-fitted scores that lower a new domain's head
LEARNED = 16_000               # prompts that such a head is trained on, at most
TAIL, FARTHER = 10, 2          # it wins one of FARTHER times as many known prompts, as the TAIL highest scores tell
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

    def at(self, levels: slice) -> Self:
        """The prompts with the features of these levels alone."""
        return type(self)(self.features_NLD[:, levels], self.targets_N, self.groups)

    def where(self, kept_N: Tensor) -> Self:
        """The prompts where `kept_N` is true."""
        return type(self)(self.features_NLD[kept_N], self.targets_N[kept_N],
                          [group for group, kept in zip(self.groups, kept_N.tolist(), strict=True) if kept])

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The prompts of all parts, which have the same levels."""
        return cls(torch.cat([part.features_NLD for part in parts]), torch.cat([part.targets_N for part in parts]),
                   [group for part in parts for group in part.groups])


def train_heads(labels: Sequence[str], train: Prompts, background_BLD: Tensor | None = None) -> Router:
    """Train every level's head on domain labels. Domains weigh the same, whatever their number of prompts.

    The loss is strictly convex (cross-entropy and an L2 penalty on the weights), so the result depends on no seed and
    no starting point. Training starts at zero, so the logits of a prompt always sum to zero. Levels are independent;
    they are trained together as long as their logits are at most LOGITS numbers.

    Args:
        labels: the C domains.
        train: prompts of each of them.
        background_BLD: features of B prompts of no domain, which count where features are standardised
            (moa.mixture.background); None = there are none.

    Returns:
        A router with these heads that is not calibrated.
    """
    everything_NLD = torch.cat([train.features_NLD, *([] if background_BLD is None else [background_BLD])])
    mean_LD, scale_LD = everything_NLD.mean(0), everything_NLD.std(0).clamp(min=1e-6)
    levels, at_once = train.features_NLD.shape[1], max(LOGITS // (len(train.targets_N) * len(labels)), 1)
    heads = [_heads(((train.features_NLD[:, some] - mean_LD[some]) / scale_LD[some]).transpose(0, 1).contiguous(),
                    train.targets_N, len(labels))
             for some in (slice(first, first + at_once) for first in range(0, levels, at_once))]
    weight_LCD, bias_LC = (torch.cat(parts) for parts in zip(*heads, strict=True))
    return Router(list(labels), mean_LD, scale_LD, weight_LCD, bias_LC)


def _heads(standard_LND: Tensor, targets_N: Tensor, labels: int) -> tuple[Tensor, Tensor]:
    """Weights (L, C, D) and biases (L, C) that minimise the loss."""
    rows = len(targets_N)
    counts_C = torch.bincount(targets_N, minlength=labels).clamp(min=1)
    share_N = counts_C.reciprocal()[targets_N] / labels
    return _minimised(standard_LND, labels, lambda logits_LNC: -(
        logits_LNC.log_softmax(-1)[:, torch.arange(rows), targets_N] * share_N).sum())


def _minimised(standard_LND: Tensor, heads: int, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Weights (L, C, D) and biases (L, C) of so many heads that minimise a loss of their logits and an L2 penalty."""
    levels, _, width = standard_LND.shape
    weight_LDC = torch.zeros(levels, width, heads, requires_grad=True)
    bias_L1C = torch.zeros(levels, 1, heads, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_LDC, bias_L1C], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def total() -> Tensor:
        optimizer.zero_grad()
        value = loss(torch.baddbmm(bias_L1C, standard_LND, weight_LDC)) + DECAY / 2 * weight_LDC.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(total)
    return weight_LDC.detach().transpose(1, 2).contiguous(), bias_L1C.detach()[:, 0].contiguous()


# A successor's heads.

def successor(incumbent: Router, labels: Sequence[str]) -> Router:
    """A router with the incumbent's heads for each domain that it had; those of the others are 0, for `add_heads`.

    Args:
        incumbent: the router that the successor extends; it has at least one of `labels`.
        labels: the successor's domains.

    Returns:
        A router with the incumbent's standardisation, rule and level, and otherwise not calibrated.
    """
    L, C, D = len(incumbent.weight_LCD), len(labels), incumbent.weight_LCD.shape[-1]
    was_C = incumbent.generation_C if incumbent.generation_C is not None else torch.zeros(len(incumbent.labels)).long()
    weight_LCD, bias_LC, generation_C = torch.zeros(L, C, D), torch.zeros(L, C), torch.full((C,), int(was_C.max()) + 1)
    for at, label in enumerate(labels):
        if label in incumbent.labels:
            old = incumbent.labels.index(label)
            weight_LCD[:, at], bias_LC[:, at] = incumbent.weight_LCD[:, old], incumbent.bias_LC[:, old]
            generation_C[at] = was_C[old]
    grown = Router(list(labels), incumbent.mean_LD, incumbent.scale_LD, weight_LCD, bias_LC, rule=incumbent.rule,
                   layer=incumbent.layer)
    grown.generation_C = generation_C if int(generation_C.max()) else None
    grown.within_RD = incumbent.within_RD
    return grown


def add_heads(router: Router, incumbent: Collection[str], train: Prompts, validation: Prompts,
              further: Prompts) -> None:
    """Train the heads of the domains that the incumbent lacks. Changes `router`, whose thresholds are known.

    A new domain's head tells its prompts from those of all other domains; each domain weighs the same, and the new one
    as much as the others together. Then it is lowered until it wins no known prompt that is like the new domain: none
    of `train` and `further`, scored by heads that were trained without the prompt's group, and none of `validation`.
    Where known prompts come near to it, it is lowered further, until it would win one of FARTHER times as many, if
    their scores have an exponential tail, as the TAIL highest ones tell (`moa.mixture.abstention.low_end`).

    Args:
        incumbent: the domains that keep their prompts.
        train: training prompts, of all levels.
        validation: prompts that train no head, of all levels.
        further: more training prompts, of the levels that the rule decides by.
    """
    new = [at for at, label in enumerate(router.labels) if label not in incumbent]
    if not new:
        return
    old_C = torch.tensor([label in incumbent for label in router.labels])
    deciding, every = router.deciding, slice(0, len(router.weight_LCD))
    _place(router, new, every, *_own_heads(router, train, new, every))   # of the other levels, for `Router.trace` alone
    learning = _first(Prompts.joined([train.at(deciding), further]), LEARNED // len(router.labels))
    fold_N = torch.tensor([zlib.crc32(group.encode()) % FOLDS for group in learning.groups])
    scores_NLJ = torch.zeros(len(fold_N), len(router.weight_LCD[deciding]), len(new))
    for fold in range(FOLDS):
        inside_N = fold_N == fold
        if inside_N.any() and not inside_N.all():
            _place(router, new, deciding, *_own_heads(router, learning.where(~inside_N), new, deciding))
            scores_NLJ[inside_N] = router.own_logits(learning.features_NLD[inside_N], deciding)[..., new]
    _place(router, new, deciding, *_own_heads(router, learning, new, deciding))
    held = validation.at(deciding)
    scores_NLJ = torch.cat([scores_NLJ, router.own_logits(held.features_NLD, deciding)[..., new]])
    known = Prompts.joined([learning, held])
    theirs_N = old_C[known.targets_N]
    like_NC = torch.ones(len(theirs_N), len(old_C), dtype=torch.bool)
    if router.threshold_C is not None:
        like_NC = router.similarities(known.features_NLD[:, -1]) >= router.threshold_C
    for at, label in enumerate(new):
        near_KL = scores_NLJ[theirs_N & like_NC[:, label], :, at]
        router.bias_LC[deciding, label] -= torch.tensor([farthest(near_K) for near_K in near_KL.T])


def farthest(scores_K: Tensor) -> float:
    """How high a score of FARTHER times as many known prompts would be, or 0 if that is higher: see `add_heads`."""
    if not len(scores_K):
        return 0.0
    ascending_K = (-scores_K.double()).sort().values.numpy()
    return max(-abstention.low_end(ascending_K, FARTHER, TAIL) + abstention.ROUNDING, 0.0)


def _first(prompts: Prompts, count: int) -> Prompts:
    """The first `count` prompts of each domain."""
    seen: Counter[int] = Counter()
    kept = []
    for target in prompts.targets_N.tolist():
        kept.append(seen[target] < count)
        seen[target] += 1
    return prompts.where(torch.tensor(kept, dtype=torch.bool))


def _own_heads(router: Router, prompts: Prompts, new: Sequence[int], levels: slice) -> tuple[Tensor, Tensor]:
    """Weights (L, J, D) and biases (L, J) of heads that each tell a new domain's prompts from all others."""
    standard_LND = ((prompts.features_NLD - router.mean_LD[levels]) / router.scale_LD[levels]).transpose(0, 1)
    counts_C = torch.bincount(prompts.targets_N, minlength=len(router.labels)).clamp(min=1)
    own_NJ = prompts.targets_N[:, None] == torch.tensor(new)
    others = len(router.labels) - 1
    share_NJ = (0.5 / counts_C[prompts.targets_N])[:, None] * torch.where(own_NJ, 1.0, 1 / others)
    truth_NJ = own_NJ.float()
    return _minimised(standard_LND.contiguous(), len(new), lambda logits_LNJ: (
        nn.functional.binary_cross_entropy_with_logits(logits_LNJ, truth_NJ.expand_as(logits_LNJ), reduction="none")
        * share_NJ).sum())


def _place(router: Router, new: Sequence[int], levels: slice, weight_LJD: Tensor, bias_LJ: Tensor) -> None:
    for at, label in enumerate(new):
        router.weight_LCD[levels, label], router.bias_LC[levels, label] = weight_LJD[:, at], bias_LJ[:, at]


# Calibration.

def choose_level(router: Router, rule: Rule, tolerance: float, validation: Prompts) -> None:
    """Set the rule, and for `early` its level: the shallowest within `tolerance` of the best level's accuracy, among
    those from SHALLOWEST to DEEPEST."""
    right_NL = router.logits(validation.features_NLD).argmax(-1) == validation.targets_N[:, None]
    accuracy_L = right_NL.double().mean(0)
    floor, ceiling = int(len(accuracy_L) * SHALLOWEST), int((len(accuracy_L) - 1) * DEEPEST)
    allowed = accuracy_L[floor:max(floor, ceiling) + 1]
    router.rule = rule
    router.layer = floor + int((allowed >= allowed.max() - tolerance - 1e-9).nonzero()[0])


def choose_directions(router: Router, train: Prompts, background_BLD: Tensor | None = None) -> None:
    """Set `within_RD` from how the training prompts of each domain differ at the level that the rule reads.

    Prompts of no domain, if there are any, count as one more domain.

    The covariance within domains, shrunk towards a multiple of the identity by SHRINKAGE, is divided out in its first
    WITHIN principal directions and left as it is, on average, in the others: whitening as for Fisher's discriminant.
    """
    features_NLD, targets_N = train.features_NLD, train.targets_N
    if background_BLD is not None:
        features_NLD = torch.cat([features_NLD, background_BLD])
        targets_N = torch.cat([targets_N, torch.full((len(background_BLD),), len(router.labels))])
    standard_ND = ((features_NLD[:, router.reads] - router.mean_LD[router.reads])
                   / router.scale_LD[router.reads]).double()
    members_NC = nn.functional.one_hot(targets_N, len(router.labels) + 1).double()
    centres_CD = members_NC.T @ standard_ND / members_NC.sum(0).clamp(min=1)[:, None]
    away_ND = standard_ND - centres_CD[targets_N]
    rows, width = away_ND.shape
    _, lengths_K, vectors_KD = torch.linalg.svd(away_ND, full_matrices=False)
    variances_K = lengths_K.square() / rows
    total, first = variances_K.sum(), min(WITHIN, len(variances_K), width - 1)
    shrunk_R = (1 - SHRINKAGE) * variances_K[:first] + SHRINKAGE * total / width
    rest = (1 - SHRINKAGE) * variances_K[first:].sum() / (width - first) + SHRINKAGE * total / width
    shorter_R = (1 - (rest / shrunk_R).sqrt()).nan_to_num(0.0).clamp(min=0.0)   # 0 where nothing differs at all
    router.within_RD = (shorter_R.sqrt()[:, None] * vectors_KD[:first]).float()


def set_thresholds(router: Router, train: Prompts, validation: Prompts, further: Prompts,
                   max_abstention: float | None, background_BLD: Tensor | None = None) -> None:
    """Keep training prompts, and choose each domain's threshold by `moa.mixture.abstention`. Changes `router`.

    Args:
        train: the prompts that heads and directions were trained on, of all levels. With `further`, the first KEPT of
            each domain are kept, and tell which prompts are like the domain. They look more alike than fresh prompts
            do, so that no threshold rests on them, unless a domain has no others.
        validation: prompts that train no head, of all levels.
        further: more training prompts, of the levels that the rule decides by.
        max_abstention: the largest share of a domain's fresh prompts that is left to the base; None = none is.
        background_BLD: features of prompts of no domain, of all levels; None = there are none.
    """
    deciding = router.deciding
    seen = _first(Prompts.joined([train.at(deciding), further]), KEPT)
    router.seen_MD, router.seen_M = router.directions(seen.features_NLD[:, -1]), seen.targets_N
    router.threshold_C = None
    router.figures["promises"] = {}
    if max_abstention is None:
        return
    prompts = Prompts.joined([validation.at(deciding), further])
    promises = []
    strange_BD = None if background_BLD is None else router.directions(background_BLD[:, router.reads])
    for domain in range(len(router.labels)):
        source = prompts if prompts.of(domain).any() else train.at(deciding)
        own, kept = source.where(source.of(domain)), seen.where(seen.of(domain))
        number = {group: at for at, group in enumerate(dict.fromkeys([*own.groups, *kept.groups]))}
        same_NM = (torch.tensor([number[group] for group in own.groups])[:, None]
                   == torch.tensor([number[group] for group in kept.groups]))
        kept_KD = router.seen_MD[seen.of(domain)]
        nearest_N = (router.directions(own.features_NLD[:, -1]) @ kept_KD.T).masked_fill(same_NM, -1.0).amax(-1)
        strange_B = None if strange_BD is None else (strange_BD @ kept_KD.T).amax(-1).double().numpy()
        promises.append(abstention.promise(nearest_N.double().numpy(), own.groups, max_abstention, strange_B))
    router.threshold_C = torch.tensor([each.threshold for each in promises], dtype=torch.float64)
    router.figures["promises"] = {label: each.as_dict() for label, each in zip(router.labels, promises, strict=True)}


def calibrate(router: Router, validation: Prompts) -> None:
    """Choose the temperature on validation prompts, and record the figures of the router. Changes `router`.

    The temperature minimises the loss (Guo et al. 2017, arXiv 1706.04599) against Platt's targets.
    """
    before = _confidences(router, validation)
    router.temperature = _temperature(router, validation.features_NLD, validation.targets_N)
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
                       "validation_rows": len(decisions), "levels": levels}


def fit(labels: Sequence[str], train: Prompts, validation: Prompts, further: Callable[[slice], Prompts] | None = None,
        *, rule: Rule = "early", tolerance: float = 0.0, max_abstention: float | None = 0.01,
        extends: Router | None = None, background_BLD: Tensor | None = None) -> Router:
    """A router of these domains: its heads, and all that is chosen on further prompts.

    Args:
        train: training prompts of every domain, of all levels.
        validation: prompts that train no head, of all levels.
        further: more prompts, of the levels asked for; None = there are none.
        rule, tolerance: see `choose_level`.
        max_abstention: see `set_thresholds`.
        extends: the router that this one is a successor of, which must have one of the domains at least.
        background_BLD: see `train_heads`.
    """
    router = train_heads(labels, train, background_BLD) if extends is None else successor(extends, labels)
    if extends is None:
        choose_level(router, rule, tolerance, validation)
    return complete(router, train, validation, further, max_abstention, extends, background_BLD)


def complete(router: Router, train: Prompts, validation: Prompts, further: Callable[[slice], Prompts] | None,
             max_abstention: float | None, extends: Router | None, background_BLD: Tensor | None = None) -> Router:
    """The part of `fit` that follows once rule and level are chosen. Changes `router` and returns it."""
    more = further(router.deciding) if further else validation.at(router.deciding).where(
        torch.zeros(len(validation.targets_N), dtype=torch.bool))
    if extends is None:
        choose_directions(router, train, background_BLD)
    set_thresholds(router, train, validation, more, max_abstention, background_BLD)
    if extends is not None:
        add_heads(router, extends.labels, train, validation, more)
    calibrate(router, validation)
    return router


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
