"""What additions are drawn from: corpora, experts and their losses, computed once with the real base.

    .venv/bin/python benchmarks/additions_world.py --pool report --shared ../shared/data

benchmarks/additions.py computes what is missing by itself; this command computes a part of it ahead. The corpora are
those of one pool of benchmarks/corpora.py. Each piece is kept in .moa/cache/benchmarks/additions by the digest of what
it depends on, so that an interrupted run goes on where it stopped. In this order, or the steps that --steps names:

    features   of the prompts of every row, at the levels that the rule `early` may read
    experts    one for each corpus, co-trained by the product's own code on few rows
    losses     of every test row under its own expert and the base, and of its answer after another row's question
    cases      experts of additions that a gate should refuse or reroute (`Case`), and the losses that judge them

A loss that was not computed is NaN; benchmarks/additions.py computes those that its draws need. `world` returns what is
there. Shapes: N rows, L levels, D hidden size, C corpora.
"""

import argparse
import inspect
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Literal

import torch
from common import REPOSITORY, machine, pick_device
from corpora import SPLITS, Corpus, Pool, Row, Split, corpora, messages, split
from real import real_base
from safetensors.torch import load_file, save_file
from torch import Tensor

from moa.base.encoding import ChatEncoder
from moa.base.load import Base
from moa.core import code_version, digests
from moa.core.config import TrainParams
from moa.experts.batches import collate, microbatches
from moa.experts.cotraining import Learner, cotrain, seed_for
from moa.experts.lora import ExpertStack, LoraSpec
from moa.mixture.background import BACKGROUND
from moa.mixture.calibration import DEEPEST
from moa.mixture.mixture import BASE, Mixture
from moa.mixture.router import Router, decoder_layers, features, layer_input, mean_pool

CACHE = REPOSITORY / ".moa" / "cache" / "benchmarks" / "additions"
SYSTEM, PROMPT_TOKENS = "", 1024   # as in the product's params.yaml
# The product's defaults but for the length: an expert sees EXPERT_ROWS rows, in steps of STEP_ROWS. After so few it is
# not done learning, and half a dose of poison may still improve it. So experts that a case goes on from, and those of
# the cases, see CASE_ROWS rows in more steps. The cases of dose 0 show by how much honest rows still improve them.
EXPERT_ROWS, STEP_ROWS, VALIDATED = 64, 4, 8
CASE_ROWS, CASE_STEP_ROWS = 120, 2
AT_ONCE = 12                       # experts that are co-trained: an interrupted run loses these
# Places in `further` of the rows that are a case's new data.
NEW: dict[Split, slice] = {"train": slice(0, 120), "validation": slice(120, 160), "test": slice(160, 200)}
CASE_CORPORA = {"report": 12, "choose": 6}
CASE_TOKENS, CASE_INTENTS = 75, 5   # of a corpus with cases: most tokens of a row on average; most groups of intents
WORDS = 400                        # in the vocabulary of noise

STEPS = ("features", "experts", "losses", "cases")
Kind = Literal["swapped", "noise", "foreign", "twin", "useless"]
NEWCOMERS: tuple[Kind, ...] = ("twin", "useless")
KINDS: tuple[Kind, ...] = ("swapped", "noise", "foreign", "twin", "useless")
DOSES = (0.0, 0.1, 0.3)            # of "swapped", besides 1; 0 is an honest update. The other cases have dose 1
DOSED = 4                          # corpora with doses besides 1


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# The world: all that additions are drawn from.

@dataclass(frozen=True)
class Part:
    """The rows of one split, and the features of their prompts."""

    rows: list[Row]
    features_NLD: Tensor   # float16

    @property
    def groups(self) -> list[str]:
        return [row.group for row in self.rows]


@dataclass(frozen=True)
class Scored:
    """Rows, their completion tokens, and their losses in nats per completion token by the name of the expert.

    The names are those of the corpora, "base", and a case's own.
    """

    rows: list[Row]
    tokens_N: Tensor
    losses: dict[str, Tensor]   # (N,) each; NaN where it was not computed


