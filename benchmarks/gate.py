"""The gate judged on releases whose true differences are known: how often it is wrong, and what it finds.

    python benchmarks/gate.py [--trials 400] [--draws 4000] [--seed 1]

**Four domains** of independent rows: losses that differ much between rows and little between releases, as real ones do,
and right-or-wrong answers to the first 40 rows of a domain, a share of which two equal releases answer differently.

**One domain of grouped rows**: 20 to 320 groups of 1 to 16 rows, whose differences correlate by 0.7 within a group.

**Many looks** at the same rows: 30 challengers one after the other, each worse by exactly the tolerance.

**Small losses**: 20 releases one after the other, each really worse than the last by less than the tolerance.

Differences of loss are normal, or skewed (exponential): most rows gain a little and a few lose much. No model, no
files. Half an hour on two cores. Rules were tried on seed 0; figures are reported from another.
"""

import argparse
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from common import finish, goal
from scipy import stats

from moa.core.config import ReleaseParams
from moa.evaluation import gate
from moa.evaluation.gate import Score, decide, judge

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


# One domain of grouped rows.

SIZES, GROUPS, CORRELATION = (1, 4, 8, 16), (20, 40, 80, 160, 320), 0.7
DEVIATION = 0.1       # of a row's paired difference, nats
GAIN, LOOKS = 0.05, 30
RELEASES, STEP = 20, 0.45   # small losses one after the other, in tolerances


@dataclass(frozen=True)
class Cell:
    """Draws of one domain's rows, all with the same true difference."""

    difference: float   # nats, challenger minus incumbent
    groups: int
    size: int
    skewed: bool
    look: int = 1


def noise(cell: Cell, rng: np.random.Generator) -> np.ndarray:
    """(groups, size): mean 0, deviation DEVIATION, CORRELATION within a group."""
    def draw(*shape: int) -> np.ndarray:
        return rng.exponential(1, shape) - 1 if cell.skewed else rng.normal(0, 1, shape)
    shared, own = draw(cell.groups, 1), draw(cell.groups, cell.size)
    return DEVIATION * (CORRELATION**0.5 * shared + (1 - CORRELATION)**0.5 * own)


def scores(before: np.ndarray, after: np.ndarray, best: np.ndarray | None = None) -> list[Score]:
    """Losses (groups, size) as scores of one domain; `best` are those of its anchor."""
    return [Score("math", f"{group}-{row}", float(after[group, row]), float(before[group, row]), group=str(group),
                  anchor=None if best is None else float(best[group, row]))
            for group in range(before.shape[0]) for row in range(before.shape[1])]


def grouped(task: tuple[Cell, int, int]) -> dict[str, float]:
    """Share of draws that pass and that are promoted, and that Student's paired t test on group means finds better."""
    cell, draws, seed = task
    rng = np.random.default_rng([seed, *map(int, (cell.groups, cell.size, cell.skewed, cell.look)),
                                 round(1000 * (cell.difference + 1))])
    passed = promoted = found = 0
    for _ in range(draws):
        before = rng.gamma(4, 0.25, (cell.groups, cell.size))
        change = cell.difference + noise(cell, rng)
        verdict = judge("math", scores(before, before + change), RULES, look=cell.look)
        passed += verdict.verdict == "pass"
        promoted += verdict.improved
        share = gate.tail_share(RULES.confidence, cell.look)
        found += stats.ttest_1samp(change.mean(1), 0, alternative="less").pvalue <= share
    return {"passed": passed / draws, "promoted": promoted / draws, "t_test": found / draws}


def looks(task: tuple[Cell, int, int]) -> float:
    """Share of series of LOOKS challengers on the same rows of which at least one passes."""
    cell, series, seed = task
    rng = np.random.default_rng([seed, cell.groups, cell.size, int(cell.skewed), LOOKS])
    fooled = 0
    for _ in range(series):
        before = rng.gamma(4, 0.25, (cell.groups, cell.size))
        fooled += any(judge("math", scores(before, before + cell.difference + noise(cell, rng)), RULES,
                            look=look).verdict == "pass" for look in range(1, LOOKS + 1))
    return fooled / series


def drifted(task: tuple[Cell, int, int]) -> list[float]:
    """Of each series of RELEASES, each worse by `difference` for most rows, what the promoted ones lose in all, nats.

    A release that passes becomes the incumbent whatever else it does, as if another domain had got better.
    """
    cell, series, seed = task
    rng = np.random.default_rng([seed, cell.groups, cell.size, int(cell.skewed), RELEASES])
    total = []
    for _ in range(series):
        best = before = rng.gamma(4, 0.25, (cell.groups, cell.size))
        for _ in range(RELEASES):
            after = before + cell.difference + 0.1 * noise(cell, rng)
            # Each incumbent learned from new rows, so that looks are first ones; the anchor is what holds.
            if judge("math", scores(before, after, best), RULES).verdict == "pass":
                before = after
        total.append(float((before - best).mean()))
    return total


def run_cells(pool: ProcessPoolExecutor, work: Callable[[tuple[Cell, int, int]], Any], cells: list[Cell], draws: int,
              seed: int) -> dict[Cell, Any]:
    return dict(zip(cells, pool.map(work, [(cell, draws, seed) for cell in cells]), strict=True))


