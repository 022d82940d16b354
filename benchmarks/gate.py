"""The gate judged on releases whose true differences are known: how often it is wrong, and what it finds.

    python benchmarks/gate.py [--trials 400]

Simulated rows, four domains: losses that differ much between rows and little between releases, as real ones do, and
right-or-wrong answers to the first 40 rows of a domain, a share of which two equal releases answer differently.
Differences of loss are normal, or skewed (exponential): most rows gain a little and a few lose much. No model, no
files. Minutes.
"""

import argparse
import json
import os
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from common import goal

from moa.core.config import ReleaseParams
from moa.evaluation import gate
from moa.evaluation.gate import Score, decide

DOMAINS = ("extract", "math", "python", "sql")
ROWS = (20, 40, 80, 160)
ANSWERED = 40
RULES = ReleaseParams()
RIGHT, DIFFERENT = 0.6, 0.15   # share of right answers, and of answers that chance alone turns


@dataclass(frozen=True)
class World:
    """True differences, challenger minus incumbent, of the domains where there is one."""

    loss: dict[str, float] = field(default_factory=dict)    # nats
    score: dict[str, float] = field(default_factory=dict)   # share of right answers
    noise: float = 0.03                                     # standard deviation of a row's difference of loss
    skewed: bool = False


def rows(world: World, count: int, rng: np.random.Generator) -> list[Score]:
    """One draw of test rows from a world."""
    scores = []
    for domain in DOMAINS:
        before = rng.gamma(4, 0.25, count)
        spread = rng.exponential(1, count) - 1 if world.skewed else rng.normal(0, 1, count)   # mean 0, deviation 1
        after = before + world.loss.get(domain, 0.0) + world.noise * spread
        right = rng.random(count) < RIGHT
        turned = rng.random(count) < np.where(right, DIFFERENT * (1 - RIGHT), DIFFERENT * RIGHT)   # as many each way
        then = right ^ turned
        shift = world.score.get(domain, 0.0)   # of those right, this much more become wrong (or the other way round)
        share = abs(shift) / (RIGHT if shift < 0 else 1 - RIGHT)
        then = np.where((then == (shift < 0)) & (rng.random(count) < share), shift > 0, then)
        for row in range(count):
            said = (float(then[row]), float(right[row])) if row < ANSWERED else (None, None)
            scores.append(Score(domain, f"{row:04d}", float(after[row]), float(before[row]), None, *said))
    return scores


def promoted(world: World, count: int, trials: int, seed: int) -> float:
    """Share of draws after which the gate promotes."""
    rng = np.random.default_rng([seed, count])
    return sum(decide(rows(world, count, rng), RULES, incumbent=DOMAINS, challenger=DOMAINS).promote
               for _ in range(trials)) / trials


BETTER = dict.fromkeys(DOMAINS[1:], -0.05)
WORLDS = {
    "no difference": World(),
    "no difference, large noise": World(noise=0.1),
    "no difference, skewed": World(skewed=True),
    "one domain worse by the tolerance, the rest better": World({**BETTER, "extract": RULES.tolerance}),
    "the same, skewed": World({**BETTER, "extract": RULES.tolerance}, skewed=True),
    "one domain worse by 0.05 nats, the rest better": World({**BETTER, "extract": 0.05}),
    "one domain's score worse by 0.4, losses better": World(BETTER, {"extract": -0.4}),
    "one domain better by 0.03 nats": World({"math": -0.03}),
    "one domain better by 0.03 nats, skewed": World({"math": -0.03}, skewed=True),
    "one domain's score better by 0.35": World(score={"math": 0.35}),
}
# World, fewest rows the goal is for, bound, and whether the bound is from above.
GOALS = (
    ("no difference", 20, 0.05, True),
    ("no difference, large noise", 20, 0.05, True),
    ("no difference, skewed", 20, 0.05, True),
    ("one domain worse by the tolerance, the rest better", 20, 0.05, True),
    ("the same, skewed", 20, 0.05, True),
    ("one domain worse by 0.05 nats, the rest better", 20, 0.05, True),
    ("one domain's score worse by 0.4, losses better", 40, 0.1, True),
    ("one domain better by 0.03 nats", 40, 0.9, False),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=400, help="releases gated for each figure")
    args = parser.parse_args()
    began = perf_counter()
    figures: dict[str, Any] = {"cores": os.cpu_count(), "trials": args.trials, "answered": ANSWERED,
                               "resamples": gate.RESAMPLES, "rows": list(ROWS)}
    width = max(map(len, WORLDS))
    print(f"{'share promoted, by test rows of each domain':<{width}}  " + "  ".join(f"{count:>6}" for count in ROWS))
    shares: dict[str, list[float]] = {}
    for seed, (name, world) in enumerate(WORLDS.items()):
        shares[name] = [promoted(world, count, args.trials, seed) for count in ROWS]
        print(f"{name:<{width}}  " + "  ".join(f"{share:>6.1%}" for share in shares[name]), flush=True)
    goals = []
    for name, fewest, bound, above in GOALS:
        found = [share for count, share in zip(ROWS, shares[name], strict=True) if count >= fewest]
        value = max(found) if above else min(found)
        goals.append(goal(f"promoted: {name} ({fewest} rows or more)", value, bound,
                          value <= bound if above else value >= bound))
    figures |= {"promoted": shares, "seconds": round(perf_counter() - began)}
    print(json.dumps({"benchmark": "gate", "figures": figures, "goals": goals}))


if __name__ == "__main__":
    main()