@dataclass(frozen=True)
class Known:
    """A corpus by split, and its test rows under the experts.

    `swapped` are the test answers after the question of the next group, under the corpus's own expert: what the expert
    knows without the question.
    """

    name: str
    kin: tuple[str, ...]
    parts: dict[Split, Part]
    test: Scored
    swapped: Scored


@dataclass(frozen=True)
class Case:
    """New data that harms, the expert trained on it, and its losses on the test rows.

    swapped   new rows of the known domain `corpus`, of which a share `dose` has the answer of another row; its expert
              goes on from the corpus's, on as many new rows as training rows
    noise     the same, and all answers of the new rows are random words
    foreign   the same, and the new rows are rows of the corpus `other`
    twin      a newcomer whose rows are of the known domain `corpus`, though not the same rows
    useless   a newcomer, in place of `corpus`, with that corpus's rows, whose answers do not fit their questions: the
              questions do not help

    `parts` is the new data by split: rows of `further`, which are then no calibration rows, but the corpus's own rows
    in "useless". `new` are its test rows. `known` are the corpus's test rows, as they were; None in "useless".
    """

    kind: Kind
    dose: float
    corpus: str
    other: str | None
    parts: dict[Split, Part]
    new: Scored
    known: Scored | None
    swapped: Scored | None   # of a newcomer: its test answers after the question of the next group, as in `Known`

    @property
    def name(self) -> str:
        return case_name(self.kind, self.dose, self.corpus)

    @property
    def arrives(self) -> bool:
        return self.kind in NEWCOMERS


@dataclass(frozen=True)
class World:
    """One pool: its corpora and its cases, by name."""

    pool: Pool
    corpora: dict[str, Known]
    cases: dict[str, Case]


def case_name(kind: Kind, dose: float, corpus: str) -> str:
    return f"{kind} {dose:g}: {corpus}"


# Cached pieces.

def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(dict(tensors), temporary)
    temporary.replace(path)


def _key(base: Base, facts: dict[str, object]) -> str:
    return digests.of_json(facts | {"base": base.pin.digest, "dtype": base.device.dtype, "system": SYSTEM,
                                    "max_tokens": PROMPT_TOKENS})[:32]


# Features.

def depth_of(base: Base) -> int:
    """Number of levels up to the deepest one that `early` may read, as `calibrate` counts them."""
    return int((base.model.config.num_hidden_layers - 1) * DEEPEST) + 1


def feature_path(base: Base, rows: Sequence[Row]) -> Path:
    """The key has the code of these functions only, so that a change of the router's other code computes nothing."""
    functions = (features, mean_pool, layer_input, decoder_layers, microbatches, collate)
    code = [inspect.getsource(each) for each in functions]
    key = _key(base, {"code": code, "depth": depth_of(base), "prompts": [row.prompt for row in rows]})
    return CACHE / "features" / f"{key}.safetensors"


Splits = Mapping[str, Mapping[Split, list[Row]]]   # by corpus


def compute_features(base: Base, encoder: ChatEncoder, splits: Splits) -> None:
    """Compute the features that are not cached; `further`, which is the largest split, last."""
    todo = [(name, part, rows) for last in (False, True) for name, parts in splits.items()
            for part, rows in parts.items() if (part == "further") == last and rows]
    todo = [one for one in todo if not feature_path(base, one[2]).is_file()]
    for count, (name, part, rows) in enumerate(todo):
        start = time.perf_counter()
        ids = [encoder.prompt([{"role": "user", "content": row.prompt}])[-PROMPT_TOKENS:] for row in rows]
        found_NLD = features(base.model, ids, depth_of(base)).half()
        assert found_NLD.isfinite().all(), f"features of {name} exceed float16"
        _save(feature_path(base, rows), {"features": found_NLD})
        seconds = time.perf_counter() - start
        progress(f"features {count + 1} of {len(todo)}: {name}, {part}, {len(rows)} rows, {seconds:.1f} s, "
                 f"{sum(map(len, ids)) / seconds:.0f} tokens/s")


