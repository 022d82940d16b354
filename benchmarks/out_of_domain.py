"""Which score tells prompts of a domain that the router never saw from those it knows: leave one domain out.

    .venv/bin/python benchmarks/out_of_domain.py --shared ../shared/data

The nine corpora of benchmarks/routing.py (five of the quickstart, four real ones). For each in turn the router is
fitted and calibrated on the others; their test prompts are the known ones, all of the one left out are foreign.
  single    one corpus is left out: its near twin, where it has one (math, sql), stays known: hard, and honest;
  grouped   twins leave together (math; sql; python and code), so that the foreign topic is really unseen.
For each score of the router, under the rule `early` and at fixed levels: AUROC (chance that a known prompt scores
higher than a foreign one), and the share of foreign prompts accepted by the threshold that accepts 95 % of the known.
Then what the product does: its default score and threshold, and the share of foreign prompts that abstain under it.

Features come from .moa/cache when benchmarks/routing.py was run before. The last line is one JSON object.
Shapes: N prompts, L levels, D hidden size.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import torch
from common import REPOSITORY, goal, machine, pick_device, real_base
from routing import MAX_ABSTENTION, TWINS, Side, quickstart_corpora, shared_corpora, sides_of, stack
from torch import Tensor

from moa.mixture.calibration import SCORE, abstention_threshold, calibrate, train_heads
from moa.mixture.router import Router, Score

FIXED = (0, 3, 7, 15, 29)
SCORES = (*get_args(Score), "energy", "mahalanobis")   # the router's own, and two that it does without
MEASURES = ("auroc", "accepted", "foreign abstained", "known abstained")
CLOSE = 0.005   # AUROC that counts as no difference
Domains = Mapping[str, Mapping[str, Tensor]]


def auroc(known_N: Tensor, foreign_N: Tensor) -> float:
    """Share of (known, foreign) pairs in which the known prompt scores higher; ties count half."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score([1] * len(known_N) + [0] * len(foreign_N), torch.cat([known_N, foreign_N]).numpy()))


def accepted_at_recall(known_N: Tensor, foreign_N: Tensor, recall: float = 0.95) -> float:
    """Share of foreign prompts at or above the highest threshold that keeps `recall` of the known ones."""
    lowest = known_N.sort().values[int((1 - recall) * len(known_N))]
    return (foreign_N >= lowest).double().mean().item()


def folds(domains: Domains) -> dict[str, list[tuple[str, list[str]]]]:
    """Variant -> (name, domains left out)."""
    groups = [sorted(group & set(domains)) for group in TWINS]
    alone = [[name] for name in domains if not any(name in group for group in groups)]
    return {"single": [(name, [name]) for name in domains],
            "grouped": [(" + ".join(group), group) for group in [*groups, *alone] if group]}


def fold(domains: Domains, left_out: Sequence[str]) -> dict[str, Any]:
    """AUROC and accepted share of each reading of the router (early, or a fixed level) and score."""
    known = {name: part for name, part in domains.items() if name not in left_out}
    sides = stack(known)
    foreign_NLD = torch.cat([part for name in left_out for part in domains[name].values()])
    found: dict[str, Any] = {}
    fitted = train_heads(list(known), sides["train"].features_NLD, sides["train"].targets_N)
    for score in SCORES:
        scorer = calibrated(fitted, "early", sides["validation"], score)
        router = scorer.router
        found[f"early {score}"] = compare(scorer, sides["test"].features_NLD, foreign_NLD) | {"level": router.layer}
        if score == SCORE:
            guess = router.log_probabilities(foreign_NLD).argmax(-1).bincount(minlength=len(known))
            found["mostly taken for"] = list(known)[int(guess.argmax())]
    for level in FIXED:   # a router of this level alone
        only = slice(level, level + 1)
        fitted = train_heads(list(known), sides["train"].features_NLD[:, only], sides["train"].targets_N)
        for score in SCORES:
            one = Side(sides["validation"].features_NLD[:, only], sides["validation"].targets_N)
            scorer = calibrated(fitted, "last", one, score)
            found[f"level {level} {score}"] = compare(scorer, sides["test"].features_NLD[:, only], foreign_NLD[:, only])
    return found


@dataclass(frozen=True)
class Scorer:
    """A calibrated router, a score of its prompts, and the threshold below which they abstain."""

    router: Router
    scores: Callable[[Tensor], Tensor]
    threshold: float


def calibrated(fitted: Router, rule: Any, side: Side, score: str) -> Scorer:
    own = score in get_args(Score)
    router = calibrate(fitted, side.features_NLD, side.targets_N, rule=rule, tolerance=0.0,
                       max_abstention=MAX_ABSTENTION, score=score if own else SCORE)
    if own:
        return Scorer(router, router.scores, router.threshold)
    scores = energy(router) if score == "energy" else mahalanobis(router)
    return Scorer(router, scores, abstention_threshold(scores(side.features_NLD), MAX_ABSTENTION))


