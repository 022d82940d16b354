"""What an arrival does: known prompts that it moves, honest domains that are promoted, harmful ones that are refused.

    .venv/bin/python benchmarks/additions.py --shared ../shared/data

Corpora, experts, features and losses are computed once (benchmarks/additions_world.py, which keeps them in .moa/cache)
on the pool of corpora that chose no rule. From them are drawn, by a named seed, through the product's own router and
gate:

**Additions**: 3 to 8 incumbents, then 1 to 4 newcomers. A known test prompt is *lost* where it newly goes to the base,
or to a newcomer on whose moved prompts the mean loss is worse by more than the tolerance.
**Strangers**: prompts of corpora that are not in the mixture; how many are left to the base by the product's rule and
by the former one (cosine with the nearest of 48 training prompts, less half of the domain's usual cosine, one threshold
for all domains), both set to leave 1 % of the known test prompts to the base.
**Honest newcomers**: each added to drawn triples; promoted, or why not.
**Harmful cases** and doses: new rows of a known domain that are swapped, noise or another domain's; a newcomer whose
rows are a known domain's, or whose questions do not help.

Intervals resample corpora. The last line is one JSON object. Shapes: N rows, L levels, D hidden size, C domains.
"""

import argparse
import math
import multiprocessing
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from additions_world import (
    BASE,
    NEW,
    STEPS,
    Case,
    Losses,
    Part,
    Scored,
    Setup,
    Trainer,
    Wanted,
    World,
    background,
    compute,
    compute_losses,
    progress,
    setup,
    world,
)
from common import REPOSITORY, finish, goal, machine
from torch import Tensor, nn

from moa.core.config import AssembleParams, ReleaseParams
from moa.evaluation.gate import Decision, Score, decide, verdict_of
from moa.mixture.calibration import DEEPEST, SHALLOWEST, Prompts, complete, successor, train_heads
from moa.mixture.router import Router

RULES, ROWS = ReleaseParams(), AssembleParams().rows
MOST = 0.01                       # assemble.max_abstention
INCUMBENTS, NEWCOMERS = (3, 8), (1, 4)
RESAMPLES = 2000
HONEST, TRIPLES = 24, 10          # newcomers, and the triples that each is added to
PARTS = ["moves", "newcomers", "cases"]
Names = tuple[str, ...]            # of corpora
FORMER_SEEN = 48


# Routers.