def read_features(base: Base, rows: Sequence[Row]) -> Tensor:
    if not rows:
        return torch.zeros(0, depth_of(base), base.model.config.hidden_size, dtype=torch.float16)
    return load_file(feature_path(base, rows))["features"]


def background(base: Base, encoder: ChatEncoder) -> Tensor:
    """Features of the prompts of no domain: (B, L, D)."""
    rows = [Row(text, "", text) for text in BACKGROUND]
    compute_features(base, encoder, {"prompts of no domain": {"test": rows}})
    return read_features(base, rows)


# Experts.

@dataclass(frozen=True)
class Job:
    """The training of one expert; `parent` is the job whose expert it goes on from."""

    name: str
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    params: TrainParams
    parent: "Job | None" = None

    def path(self, base: Base) -> Path:
        return CACHE / "experts" / f"{self.key(base)}.safetensors"

    def key(self, base: Base) -> str:
        code = code_version.of_modules(*(f"moa.experts.{name}" for name in ("batches", "cotraining", "lora",
                                                                            "lora_autograd")))
        return _key(base, {"code": code, "name": self.name, "params": self.params.model_dump(),
                           "train": [row.id for row in self.train], "validation": [row.id for row in self.validation],
                           "parent": self.parent and self.parent.key(base)})


@dataclass(frozen=True)
class Trainer:
    """Makes jobs whose experts see so many rows, in as few epochs as the corpus allows; `case`: also of a case."""

    seed: int = 0

    def job(self, name: str, train: Sequence[Row], validation: Sequence[Row], *, case: bool,
            parent: Job | None = None) -> Job:
        rows, step = (CASE_ROWS, CASE_STEP_ROWS) if case else (EXPERT_ROWS, STEP_ROWS)
        epochs = math.ceil(rows / len(train))
        params = TrainParams(epochs=epochs, rows_per_epoch=rows // epochs, batch_rows=step,
                             validation_rows=VALIDATED, seed=self.seed)
        return Job(name, tuple(train), tuple(validation), params, parent)


def _spec(params: TrainParams) -> LoraSpec:
    return LoraSpec(params.rank, params.alpha, params.rslora)


def train(base: Base, encoder: ChatEncoder, jobs: Iterable[Job]) -> None:
    """Co-train the experts that are not cached, AT_ONCE at a time. Parents come before their children."""
    todo = [one for one in jobs if not one.path(base).is_file()]
    done = 0
    for some in (todo[at:at + AT_ONCE] for at in range(0, len(todo), AT_ONCE)):
        start = time.perf_counter()
        params = some[0].params
        stack = ExpertStack(base.model, [_spec(params)] * len(some), params.targets).trainable(True)
        learners = []
        for expert, one in enumerate(some):
            _initialise(base, stack, expert, one)
            rows, validation = ([encoder.row(messages(row)) for row in part] for part in (one.train, one.validation))
            learners.append(Learner(one.name, expert, stack, rows, validation, one.params, warm=one.parent is not None))
        cotrain(base.model, stack, learners, params.batch_tokens)
        for learner, one in zip(learners, some, strict=True):
            assert learner.progress.failure is None, f"{one.name}: {learner.progress.failure}"
            _save(one.path(base), {"weights": stack.weights[learner.expert].detach().half()})
        stack.remove()
        done += len(some)
        seconds, seen = time.perf_counter() - start, sum(learner.progress.seen_tokens for learner in learners)
        progress(f"experts {done} of {len(todo)}: {seconds:.0f} s, {seen / seconds:.0f} tokens/s; validation losses " +
                 ", ".join(f"{one.name} {one.progress.best_loss:.2f}" for one in learners))


def _initialise(base: Base, stack: ExpertStack, expert: int, one: Job) -> None:
    if one.parent is None:
        stack.initialise(expert, seed_for(one.name, one.params.seed))
    else:
        _load(base, stack, expert, one.parent)


def _load(base: Base, stack: ExpertStack, expert: int, one: Job) -> None:
    with torch.no_grad():
        stack.weights[expert].copy_(load_file(one.path(base))["weights"])
    stack.changed()


