"""Training a router's heads on labelled prompts, then choosing level, temperature and threshold on validation prompts.

Shapes: N prompts, M training prompts, L levels, D hidden size, C domains.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moa.mixture.router import Router, Rule, Score

# benchmarks/out_of_domain.py chose it (SmolLM2-135M, rule early; nine corpora, each left out in turn, then near twins
# left out together): mean AUROC 0.971 and 0.982, against 0.911 and 0.949 of max_probability. Since then `nearest`
# subtracts half of the domain's mean cosine, so that a new domain does not change which prompts of the old ones abstain
# (LOG.md); that benchmark was not run again.
SCORE: Score = "nearest"
# The levels that `early` may read, as shares of the layers. Test accuracy hardly depends on depth
# (benchmarks/routing.py, levels 0, 5, 7, 29: nine corpora 0.961 0.978 0.983 0.986; eight databases 0.980 0.984 0.984
# 0.973; 32 made domains 0.975 0.973 0.971 0.954), but the AUROC of `nearest` does: on the folds above it is 0.866 and
# 0.847 at level 0, 0.919 twice at 3, 0.971 and 0.986 at 7, 0.968 and 0.991 at 29. The upper bound keeps routing under
# a quarter of a prefill.
SHALLOWEST, DEEPEST = 1 / 6, 1 / 4
TEMPERATURES = (0.01, 100.0)
FEW = 8   # a domain with fewer prompts takes the mean cosine of all prompts
ITERATIONS, DECAY = 40, 1e-2   # L-BFGS on standardised features
LOGITS = 1 << 27               # of heads trained at once; a few times as many numbers are in memory


def train_heads(labels: Sequence[str], features_NLD: Tensor, targets_N: Tensor) -> Router:
    """Train every level's head on domain labels. Domains weigh the same, whatever their number of prompts.

    The loss is strictly convex (cross-entropy and an L2 penalty on the weights), so the result depends on no seed and
    no starting point. Training starts at zero, so the logits of a prompt always sum to zero. Levels are independent;
    they are trained together as long as their logits are at most LOGITS numbers.

    Args:
        labels: the C domains.
        features_NLD: features of the prompts.
        targets_N: index of each prompt's domain.

    Returns:
        A router with these heads that is not calibrated.
    """
    mean_LD, scale_LD = features_NLD.mean(0), features_NLD.std(0).clamp(min=1e-6)
    levels, at_once = features_NLD.shape[1], max(LOGITS // (len(targets_N) * len(labels)), 1)
    heads = [_heads(((features_NLD[:, some] - mean_LD[some]) / scale_LD[some]).transpose(0, 1).contiguous(),
                    targets_N, len(labels))
             for some in (slice(first, first + at_once) for first in range(0, levels, at_once))]
    weight_LCD, bias_LC = (torch.cat(parts) for parts in zip(*heads, strict=True))
    return Router(list(labels), mean_LD, scale_LD, weight_LCD, bias_LC, train=(features_NLD, targets_N))


def _heads(standard_LND: Tensor, targets_N: Tensor, labels: int) -> tuple[Tensor, Tensor]:
    """Weights (L, C, D) and biases (L, C) that minimise the loss."""
    levels, rows, width = standard_LND.shape
    weight_LDC = torch.zeros(levels, width, labels, requires_grad=True)
    bias_L1C = torch.zeros(levels, 1, labels, requires_grad=True)
    counts_C = torch.bincount(targets_N, minlength=labels).clamp(min=1)
    share_N = counts_C.reciprocal()[targets_N] / labels
    optimizer = torch.optim.LBFGS([weight_LDC, bias_L1C], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        log_LNC = torch.baddbmm(bias_L1C, standard_LND, weight_LDC).log_softmax(-1)
        total = -(log_LNC[:, torch.arange(rows), targets_N] * share_N).sum() + DECAY / 2 * weight_LDC.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return weight_LDC.detach().transpose(1, 2).contiguous(), bias_L1C.detach()[:, 0].contiguous()


def calibrate(router: Router, features_NLD: Tensor, targets_N: Tensor, *, rule: Rule, tolerance: float,
              max_abstention: float, score: Score = SCORE) -> Router:
    """Choose level, temperature and threshold on validation prompts. Changes `router` and returns it.

    Rule `early` takes the shallowest level within `tolerance` of the best level's accuracy, among those from SHALLOWEST
    to DEEPEST. The temperature minimises the loss (Guo et al. 2017, arXiv 1706.04599) against Platt's targets. The
    threshold is the highest under which at most a share `max_abstention` of these prompts abstains.
    """
    right_NL = router.logits(features_NLD).argmax(-1) == targets_N[:, None]
    accuracy_L = right_NL.double().mean(0)
    floor, ceiling = int(len(accuracy_L) * SHALLOWEST), int((len(accuracy_L) - 1) * DEEPEST)
    allowed = accuracy_L[floor:max(floor, ceiling) + 1]
    router.rule, router.score = rule, score
    router.layer = floor + int((allowed >= allowed.max() - tolerance - 1e-9).nonzero()[0])
    router.seen_MD = router.seen_M = router.usual_C = None
    if score == "nearest":
        router.seen_MD, seen_M = _seen(router)
        router.usual_C = _usual(router.scores(features_NLD), targets_N, len(router.labels))
        router.seen_M = seen_M
    before = _confidences(router, features_NLD, targets_N)
    router.temperature = _temperature(router, features_NLD, targets_N)
    scores = router.scores(features_NLD)
    router.threshold = abstention_threshold(scores, max_abstention)
    confidence, correct = _confidences(router, features_NLD, targets_N)
    router.figures = {"accuracy": correct.double().mean().item(), "best_level_accuracy": accuracy_L.max().item(),
                      "ece": expected_calibration_error(confidence, correct),
                      "ece_uncalibrated": expected_calibration_error(*before),
                      "abstention": (scores < router.threshold).double().mean().item(),
                      "validation_rows": len(targets_N), "levels": by_level(router, features_NLD, targets_N)}
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


def _confidences(router: Router, features_NLD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    best = router.probabilities(features_NLD).max(-1)
    return best.values, best.indices == targets_N


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


def abstention_threshold(scores_N: Tensor, max_abstention: float) -> float:
    """The highest threshold with at most a share `max_abstention` of these scores strictly below it."""
    ordered = scores_N.sort().values
    return ordered[min(int(max_abstention * len(ordered)), len(ordered) - 1)].item()


def _seen(router: Router) -> tuple[Tensor, Tensor]:
    """Features of the training prompts at the level that the rule reads, of length one: (M, D); their domains: (M,)."""
    assert router.train is not None, "nearest needs the training features: set router.train"
    return nn.functional.normalize(router.standard(router.train[0], router.reads), dim=-1), router.train[1]


def _usual(cosines_N: Tensor, targets_N: Tensor, domains: int) -> Tensor:
    """Mean of each domain's cosines, (C,); that of all prompts where a domain has fewer than FEW."""
    each = [cosines_N[targets_N == domain] for domain in range(domains)]
    return torch.stack([(values if len(values) >= FEW else cosines_N).mean() for values in each]).float()


def expected_calibration_error(confidence_N: Tensor, correct_N: Tensor, bins: int = 15) -> float:
    """Sum over equal-width bins of confidence of |accuracy - mean confidence| in a bin, weighted by its share of rows.

    Numerator: rows in the bin times that gap; denominator: all rows; empty bins add nothing; NaN without rows
    (Guo et al. 2017, equation 3).
    """
    confidence, correct = confidence_N.double(), correct_N.double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, place, correct - confidence)
    return (gaps.abs().sum() / len(confidence)).item() if len(confidence) else math.nan