def energy(router: Router) -> Callable[[Tensor], Tensor]:
    """Log-sum-exp of the uncalibrated logits; under `vote` the levels' mean (Liu et al. 2020, arXiv 2010.03759)."""
    return lambda features_NLD: router.used(features_NLD).logsumexp(-1).mean(1)


def mahalanobis(router: Router) -> Callable[[Tensor], Tensor]:
    """Minus the squared distance to the nearest domain's centre (Lee et al. 2018, arXiv 1807.03888)."""
    centres_CD, precision_DD = centres_and_precision(router)

    def scores(features_NLD: Tensor) -> Tensor:
        away_CND = router.standard(features_NLD, router.reads).double() - centres_CD[:, None]
        return -((away_CND @ precision_DD) * away_CND).sum(-1).amin(0)

    return scores


def centres_and_precision(router: Router) -> tuple[Tensor, Tensor]:
    """Centres of the domains (C, D) and inverse of their shared covariance (D, D) at the level that the rule reads.

    There are fewer prompts than dimensions, so the covariance is shrunk towards a multiple of the identity (oracle
    approximating shrinkage, Chen et al. 2010, arXiv 0907.4698, equation 23).
    """
    assert router.train is not None
    features_NLD, targets_N = router.train
    standard_ND = router.standard(features_NLD, router.reads).double()
    members = torch.nn.functional.one_hot(targets_N, len(router.labels)).double()
    counts_C1 = members.sum(0)[:, None]
    centres_CD = members.T @ standard_ND / counts_C1.clamp(min=1)
    away_ND = standard_ND - centres_CD[targets_N]
    rows, width = away_ND.shape
    covariance = away_ND.T @ away_ND / rows
    square, trace = covariance.square().sum(), covariance.trace()
    shrink = ((1 - 2 / width) * square + trace**2) / ((rows + 1 - 2 / width) * (square - trace**2 / width))
    shrink = shrink.clamp(max=1.0).nan_to_num(1.0)
    covariance = (1 - shrink) * covariance + (shrink * trace / width + 1e-6) * torch.eye(width, dtype=torch.float64)
    return centres_CD, torch.linalg.inv(covariance)


def compare(router: Scorer, known_NLD: Tensor, foreign_NLD: Tensor) -> dict[str, float]:
    known, foreign = router.scores(known_NLD), router.scores(foreign_NLD)
    return {"auroc": auroc(known, foreign), "accepted": accepted_at_recall(known, foreign),
            "foreign abstained": (foreign < router.threshold).double().mean().item(),
            "known abstained": (known < router.threshold).double().mean().item()}


def report(variant: str, found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Print one variant; returns the means over its folds."""
    readings = [name for name in next(iter(found.values())) if name != "mostly taken for"]
    means = {reading: {key: mean(one[reading][key] for one in found.values()) for key in MEASURES}
             for reading in readings}
    print(f"\n{variant}: AUROC / foreign accepted at 95 % recall of the known, rule early")
    print(f"  {'left out':<32} level  " + "  ".join(f"{score:<15}" for score in SCORES) + "  mostly taken for")
    for name, one in found.items():
        cells = [one[f"early {score}"] for score in SCORES]
        print(f"  {name:<32} {cells[0]['level']:5}  " + "  ".join(
            f"{cell['auroc']:.3f} / {cell['accepted']:.3f}  " for cell in cells) + f"  {one['mostly taken for']}")
    print(f"  mean over these {len(found)}, by rule or level")
    for reading in ["early", *(f"level {level}" for level in FIXED)]:
        cells = [means[f"{reading} {score}"] for score in SCORES]
        print(f"  {reading:<39}  " + "  ".join(f"{cell['auroc']:.3f} / {cell['accepted']:.3f}  " for cell in cells))
    default = means[f"early {SCORE}"]
    print(f"  the product ({SCORE}, threshold for {MAX_ABSTENTION:.0%}): {default['foreign abstained']:.3f} of foreign "
          f"and {default['known abstained']:.3f} of known test prompts abstain", flush=True)
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared" / "data")
    args = parser.parse_args()
    base = real_base(pick_device())
    print(machine(base.device), flush=True)
    domains = sides_of(base, quickstart_corpora() | shared_corpora(args.shared))
    figures: dict[str, Any] = {"machine": machine(base.device)}
    goals = []
    for variant, left_out in folds(domains).items():
        start = time.perf_counter()
        found = {name: fold(domains, group) for name, group in left_out}
        means = report(variant, found)
        figures[variant] = {"folds": found, "means": means, "seconds": time.perf_counter() - start}
        ranking = sorted(SCORES, key=lambda score: -means[f"early {score}"]["auroc"])
        print(f"  best: {ranking[0]}; the default is {SCORE}")
        behind = means[f"early {ranking[0]}"]["auroc"] - means[f"early {SCORE}"]["auroc"]
        goals.append(goal(f"{variant}: mean AUROC of the best score - of the default", behind, CLOSE, behind <= CLOSE))
    print(json.dumps({"benchmark": "out_of_domain", "figures": figures, "goals": goals}))


if __name__ == "__main__":
    main()