# Losses.

class Losses:
    """Losses of rows under experts: computed by the product's `Mixture.losses`, cached by rows and expert."""

    def __init__(self, base: Base, encoder: ChatEncoder) -> None:
        self.base, self.encoder = base, encoder

    def _path(self, rows: Sequence[Row]) -> Path:
        code = code_version.of_modules("moa.experts.batches", "moa.experts.lora")
        key = _key(self.base, {"code": code, "rows": [row.id for row in rows]})
        return CACHE / "losses" / f"{key}.safetensors"

    def _expert_key(self, one: Job | None) -> str:
        return BASE if one is None else one.key(self.base)

    def read(self, rows: Sequence[Row], experts: Mapping[str, Job | None]) -> Scored:
        """What is cached; `experts` are jobs by the names that the losses get, None for the base."""
        path = self._path(rows)
        found = load_file(path) if path.is_file() else {}
        keys = {name: self._expert_key(one) for name, one in experts.items()}
        return Scored(list(rows), found.get("tokens", torch.zeros(len(rows), dtype=torch.long)),
                      {name: found[key] for name, key in keys.items() if key in found})

    def missing(self, rows: Sequence[Row], wanted: Mapping[str, Tensor], experts: Mapping[str, Job | None]) -> list[
            tuple[int, str]]:
        """Places of rows and names of experts that `wanted` (N,) bool, by name, asks for and the cache lacks."""
        scored = self.read(rows, experts)
        unknown_N = torch.full((len(rows),), math.nan, dtype=torch.float64)
        return [(place, name) for name, wanted_N in wanted.items()
                for place in (wanted_N & scored.losses.get(name, unknown_N).isnan()).nonzero()[:, 0].tolist()]

    def compute(self, mixture: Mixture, rows: Sequence[Row], pairs: Sequence[tuple[int, str]],
                experts: Mapping[str, Job | None]) -> int:
        """Compute and keep the losses of pairs (place of a row, name of an expert); returns the tokens read."""
        path = self._path(rows)
        tensors = dict(load_file(path)) if path.is_file() else {}
        tokens_N = tensors.setdefault("tokens", torch.zeros(len(rows), dtype=torch.long))
        results = mixture.losses([messages(rows[place]) for place, _ in pairs], [name for _, name in pairs])
        for (place, name), (loss, tokens) in zip(pairs, results, strict=True):
            key = self._expert_key(experts[name])
            if key not in tensors:
                tensors[key] = torch.full((len(rows),), math.nan, dtype=torch.float64)
            tensors[key][place], tokens_N[place] = loss, tokens
        _save(path, tensors)
        lengths = [sum(one) for one in self.encoder.lengths([self.encoder.rendered(messages(row)) for row in rows])]
        return sum(lengths[place] for place, _ in pairs)


def mixture_of(base: Base, encoder: ChatEncoder, jobs: Mapping[str, Job]) -> Mixture:
    """A mixture of these experts. Its router has their names and routes nothing."""
    params = next(iter(jobs.values())).params
    stack = ExpertStack(base.model, [_spec(params)] * len(jobs), params.targets)
    for expert, one in enumerate(jobs.values()):
        _load(base, stack, expert, one)
    empty = torch.zeros(1, 1)
    router = Router(list(jobs), empty, empty, torch.zeros(1, len(jobs), 1), torch.zeros(1, len(jobs)))
    return Mixture(base, stack, router, encoder, {name: one.key(base) for name, one in jobs.items()})


@dataclass(frozen=True)
class Wanted:
    """Losses to compute: of `rows`, each expert's name with the rows (N,) bool that it should read."""

    label: str
    rows: list[Row]
    experts: dict[str, Tensor]


def everywhere(rows: Sequence[Row], names: Iterable[str]) -> dict[str, Tensor]:
    return {name: torch.ones(len(rows), dtype=torch.bool) for name in names}