def grouped_worlds(pool: ProcessPoolExecutor, draws: int, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and goals of the grouped worlds."""
    shapes = [(groups, size, skewed) for skewed in (False, True) for size in SIZES for groups in GROUPS]
    harm = run_cells(pool, grouped, [Cell(RULES.tolerance, *shape) for shape in shapes], draws, seed)
    none = run_cells(pool, grouped, [Cell(0.0, *shape) for shape in shapes], draws, seed)
    print(f"\n{'share of draws, by groups':<48}  " + "  ".join(f"{count:>6}" for count in GROUPS))
    for title, found, key in (("worse by the tolerance: passed", harm, "passed"),
                              ("no difference: promoted", none, "promoted")):
        for skewed in (False, True):
            for size in SIZES:
                line = [each[key] for cell, each in found.items() if (cell.size, cell.skewed) == (size, skewed)]
                name = f"{title}, {size} a group{', skewed' if skewed else ''}"
                print(f"{name:<48}  " + "  ".join(f"{share:>6.1%}" for share in line), flush=True)
    power = {look: run_cells(pool, grouped, [Cell(-GAIN, 160, size, skewed, look) for size in SIZES
                                             for skewed in (False, True)], max(draws // 4, 1), seed)
             for look in (1, LOOKS)}
    for look, found in power.items():
        print(f"better by {GAIN} nats, 160 groups, look {look}: promoted "
              + ", ".join(f"{each['promoted']:.1%}{' skewed' if cell.skewed else ''} (t test {each['t_test']:.1%})"
                          for cell, each in found.items()), flush=True)
    series = run_cells(pool, looks, [Cell(RULES.tolerance, groups, size, skewed) for groups in (20, 80)
                                     for size in (1, 8) for skewed in (False, True)], max(draws // 10, 1), seed)
    print(f"worse by the tolerance, passed once in {LOOKS} looks: "
          + ", ".join(f"{each:.1%} ({cell.groups} groups of {cell.size}{', skewed' if cell.skewed else ''})"
                      for cell, each in series.items()), flush=True)
    added = run_cells(pool, drifted, [Cell(STEP * RULES.tolerance, groups, 4, False) for groups in (40, 160)],
                      max(draws // 100, 1), seed)
    print(f"{RELEASES} releases, each worse by {STEP * RULES.tolerance:.3f} nats: lost in all "
          + ", ".join(f"{np.mean(each):.3f} (at most {max(each):.3f}; {cell.groups} groups)"
                      for cell, each in added.items()), flush=True)
    passed, promoted = ([each[key] for each in found.values()] for found, key in ((harm, "passed"), (none, "promoted")))
    values = [("worse by the tolerance passes, of all draws", float(np.mean(passed)), 0.035, True),
              ("no difference is promoted, of all draws", float(np.mean(promoted)), 0.02, True),
              ("a gain of 0.05 nats is promoted at the first look",
               min(each["promoted"] for each in power[1].values()), 0.9, False),
              ("a gain of 0.05 nats is promoted at the thirtieth look",
               min(each["promoted"] for each in power[LOOKS].values()), 0.8, False),
              ("worse by the tolerance passes once in thirty looks, of all series",
               float(np.mean(list(series.values()))), 0.05, True),
              ("nats lost in twenty releases", max(map(max, added.values())), 0.04, True)]
    named: Callable[[dict[Cell, Any]], list[dict[str, Any]]] = lambda found: [   # noqa: E731
        {"groups": cell.groups, "size": cell.size, "skewed": cell.skewed, "look": cell.look,
         **(each if isinstance(each, dict) else {"value": each})} for cell, each in found.items()]
    figures = {"tolerance": named(harm), "no_difference": named(none), "looks": named(series), "drift": named(added),
               "power": [each for found in power.values() for each in named(found)],
               "worst_cell": {"passed": max(passed), "promoted": max(promoted), "looks": max(series.values())}}
    return figures, [goal(name, value, bound, value <= bound if above else value >= bound)
                     for name, value, bound, above in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=400, help="releases of four domains gated for each figure")
    parser.add_argument("--draws", type=int, default=4000, help="draws of one domain for each cell")
    parser.add_argument("--seed", type=int, default=1, help="of all worlds")
    args = parser.parse_args()
    began = perf_counter()
    figures: dict[str, Any] = {"cores": os.cpu_count(), "trials": args.trials, "draws": args.draws, "seed": args.seed,
                               "answered": ANSWERED, "resamples": gate.RESAMPLES, "rows": list(ROWS)}
    width = max(map(len, WORLDS))
    goals = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        figures["grouped"], goals = grouped_worlds(pool, args.draws, args.seed)
        print(f"\n{'share promoted, by test rows of each domain':<{width}}  "
              + "  ".join(f"{count:>6}" for count in ROWS))
        shares: dict[str, list[float]] = {}
        for number, (name, world) in enumerate(WORLDS.items()):
            jobs = [pool.submit(promoted, world, count, args.trials, 1000 * args.seed + number) for count in ROWS]
            shares[name] = [job.result() for job in jobs]
            print(f"{name:<{width}}  " + "  ".join(f"{share:>6.1%}" for share in shares[name]), flush=True)
    for name, fewest, bound, above in GOALS:
        found = [share for count, share in zip(ROWS, shares[name], strict=True) if count >= fewest]
        value = max(found) if above else min(found)
        goals.append(goal(f"promoted: {name} ({fewest} rows or more)", value, bound,
                          value <= bound if above else value >= bound))
    figures |= {"promoted": shares, "seconds": round(perf_counter() - began)}
    finish("gate", figures, goals)


if __name__ == "__main__":
    main()
