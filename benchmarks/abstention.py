"""How many prompts of known domains are left to the base, against what their thresholds promise.

    .venv/bin/python benchmarks/abstention.py --shared ../shared/data

Of each quickstart generator MADE rows are made by a seed of their own; each of SEEDS draws from them GROUPS calibration
rows, a row a group, and FRESH other ones. The corpora of ../shared/data have no more than 520 short groups each: in
each of three folds a third is fresh, and the rest calibrates. All domains are in one mixture, whose router is made as
stage `assemble` makes it.

A cell is a domain and a seed: the share of its fresh prompts that are left to the base. Where 299 groups or more
calibrate, it keeps the promise with at most 1 %; the same with FEW groups, and for mixtures of one domain, with at most
the share that was promised. 19 of 20 cells should keep it.

Features are kept in .moa/cache. The last line is one JSON object. Shapes: N prompts, L levels, D hidden size.
"""

import argparse
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from additions_world import PROMPT_TOKENS, SYSTEM, background, compute_features, read_features
from common import REPOSITORY, finish, goal, machine, pick_device
from corpora import WHOLE, Row, corpora, quickstart_rows, split
from real import real_base
from torch import Tensor

from moa.base.encoding import ChatEncoder
from moa.core.config import AssembleParams
from moa.mixture.calibration import DEEPEST, SHALLOWEST, Prompts, complete, train_heads
from moa.mixture.router import Router

MADE_BY = ("math", "sql", "extract", "calendar", "python")
# Of GROUPS and FEW, 48 train the heads and promise nothing.
MADE, GROUPS, FRESH, FEW, VALIDATION = 2480, 528, 1000, 128, 40
SEEDS, FOLDS, LEAST, STRANGERS = 5, 3, 299, 100
MOST, ROWS = 0.01, AssembleParams().rows


@dataclass(frozen=True)
class Pool:
    """The prompts of one domain, a row a group."""

    features_NLD: Tensor
    made: bool

    def calibrating(self, seed: int, fold: int, count: int) -> tuple[list[int], list[int]]:
        """Places of at most `count` rows that calibrate, and of those that are fresh."""
        order = list(range(len(self.features_NLD)))
        random.Random(f"abstention {seed}").shuffle(order)
        if self.made:
            return order[:count], order[GROUPS:GROUPS + FRESH]
        third = len(order) // FOLDS
        fresh = order[fold * third:(fold + 1) * third]
        return [place for place in order if place not in set(fresh)][:count], fresh


def router_of(parts: Mapping[str, Tensor], background_BLD: Tensor) -> Router:
    """A router as stage `assemble` makes it from the calibration prompts of each domain."""
    names = list(parts)

    def labelled(first: int | None, last: int | None) -> Prompts:
        pieces = [part[first:last] for part in parts.values()]
        numbers = torch.tensor([at for at, part in enumerate(pieces) for _ in part], dtype=torch.long)
        groups = [f"{name} {first} {at}" for name, part in zip(names, pieces, strict=True) for at in range(len(part))]
        return Prompts(torch.cat(pieces), numbers, groups)

    train, validation, further = (labelled(*ends) for ends in ((0, ROWS), (-VALIDATION, None), (ROWS, -VALIDATION)))
    router = train_heads(names, train, background_BLD)
    right_NL = router.logits(validation.features_NLD).argmax(-1) == validation.targets_N[:, None]
    router.rule, router.layer = "early", int(right_NL.double().mean(0).argmax())
    return complete(router, train, validation, further.at, MOST, None, background_BLD)


def left_out(router: Router, features_NLD: Tensor) -> int:
    return sum(decision.abstained for decision in router.decide(features_NLD))


def measure(pools: Mapping[str, Pool], background_BLD: Tensor, seed: int, count: int) -> list[dict[str, Any]]:
    """The cells of one seed, with at most `count` calibration groups."""
    nothing = {"seed": seed, "groups": 0, "fresh": 0, "left": 0, "promised": 0.0}
    cells: dict[str, dict[str, Any]] = {name: {"domain": name, **nothing} for name in pools}
    for fold in range(FOLDS):
        places = {name: pool.calibrating(seed, fold, count) for name, pool in pools.items()}
        router = router_of({name: pool.features_NLD[places[name][0]] for name, pool in pools.items()}, background_BLD)
        for name, pool in pools.items():
            if fold and pool.made:
                continue
            fresh = places[name][1]
            cell, promise = cells[name], router.figures["promises"][name]
            cell["groups"], cell["promised"] = promise["groups"], max(cell["promised"], promise["share"])
            cell["fresh"] += len(fresh)
            cell["left"] += left_out(router, pool.features_NLD[fresh])
    return list(cells.values())