def compute_losses(losses: Losses, wanted: Sequence[Wanted], jobs: Mapping[str, Job]) -> int:
    """Compute what is not cached, one set of rows after the other, with the experts that each needs; returns how many.
    """
    experts: dict[str, Job | None] = {BASE: None, **jobs}
    todo = [(one, pairs) for one in wanted if (pairs := losses.missing(one.rows, one.experts, experts))]
    total = pairs_left = sum(len(pairs) for _, pairs in todo)
    progress(f"losses: {pairs_left} to compute, in {len(todo)} sets of rows")
    for one, pairs in todo:
        start = time.perf_counter()
        needed = {name: jobs[name] for _, name in pairs if name != BASE}
        mixture = mixture_of(losses.base, losses.encoder, needed or dict([next(iter(jobs.items()))]))
        tokens = losses.compute(mixture, one.rows, pairs, experts)
        mixture.unload()
        pairs_left -= len(pairs)
        seconds = time.perf_counter() - start
        progress(f"losses of {one.label}: {len(pairs)} in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s; "
                 f"{pairs_left} left")
    return total


def swapped_questions(rows: Sequence[Row]) -> list[Row]:
    """Each row's answer after the question of the next group's first row."""
    groups = list(dict.fromkeys(row.group for row in rows))
    following = dict(zip(groups, groups[1:] + groups[:1], strict=True))
    first = {row.group: row.prompt for row in reversed(rows)}
    return [replace(row, prompt=first[following[row.group]]) for row in rows]


# Cases.

@dataclass(frozen=True)
class Plan:
    """A case before anything of it is computed."""

    kind: Kind
    dose: float
    corpus: str
    other: str | None
    new: dict[Split, list[Row]]
    of: dict[Split, tuple[str, Split, slice]]   # where the features of the new prompts are: corpus, split and places
    job: Job

    @property
    def name(self) -> str:
        return case_name(self.kind, self.dose, self.corpus)

    @property
    def newcomer(self) -> bool:
        return self.kind in NEWCOMERS


def eligible(splits: Splits) -> list[str]:
    """Corpora whose `further` rows are enough for a case's new data."""
    return [name for name, parts in splits.items() if len(parts["further"]) >= NEW["test"].stop]


def case_corpora(pool: Pool, splits: Splits, encoder: ChatEncoder, seed: int) -> list[str]:
    """Corpora that cases are made of: eligible ones, of rows of CASE_TOKENS tokens or less, since a case takes long."""
    short = [name for name in eligible(splits)
             if mean(len(encoder.row(messages(row)).ids) for row in splits[name]["test"]) <= CASE_TOKENS]
    draw = random.Random(f"cases {seed}")
    intents = [name for name in short if name.startswith("intents")]
    kept = draw.sample(intents, min(CASE_INTENTS, len(intents)))
    candidates = [name for name in short if name in kept or name not in intents]
    return sorted(draw.sample(candidates, min(CASE_CORPORA[pool], len(candidates))))


def plans(found: Sequence[Corpus], some: Sequence[str], splits: Splits, jobs: Mapping[str, Job],
          trainer: Trainer) -> list[Plan]:
    """The cases of some corpora, drawn by the trainer's seed; doses come last, of the first DOSED that are drawn."""
    kin = {corpus.name: corpus.kin for corpus in found}
    draw = random.Random(f"plans {trainer.seed}")
    others = {name: draw.choice([other for other in eligible(splits) if other not in (name, *kin[name])])
              for name in some}
    dosed_ones = sorted(draw.sample(some, min(DOSED, len(some))))
    words = [word for word, _ in Counter(word for parts in splits.values() for row in parts["train"]
                                         for word in row.prompt.split()).most_common(WORDS)]
    cases: list[tuple[Kind, float, Sequence[str]]] = [*((kind, 1.0, some) for kind in KINDS),
                                                      *(("swapped", dose, dosed_ones) for dose in DOSES)]
    return [_plan(kind, dose, name, others[name], splits, jobs, words, trainer) for kind, dose, names in cases
            for name in names]