class Routers:
    """Routers of some corpora of the world, as stage `assemble` makes them from their rows."""

    def __init__(self, found: World, levels: int, background_BLD: Tensor) -> None:
        self.world = found
        floor, ceiling = int(levels * SHALLOWEST), int((levels - 1) * DEEPEST)
        self.levels = slice(floor, max(floor, ceiling) + 1)   # that rule `early` may read; the others are left out
        self.background_BLD = background_BLD[:, self.levels].float()
        self.known: dict[Names, Router] = {}

    def prompts(self, name: str, part: Part, first: int = 0, last: int | None = None) -> tuple[Tensor, list[str]]:
        rows = slice(first, last)
        return part.features_NLD[rows, self.levels].float(), [f"{name} {group}" for group in part.groups[rows]]

    def labelled(self, pieces: Sequence[tuple[int, tuple[Tensor, list[str]]]]) -> Prompts:
        return Prompts(torch.cat([features for _, (features, _) in pieces]),
                       torch.tensor([at for at, (_, groups) in pieces for _ in groups], dtype=torch.long),
                       [group for _, (_, groups) in pieces for group in groups])

    def fitted(self, domains: Mapping[str, "Domain"], extends: Router | None = None) -> Router:
        names = sorted(domains)
        train, validation, further = ([], [], [])
        for at, name in enumerate(names):
            for source in domains[name].sources:
                train.append((at, self.prompts(name, source["train"], 0, ROWS // len(domains[name].sources))))
                validation.append((at, self.prompts(name, source["validation"])))
                further.append((at, self.prompts(name, source["train"], ROWS // len(domains[name].sources))))
                if source.get("further") is not None and len(domains[name].sources) == 1:
                    further.append((at, self.prompts(name, source["further"], domains[name].spared)))
        trained, held = self.labelled(train), self.labelled(validation)
        if extends is None:
            router = train_heads(names, trained, self.background_BLD)
            right_NL = router.logits(held.features_NLD).argmax(-1) == held.targets_N[:, None]
            router.rule, router.layer = "early", int(right_NL.double().mean(0).argmax())
        else:
            router = successor(extends, names)
        return complete(router, trained, held, self.labelled(further).at, MOST, extends, self.background_BLD)

    def incumbent(self, names: Iterable[str]) -> Router:
        """The router of some corpora, made once."""
        key = tuple(sorted(names))
        if key not in self.known:
            self.known[key] = self.fitted(self.domains(key))
        return self.known[key]

    def domains(self, names: Iterable[str], case: Case | None = None) -> "dict[str, Domain]":
        """These corpora as domains; those whose `further` rows are a case's new data do without these rows."""
        spared = {case.corpus, case.other} if case and case.kind != "useless" else set()
        return {name: Domain((self.world.corpora[name].parts,), NEW["test"].stop if name in spared else 0)
                for name in names}

    def answers(self, router: Router, part: Part) -> "Answers":
        decisions = router.decide(part.features_NLD[:, self.levels].float())
        return Answers([BASE if each.abstained else each.domain for each in decisions],
                       [each.domain for each in decisions], [each.abstained for each in decisions])


@dataclass(frozen=True)
class Domain:
    """The rows of one domain: a corpus, with new data a second source."""

    sources: tuple[Mapping[Any, Part], ...]   # by split
    spared: int = 0                           # the first rows of `further`, which are not used


@dataclass(frozen=True)
class Answers:
    """Who answers each row: an expert or the base; the router's best guess; whether it abstained."""

    by: list[str]
    guess: list[str]
    abstained: list[bool]


# Losses.

class Book:
    """Losses by rows and expert. What is asked for and missing is noted, so that it can be computed."""

    def __init__(self) -> None:
        self.missing: dict[str, tuple[list[Any], dict[str, Tensor]]] = {}

    def losses(self, key: str, scored: Scored, by: Sequence[str]) -> list[float]:
        """The loss of each row under its own expert of `by`; NaN where it was not computed yet."""
        found = []
        for place, name in enumerate(by):
            value = float(scored.losses[name][place]) if name in scored.losses else math.nan
            if math.isnan(value):
                rows, wanted = self.missing.setdefault(key, (scored.rows, {}))
                wanted.setdefault(name, torch.zeros(len(rows), dtype=torch.bool))[place] = True
            found.append(value)
        return found


# Additions.

@dataclass
class Tally:
    """Shares over units, each with the corpora that it is of."""

    units: list[tuple[Names, float, float]] = field(default_factory=list)   # corpora, count, of so many

    def add(self, corpora: Iterable[str], count: float, of: float = 1.0) -> None:
        self.units.append((tuple(corpora), count, of))

    def share(self) -> float:
        of = sum(each for _, _, each in self.units)
        return sum(count for _, count, _ in self.units) / of if of else math.nan

    def interval(self) -> tuple[float, float]:
        """95 % percentile bootstrap over corpora: a unit counts by the mean weight of its corpora."""
        names = sorted({name for each, _, _ in self.units for name in each})
        if not names:
            return math.nan, math.nan
        member = np.array([[each.count(name) / len(each) for name in names] for each, _, _ in self.units])
        counts, of = (np.array([unit[at] for unit in self.units]) for at in (1, 2))
        draws = np.random.default_rng(0).multinomial(len(names), [1 / len(names)] * len(names), RESAMPLES)
        weights = draws @ member.T
        low, high = np.quantile((weights @ counts) / np.maximum(weights @ of, 1e-9), [0.025, 0.975])
        return float(low), float(high)

    def text(self) -> str:
        low, high = self.interval()
        return f"{self.share():.3%} [{low:.3%}, {high:.3%}] of {sum(of for _, _, of in self.units):,.0f}"


@dataclass(frozen=True)
class Addition:
    """Incumbents and newcomers, and who answers the incumbents' test prompts before and after.

    `caught` is the share of the test prompts of each corpus outside the incumbents that their router leaves to the
    base, by the product's rule and by the former one: see `strangers`.
    """

    old: Names
    new: Names
    before: dict[str, Answers]
    after: dict[str, Answers]
    caught: dict[str, tuple[float, float]]

    def near(self, found: World) -> bool:
        return any(each in found.corpora[name].kin for name in self.new for each in self.old)


def drawn(routers: Routers, count: int, seed: int) -> list[Addition]:
    draw, names, picks = random.Random(f"additions {seed}"), sorted(routers.world.corpora), []
    for _ in range(count):
        many, more = draw.randint(*INCUMBENTS), draw.randint(*NEWCOMERS)
        picked = draw.sample(names, many + more)
        picks.append((tuple(sorted(picked[:many])), tuple(sorted(picked[many:]))))
    return side_by_side("additions", routed_addition, routers, picks)


def routed_addition(routers: Routers, pick: tuple[Names, Names]) -> Addition:
    old, new = pick
    incumbent = routers.incumbent(old)
    before, after = ({name: routers.answers(router, routers.world.corpora[name].parts["test"]) for name in old}
                     for router in (incumbent, routers.fitted(routers.domains([*old, *new]), incumbent)))
    return Addition(old, new, before, after, strangers(routers, old))


Pick = TypeVar("Pick")
Routed = TypeVar("Routed")


def side_by_side(label: str, routed: Callable[[Routers, Pick], Routed], routers: Routers,
                 picks: Sequence[Pick]) -> list[Routed]:
    """The results of `routed`, in order. A router is too small for several threads to share its matrices: processes
    that make a router each, with one thread, take half the time on two cores. They inherit the world."""
    result: list[Routed] = []
    processes = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(torch.get_num_threads(), processes, _inherit, (routers,)) as pool:
        for each in pool.map(_in_process, repeat(routed), picks):
            result.append(each)
            if len(result) % 25 == 0 or len(result) == len(picks):
                progress(f"{label}: {len(result)} of {len(picks)}")
    return result


_inherited: list[Routers] = []   # of a process of `side_by_side`


def _inherit(routers: Routers) -> None:
    torch.set_num_threads(1)
    _inherited.append(routers)


def _in_process(routed: Callable[[Routers, Pick], Routed], pick: Pick) -> Routed:
    return routed(_inherited[0], pick)


def lost_prompts(addition: Addition, found: World, book: Book) -> dict[str, int]:
    """By incumbent, how many of its test prompts the addition loses."""
    lost: Counter[str] = Counter()
    moved: dict[str, list[tuple[str, float]]] = defaultdict(list)   # by newcomer: incumbent, rise of the loss
    for name in addition.old:
        before, after = addition.before[name].by, addition.after[name].by
        places = [at for at, (was, now) in enumerate(zip(before, after, strict=True)) if was != now]
        test = found.corpora[name].test
        losses = [book.losses(name, test, by) for by in (before, after)] if any(
            after[at] != BASE for at in places) else None
        for at in places:
            if after[at] == BASE:
                lost[name] += 1
            elif after[at] in addition.new and losses:
                moved[after[at]].append((name, losses[1][at] - losses[0][at]))
            else:
                lost[name] += 1   # to another incumbent: a router that grows without moving never does that
    for each in moved.values():
        if not np.mean([rise for _, rise in each]) <= RULES.tolerance:   # NaN counts as worse until it is computed
            lost.update(name for name, _ in each)
    return dict(lost)


# Strangers.

def former_scores(routers: Routers, old: Sequence[str]) -> Callable[[Tensor], Tensor]:
    """The former rule's score of prompts, of the level that the router of these corpora reads."""
    corpora, level = routers.world.corpora, routers.incumbent(old).layer
    train = [routers.prompts(name, corpora[name].parts["train"], 0, FORMER_SEEN)[0][:, level] for name in old]
    mean_D, scale_D = torch.cat(train).mean(0), torch.cat(train).std(0).clamp(min=1e-6)
    seen_MD = nn.functional.normalize((torch.cat(train) - mean_D) / scale_D, dim=-1)
    of_M = torch.tensor([at for at, part in enumerate(train) for _ in part])

    def nearest(features_NLD: Tensor) -> tuple[Tensor, Tensor]:
        cosine_NM = nn.functional.normalize((features_NLD[:, level] - mean_D) / scale_D, dim=-1) @ seen_MD.T
        best = cosine_NM.max(1)
        return best.values, of_M[best.indices]

    usual_C = torch.stack([nearest(routers.prompts(name, corpora[name].parts["validation"])[0])[0].mean()
                           for name in old])

    def scores(features_NLD: Tensor) -> Tensor:
        values, domains = nearest(features_NLD)
        return values - usual_C[domains] / 2

    return scores


def strangers(routers: Routers, old: Names) -> dict[str, tuple[float, float]]:
    """By corpus outside the mixture of `old`, the share of its test prompts that is caught: by the product's rule and
    by the former one."""
    router, former = routers.incumbent(old), former_scores(routers, old)

    def present(features_NLD: Tensor) -> Tensor:
        assert router.threshold_C is not None
        return (router.similarities(features_NLD) - router.threshold_C).amax(1)

    tests = {name: routers.prompts(name, known.parts["test"])[0] for name, known in routers.world.corpora.items()}
    known_NLD = torch.cat([tests[name] for name in old])
    caught: list[dict[str, float]] = []
    for scores in (present, former):
        ordered = scores(known_NLD).sort().values
        threshold = ordered[int(MOST * len(ordered))]
        caught.append({name: (scores(tests[name]) < threshold).double().mean().item()
                       for name in tests if name not in old})
    return {name: (caught[0][name], caught[1][name]) for name in caught[0]}


# The gate.

def compared(book: Book, key: str, domain: str, scored: Scored, before: Answers | None, after: Answers, *,
             changed: Mapping[str, str] | None = None, known: bool = True, new: bool = False,
             swapped: Scored | None = None) -> list[Score]:
    """Test rows of one domain as the gate reads them. `changed`: experts that are others now, by domain."""
    names = changed or {}
    after_by = [names.get(by, by) for by in after.by]
    challenger = book.losses(key, scored, after_by)
    incumbent = book.losses(key, scored, before.by) if before else [math.nan] * len(scored.rows)
    base = book.losses(key, scored, [BASE] * len(scored.rows)) if new else [math.nan] * len(scored.rows)
    own_name = names.get(domain, domain)
    own = book.losses(key, scored, [own_name] * len(scored.rows)) if new else []
    other = book.losses(f"{key}, questions swapped", swapped, [own_name] * len(scored.rows)) if swapped else []
    result = []
    for at, row in enumerate(scored.rows):
        same = before is not None and before.by[at] == after_by[at]
        result.append(Score(
            domain, f"{key} {row.id}", 0.0 if same else challenger[at], 0.0 if same else _some(incumbent[at]),
            _some(base[at]), known=known, group=row.group, tokens=max(int(scored.tokens_N[at]), 1), same_expert=same,
            challenger_routed=after.guess[at], challenger_abstained=after.abstained[at],
            incumbent_routed=before.guess[at] if before else None,
            incumbent_abstained=before.abstained[at] if before else None,
            own=_some(own[at]) if own else None, swapped=_some(other[at]) if other else None))
    return result


def _some(value: float) -> float | None:
    return None if math.isnan(value) else value


@dataclass(frozen=True)
class Release:
    """A challenger for the gate to judge: who answers each domain's test rows, and its new ones, before and after."""

    triple: Names      # the incumbent's domains
    name: str                    # the corpus that arrives, or that the case is of
    case: str | None             # its name; None: an honest newcomer
    known: dict[str, tuple[Answers, Answers]]
    new: tuple[Answers, Answers]


def routed_release(routers: Routers, pick: tuple[Names, str, str | None]) -> Release:
    """A newcomer beside three incumbents, an honest corpus or a case in its place, or new rows of one of the three."""
    (triple, name, case_name), corpora = pick, routers.world.corpora
    case = routers.world.cases[case_name] if case_name else None
    own = case.parts if case else corpora[name].parts
    domains = routers.domains(triple, case)
    incumbent = routers.fitted(domains) if case else routers.incumbent(triple)
    if case is None or case.arrives:
        domains[label_of(name, case)] = Domain((own,))
    else:
        domains[name] = Domain((corpora[name].parts, own))
    grown = routers.fitted(domains, incumbent)

    def both(part: Part) -> tuple[Answers, Answers]:
        return routers.answers(incumbent, part), routers.answers(grown, part)

    return Release(triple, name, case_name, {each: both(corpora[each].parts["test"]) for each in triple},
                   both(own["test"]))


def label_of(name: str, case: Case | None) -> str:
    """The newcomer's domain: a twin stands beside the corpus that it is of."""
    return name if case is None else f"new {name}"


def decision_of(release: Release, found: World, book: Book) -> Decision:
    case = found.cases[release.case] if release.case else None
    if case is None or case.arrives:
        return newcomer_decision(release, case, found, book)
    return continued_decision(release, case, found, book)


def newcomer_decision(release: Release, case: Case | None, found: World, book: Book) -> Decision:
    """The gate on a newcomer beside three incumbents: an honest corpus, or a case in its place."""
    label = label_of(release.name, case)
    changed = {label: case.name} if case else None
    scores = [score for each in release.triple for score in compared(
        book, each, each, found.corpora[each].test, *release.known[each], changed=changed)]
    own = case or found.corpora[release.name]
    rows, key = (case.new, f"{case.name}, new rows") if case else (found.corpora[release.name].test, release.name)
    scores += [Score(**{**vars(score), "domain": label}) for score in compared(
        book, key, label, rows, *release.new, changed=changed, new=True, swapped=own.swapped)]
    return decide(scores, RULES, incumbent=list(release.triple), challenger=[*release.triple, label])


def continued_decision(release: Release, case: Case, found: World, book: Book) -> Decision:
    """The gate on new rows of a known domain, whose expert goes on with them."""
    changed, scores = {case.corpus: case.name}, []
    for each in release.triple:
        rows = case.known if each == case.corpus and case.known else found.corpora[each].test
        key = f"{case.name}, known rows" if rows is case.known else each
        scores += compared(book, key, each, rows, *release.known[each], changed=changed)
    scores += compared(book, f"{case.name}, new rows", case.corpus, case.new, *release.new, changed=changed,
                       known=False)
    return decide(scores, RULES, incumbent=list(release.triple), challenger=list(release.triple))


# Everything, twice: the first time tells which losses are missing.

@dataclass
class Judged:
    """What one pass over all draws comes to."""

    lost: dict[bool, Tally] = field(default_factory=lambda: {False: Tally(), True: Tally()})   # prompts, by near
    any_lost: dict[bool, Tally] = field(default_factory=lambda: {False: Tally(), True: Tally()})
    honest: dict[bool, Tally] = field(default_factory=lambda: {False: Tally(), True: Tally()})
    honest_reasons: Counter[str] = field(default_factory=Counter)
    refused: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))   # not promoted, by kind
    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    passed: list[str] = field(default_factory=list)


def judge_additions(found: World, additions: Sequence[Addition], book: Book, result: Judged) -> None:
    for addition in additions:
        near, lost = addition.near(found), lost_prompts(addition, found, book)
        for name in addition.old:
            result.lost[near].add([name], lost.get(name, 0), len(found.corpora[name].test.rows))
        result.any_lost[near].add((*addition.old, *addition.new), bool(lost))


def releases(routers: Routers, seed: int, parts: Sequence[str], quick: bool) -> list[Release]:
    """Honest newcomers, each added to drawn triples, and every case beside drawn corpora. `quick` leaves out draws, not
    kinds: for a trial."""
    names, draw = sorted(routers.world.corpora), random.Random(f"newcomers {seed}")
    picks: list[tuple[Names, str, str | None]] = []
    newcomers = sorted(draw.sample(names, min(HONEST, len(names))))[:3 if quick else None]
    for name in newcomers if "newcomers" in parts else ():
        others = [each for each in names if each != name]
        picks += [(tuple(sorted(draw.sample(others, 3))), name, None) for _ in range(2 if quick else TRIPLES)]
    for case in routers.world.cases.values() if "cases" in parts else ():
        others = [each for each in names if each not in (case.corpus, case.other)]
        picked = draw.sample(others, 3 if case.kind == "useless" else 2)
        if case.kind != "useless":
            picked = [case.corpus, picked[0], case.other or picked[1]]
        picks.append((tuple(sorted(picked)), case.corpus, case.name))
    return side_by_side("releases", routed_release, routers, picks)


def judge_releases(found: World, challengers: Sequence[Release], book: Book, result: Judged) -> None:
    """The gate on honest newcomers and on cases."""
    for each in challengers:
        decision, beside = decision_of(each, found, book), ", ".join(each.triple)
        if each.case is None:
            near = any(other in found.corpora[each.name].kin for other in each.triple)
            result.honest[near].add((each.name, *each.triple), decision.promote)
            if not decision.promote:
                result.honest_reasons[f"{each.name} beside {beside}: {decision.outcome}: {decision.reason}"] += 1
            continue
        case = found.cases[each.case]
        kind = case.kind if case.dose == 1 else f"{case.kind}, dose {case.dose:.0%}"
        result.refused[kind].add([case.corpus], not decision.promote)
        result.outcomes[kind][verdict_of(vars(decision))] += 1
        if decision.promote and case.dose == 1:
            result.passed.append(f"{case.name} beside {beside}: {decision.reason}")


def fill(at: Setup, book: Book) -> int:
    """Compute the losses that a pass asked for; returns how many."""
    wanted = [Wanted(key, rows, masks) for key, (rows, masks) in book.missing.items()]
    count = sum(int(mask.sum()) for each in wanted for mask in each.experts.values())
    if count:
        progress(f"{count} losses that the draws need")
        computed = compute_losses(Losses(at.base, at.encoder), wanted, at.jobs | at.case_jobs)
        assert computed, f"the world lacks losses that are there: {', '.join(book.missing)}"
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", choices=("choose", "report"), default="report")
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn from the world")
    parser.add_argument("--additions", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="few newcomers: a trial")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="moves alone needs no expert: each "
                        "prompt that moves to a newcomer counts as lost")
    args = parser.parse_args()
    start = time.perf_counter()
    at = setup(args.shared, args.pool, Trainer())
    compute(at, STEPS[:1] if args.parts == ["moves"] else STEPS[:3] if "cases" not in args.parts else STEPS)
    found = world(at)
    torch.set_grad_enabled(True)
    routers = Routers(found, at.base.model.config.num_hidden_layers, background(at.base, at.encoder))
    additions = drawn(routers, args.additions if "moves" in args.parts else 0, args.seed)
    challengers = releases(routers, args.seed, args.parts, args.quick)
    while True:
        book, result = Book(), Judged()
        judge_additions(found, additions, book, result)
        judge_releases(found, challengers, book, result)
        if args.parts == ["moves"] or not fill(at, book):
            break
        found = world(at)
    report(args, at, found, additions, result, time.perf_counter() - start)


def report(args: argparse.Namespace, at: Setup, found: World, additions: Sequence[Addition],
           result: Judged, seconds: float) -> None:
    print(machine(at.base.device))
    print(f"pool {args.pool}: {len(found.corpora)} corpora; {len(additions)} additions (seed {args.seed}); "
          f"{seconds / 60:.0f} min with what was computed now")
    everything = Tally([*result.lost[False].units, *result.lost[True].units])
    far, near = result.lost[False], result.lost[True]
    stranger = [Tally(), Tally()]
    caught: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for addition in additions:
        for name, shares in addition.caught.items():
            caught[name].append(shares)
    for name, of_all in caught.items():
        for side in (0, 1):
            stranger[side].add([name], sum(each[side] for each in of_all), len(of_all))
    if "moves" in args.parts:
        print(f"known prompts lost: {everything.text()}; far {far.text()}; near neighbour {near.text()}")
        print(f"additions that lose any: far {result.any_lost[False].text()}; near neighbour "
              f"{result.any_lost[True].text()}")
        print(f"prompts of corpora never trained that are caught: {stranger[0].text()}; formerly {stranger[1].text()}")
    if "newcomers" in args.parts:
        print(f"honest newcomers promoted: far {result.honest[False].text()}; near {result.honest[True].text()}")
    for reason, count in sorted(result.honest_reasons.items()):
        print(f"  not promoted ({count}): {reason}")
    for kind, tally in result.refused.items():
        said = ", ".join(f"{outcome} {count}" for outcome, count in sorted(result.outcomes[kind].items()))
        print(f"not promoted, {kind}: {sum(count for _, count, _ in tally.units):.0f} of {len(tally.units)} ({said})")
    for each in result.passed:
        print(f"  passed: {each}")
    full = {kind: tally for kind, tally in result.refused.items() if "dose" not in kind}
    cases = sum(len(tally.units) for tally in full.values())
    refused = sum(count for tally in full.values() for _, count, _ in tally.units)
    goals = [goal("known prompts lost", everything.share(), 0.001, everything.share() <= 0.001),
             goal("additions that lose any, far", result.any_lost[False].share(), 0.05,
                  result.any_lost[False].share() <= 0.05),
             goal("additions that lose any, near", result.any_lost[True].share(), 0.15,
                  result.any_lost[True].share() <= 0.15),
             goal("strangers caught, against formerly", stranger[0].share() / stranger[1].share(), 1.0,
                  stranger[0].share() >= stranger[1].share()),
             goal("honest newcomers promoted, far", result.honest[False].share(), 0.95,
                  result.honest[False].share() >= 0.95),
             goal("honest newcomers promoted, near", result.honest[True].share(), 0.85,
                  result.honest[True].share() >= 0.85),
             goal("harmful cases not promoted", refused / cases if cases else math.nan, 1.0,
                  cases >= 60 and refused == cases)]
    goals = [each for each in goals if not math.isnan(float(str(each["value"])))]   # the others were left out
    tallies = {"lost": everything, "any lost, far": result.any_lost[False], "any lost, near": result.any_lost[True],
               "strangers caught": stranger[0], "strangers caught formerly": stranger[1],
               "honest promoted, far": result.honest[False], "honest promoted, near": result.honest[True]}
    figures = {"machine": machine(at.base.device), "pool": args.pool, "seed": args.seed, "additions": len(additions),
               "seconds": seconds, "cases": cases,
               **{name: [tally.share(), *tally.interval()] for name, tally in tallies.items() if tally.units},
               "harmful": {kind: dict(outcomes) for kind, outcomes in result.outcomes.items()}}
    finish("additions", figures, goals)


if __name__ == "__main__":
    main()