def alone(pools: Mapping[str, Pool], background_BLD: Tensor, seed: int) -> list[dict[str, Any]]:
    """The cells of mixtures of one domain."""
    cells = []
    for name, pool in pools.items():
        calibrating, fresh = pool.calibrating(seed, 0, GROUPS)
        router = router_of({name: pool.features_NLD[calibrating]}, background_BLD)
        strangers = [left_out(router, other.features_NLD[:STRANGERS]) / STRANGERS
                     for each, other in pools.items() if each != name]
        cells.append({"domain": name, "seed": seed, "groups": len(calibrating) - ROWS, "fresh": len(fresh),
                      "left": left_out(router, pool.features_NLD[fresh]), "strangers": statistics.mean(strangers),
                      "promised": router.figures["promises"][name]["share"]})
    return cells


def kept(cell: Mapping[str, Any]) -> bool:
    """Whether a cell keeps its promise: 1 % where the groups suffice for that, else what they promise."""
    return cell["left"] / cell["fresh"] <= (MOST if cell["groups"] >= LEAST else cell["promised"])


def report(title: str, cells: Sequence[Mapping[str, Any]]) -> float:
    """Print the cells by domain; returns the share that keep the promise."""
    print(f"\n{title}: domain, calibration groups, promised; left of fresh rows, seed by seed")
    for name in dict.fromkeys(cell["domain"] for cell in cells):
        own = [cell for cell in cells if cell["domain"] == name]
        print(f"  {name:<20} {own[0]['groups']:>4} {own[0]['promised']:6.2%}  " + "  ".join(
            f"{cell['left']}/{cell['fresh']}{'' if kept(cell) else ' BROKEN'}" for cell in own))
    good = sum(map(kept, cells))
    left, fresh = (sum(cell[key] for cell in cells) for key in ("left", "fresh"))
    print(f"  {good} of {len(cells)} cells keep it; {left / fresh:.2%} of all fresh prompts are left to the base",
          flush=True)
    return good / len(cells)


def pools_of(shared: Path) -> tuple[dict[str, Pool], Tensor, Any]:
    base = real_base(pick_device())
    encoder = ChatEncoder(base.tokenizer, SYSTEM, PROMPT_TOKENS)
    rows: dict[str, Sequence[Row]] = {name: quickstart_rows(name, MADE, f"abstention:{name}") for name in MADE_BY}
    rows |= {corpus.name: [row for part in split(corpus, base.tokenizer).values() for row in part]
             for corpus in corpora(shared, "report") if corpus.name in {f"shared {name}" for name in WHOLE}}
    rows = {name: list({row.group: row for row in part}.values()) for name, part in rows.items()}
    compute_features(base, encoder, {name: {"test": list(part)} for name, part in rows.items()})
    floor, levels = int(base.model.config.num_hidden_layers * SHALLOWEST), base.model.config.num_hidden_layers
    read = slice(floor, max(floor, int((levels - 1) * DEEPEST)) + 1)   # the levels that rule `early` may read
    return {name: Pool(read_features(base, part)[:, read].float(), name in MADE_BY)
            for name, part in rows.items()}, background(base, encoder)[:, read].float(), machine(base.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds 1 to this one")
    args = parser.parse_args()
    start = time.perf_counter()
    pools, kinds_BLD, hardware = pools_of(args.shared)
    torch.set_grad_enabled(True)
    print(hardware)
    enough, few = ([cell for seed in range(1, args.seeds + 1) for cell in measure(pools, kinds_BLD, seed, count)]
                   for count in (GROUPS, FEW))
    single = [cell for seed in range(1, args.seeds + 1) for cell in alone(pools, kinds_BLD, seed)]
    shares = {"one mixture": report("one mixture", enough), "few groups": report(f"{FEW} groups", few),
              "one domain": report("mixtures of one domain", single)}
    print("  of each other corpus's prompts they leave to the base: " + ", ".join(
        f"{cell['domain']} {cell['strangers']:.0%}" for cell in single if cell["seed"] == 1))
    figures = {"machine": hardware, "seconds": time.perf_counter() - start, "cells": enough, "few": few,
               "alone": single}
    goals = [goal(f"cells that keep the promise, {title}", share, 0.95, share >= 0.95)
             for title, share in shares.items()]
    finish("abstention", figures, goals)


if __name__ == "__main__":
    main()