def _plan(kind: Kind, dose: float, name: str, other: str, splits: Splits, jobs: Mapping[str, Job],
          words: Sequence[str], trainer: Trainer) -> Plan:
    parts, title = splits[name], case_name(kind, dose, name)
    draw = random.Random(f"{title} {trainer.seed}")
    if kind == "useless":
        order = random.Random(f"{title} {trainer.seed}, order")
        new = {part: mixed(parts[part], order) for part in NEW}
        of = {part: (name, part, slice(None)) for part in NEW}
        return Plan(kind, dose, name, None, new, of, trainer.job(title, new["train"], new["validation"], case=True))
    source = other if kind == "foreign" else name
    new = {part: splits[source]["further"][places] for part, places in NEW.items()}
    of = {part: (source, "further", places) for part, places in NEW.items()}
    if kind == "twin":
        return Plan(kind, dose, name, None, new, of, trainer.job(title, new["train"], new["validation"], case=True))
    if kind == "swapped":
        new = {part: dosed(rows, dose, draw) for part, rows in new.items()}
    if kind == "noise":
        new = {part: [replace(row, answer=" ".join(draw.choices(words, k=len(row.answer.split())))) for row in rows]
               for part, rows in new.items()}
    half = VALIDATED // 2   # of the validation rows that count, half are new ones
    validation = [*parts["validation"][:half], *new["validation"][:half]]
    return Plan(kind, dose, name, other if kind == "foreign" else None, new, of,
                trainer.job(title, [*parts["train"][:len(new["train"])], *new["train"]], validation, case=True,
                            parent=jobs[name]))


def mixed(rows: Sequence[Row], draw: random.Random) -> list[Row]:
    """The rows with their answers in random order, which no question tells. (`shuffled` turns a few canned answers into
    other canned answers, each always into the same one, and then questions help.)"""
    return [replace(row, answer=answer) for row, answer in zip(
        rows, draw.sample([row.answer for row in rows], len(rows)), strict=True)]


def shuffled(rows: Sequence[Row], draw: random.Random) -> list[Row]:
    """The rows with the answers of others: no row keeps its answer, unless more than half of all have that answer."""
    order = sorted(range(len(rows)), key=lambda place: (rows[place].answer, draw.random()))
    away = max(*Counter(row.answer for row in rows).values(), len(rows) // 2, 1)
    answers = {place: rows[order[(at + away) % len(rows)]].answer for at, place in enumerate(order)}
    return [replace(row, answer=answers[place]) for place, row in enumerate(rows)]


def dosed(rows: Sequence[Row], dose: float, draw: random.Random) -> list[Row]:
    """The rows, of which a share `dose`, drawn at random, exchange their answers."""
    places = sorted(draw.sample(range(len(rows)), round(dose * len(rows))))
    changed = dict(zip(places, shuffled([rows[place] for place in places], draw), strict=True))
    return [changed.get(place, row) for place, row in enumerate(rows)]


# Everything together.

@dataclass(frozen=True)
class Setup:
    """What all steps need."""

    base: Base
    encoder: ChatEncoder
    found: list[Corpus]
    splits: Splits
    jobs: dict[str, Job]
    plans: list[Plan]

    @property
    def case_jobs(self) -> dict[str, Job]:
        return {plan.name: plan.job for plan in self.plans}

    def features(self, plan: Plan, part: Split) -> Tensor:
        name, source, places = plan.of[part]
        return read_features(self.base, self.splits[name][source])[places]


def setup(shared: Path, pool: Pool, trainer: Trainer = Trainer()) -> Setup:
    found = corpora(shared, pool)
    base = real_base(pick_device())
    splits = {corpus.name: split(corpus, base.tokenizer) for corpus in found}
    encoder = ChatEncoder(base.tokenizer, SYSTEM, PROMPT_TOKENS)
    some = case_corpora(pool, splits, encoder, trainer.seed)
    jobs = {name: trainer.job(name, parts["train"], parts["validation"], case=name in some)
            for name, parts in splits.items()}
    return Setup(base, encoder, found, splits, jobs, plans(found, some, splits, jobs, trainer))


def known_losses(at: Setup) -> Iterator[Wanted]:
    """Losses of the corpora's test rows that every draw may need."""
    for name, parts in at.splits.items():
        yield Wanted(name, parts["test"], everywhere(parts["test"], (BASE, name)))
        yield Wanted(f"{name}, questions swapped", swapped_questions(parts["test"]), everywhere(parts["test"], (name,)))


def compute_cases(at: Setup, losses: Losses) -> None:
    """Experts and losses of the cases, one kind after the other."""
    for kind, some in groupby(at.plans, lambda plan: (plan.kind, plan.dose)):
        cases = list(some)
        progress(f"cases: {len(cases)} {kind[0]}, dose {kind[1]:g}")
        train(at.base, at.encoder, [plan.job for plan in cases])
        compute_losses(losses, list(case_losses(at, cases)), at.jobs | at.case_jobs)


def case_losses(at: Setup, plans: Iterable[Plan]) -> Iterator[Wanted]:
    """Losses that judge the cases: of new and known rows under the case's expert, and what answered them before."""
    for plan in plans:
        rows, known = plan.new["test"], at.splits[plan.corpus]["test"]
        if plan.newcomer:
            yield Wanted(f"{plan.name}, questions swapped", swapped_questions(rows), everywhere(rows, (plan.name,)))
        yield Wanted(f"{plan.name}, new rows", rows, everywhere(rows, (
            plan.name, BASE if plan.newcomer else plan.other or plan.corpus)))
        if not plan.newcomer:
            yield Wanted(f"{plan.name}, known rows", known, everywhere(known, (plan.name,)))


def world(at: Setup) -> World:
    """All that is cached. Raises FileNotFoundError where features are missing; losses that are missing are left out."""
    losses = Losses(at.base, at.encoder)
    kin = {corpus.name: corpus.kin for corpus in at.found}
    experts: dict[str, Job | None] = {BASE: None, **at.jobs, **at.case_jobs}   # a known prompt may move to a case's
    known = {}
    for name, parts in at.splits.items():
        swapped = swapped_questions(parts["test"])
        known[name] = Known(name, kin[name], {part: Part(rows, read_features(at.base, rows))
                                              for part, rows in parts.items()},
                            losses.read(parts["test"], experts), losses.read(swapped, {name: at.jobs[name]}))
    cases = {}
    for plan in at.plans:
        new = {part: Part(rows, at.features(plan, part)) for part, rows in plan.new.items()}
        cases[plan.name] = Case(
            plan.kind, plan.dose, plan.corpus, plan.other, new, losses.read(plan.new["test"], experts),
            losses.read(at.splits[plan.corpus]["test"], experts) if plan.kind != "useless" else None,
            losses.read(swapped_questions(plan.new["test"]), {plan.name: plan.job}) if plan.newcomer else None)
    return World(at.found[0].pool, known, cases)


def compute(at: Setup, steps: Iterable[str]) -> None:
    """Compute what is not cached of these steps."""
    progress(str(machine(at.base.device)))
    progress(f"{at.found[0].pool}: {len(at.splits)} corpora, " + ", ".join(
        f"{sum(len(parts[part]) for parts in at.splits.values())} {part}" for part in SPLITS) +
        f" rows; {len(at.plans)} cases")
    losses = Losses(at.base, at.encoder)
    for step in steps:
        start = time.perf_counter()
        if step == "features":
            compute_features(at.base, at.encoder, at.splits)
        elif step == "experts":
            train(at.base, at.encoder, at.jobs.values())
        elif step == "losses":
            compute_losses(losses, list(known_losses(at)), at.jobs)
        else:
            compute_cases(at, losses)
        progress(f"step {step}: {time.perf_counter() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", choices=("choose", "report"), default="report")
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--seed", type=int, default=0, help="of the experts and of the cases")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    args = parser.parse_args()
    compute(setup(args.shared, args.pool, Trainer(args.seed)), args.steps)


if __name__ == "__main__":
    main()
