"""What the API returns: frozen dataclasses, and tuples of them (`Rows`) that become tables.

Each has a repr of one line. In a notebook, those that list something show an HTML table.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Literal, SupportsIndex, TypeVar, overload

if TYPE_CHECKING:
    import pandas

T = TypeVar("T")
Cell = str | int | float | bool | None
Record = dict[str, Cell]
SHOWN = 60   # characters of a text in an HTML table


# Tables.

class Rows(tuple[T, ...]):
    """A tuple of results that becomes a pandas DataFrame with a column for each field.

    >>> import moa
    >>> rows = moa.Rows([moa.Usage(prompt_tokens=3, completion_tokens=4)])
    >>> rows[0].total_tokens
    7
    >>> list(rows.to_frame().columns)
    ['prompt_tokens', 'completion_tokens']
    """

    __slots__ = ()

    @overload
    def __getitem__(self, index: SupportsIndex) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> "Rows[T]": ...

    def __getitem__(self, index: SupportsIndex | slice) -> "T | Rows[T]":
        """A result, or for a slice a table of results."""
        return Rows(super().__getitem__(index)) if isinstance(index, slice) else super().__getitem__(index)

    def to_frame(self) -> "pandas.DataFrame":
        """A DataFrame with one row for each result. Fields of a nested result become columns like `routing.domain`."""
        return frame(map(record, self))

    def _repr_html_(self) -> str:
        return html_table([record(each) for each in self])


def record(result: object) -> Record:
    """The fields of a result by name. Fields of nested results are named `outer.inner`; a tuple becomes one text."""
    if not (is_dataclass(result) and not isinstance(result, type)):
        return {"value": _cell(result)}
    row: Record = {}
    for field in fields(result):
        value = getattr(result, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            row |= {f"{field.name}.{name}": cell for name, cell in record(value).items()}
        else:
            row[field.name] = _cell(value)
    return row


def _cell(value: object) -> Cell:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {each}" for key, each in value.items())
    if isinstance(value, Iterable):
        return ", ".join(map(str, value))
    return str(value)


def frame(records: Iterable[Record]) -> "pandas.DataFrame":
    """The records as a DataFrame."""
    import pandas

    return pandas.DataFrame(list(records))


def html_table(records: Sequence[Record], caption: str = "") -> str:
    """The records as an HTML table, texts shortened."""
    columns = list(dict.fromkeys(name for each in records for name in each))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(_shown(each.get(name)))}</td>" for name in columns) + "</tr>"
                   for each in records)
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _shown(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN - 1]}…"


# Answers.

@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer, as in OpenAI's protocol.

    >>> import moa
    >>> moa.Usage(prompt_tokens=12, completion_tokens=5).total_tokens
    17
    """

    prompt_tokens: int
    completion_tokens: int   # the end token included

    @property
    def total_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Routing:
    """Which domain a prompt belongs to, by the router or as the caller said.

    >>> import moa
    >>> moa.Routing("math", 0.98).expert, moa.Routing("math", abstained=True, similarity=0.4, threshold=0.6).expert
    ('math', 'base')
    """

    domain: str                       # the most probable one, even where the router abstained
    confidence: float | None = None   # calibrated probability of `domain`; None = named by the caller, or abstained
    abstained: bool = False           # the prompt is unlike every domain: the base answers
    similarity: float | None = None   # to the training prompts of `domain`, -1 to 1; None = the caller named it
    threshold: float | None = None    # least similarity of a prompt that is like `domain`; None = never abstains

    @property
    def expert(self) -> str:
        """The expert that answers: that of `domain`, or "base"."""
        return "base" if self.abstained else self.domain


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt.

    >>> import moa
    >>> out = moa.Completion("180", "math", moa.Routing("math", 0.98), "stop", moa.Usage(12, 2))
    >>> print(out)
    180
    >>> out
    Completion('180', answered_by='math', confidence=0.98)
    """

    text: str
    answered_by: str                          # the expert's domain, or "base"
    routing: Routing
    finish_reason: Literal["stop", "length"]  # "length": a limit ended the answer
    usage: Usage

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        confidence = self.routing.confidence
        sure = "" if confidence is None else f", confidence={confidence:.2f}"
        return f"Completion({_shown(self.text)!r}, answered_by={self.answered_by!r}{sure})"


@dataclass(frozen=True, slots=True)
class Score:
    """How well one conversation's answers are predicted.

    >>> import moa
    >>> round(moa.Score("math", loss=0.0, tokens=4).perplexity)
    1
    """

    answered_by: str   # the expert that read the conversation, or "base"
    loss: float        # nats per token of the answers
    tokens: int        # of the answers

    @property
    def perplexity(self) -> float:
        """The exponential of `loss`."""
        import math

        return math.exp(self.loss)


@dataclass(frozen=True, slots=True)
class LevelChoice:
    """What the router's head at one level of the base says of a prompt.

    >>> import moa
    >>> moa.LevelChoice(level=0, domain="math", probability=0.9, read=True).domain
    'math'
    """

    level: int           # the layer whose input the head reads
    domain: str
    probability: float
    read: bool           # whether the router's rule decides by this level


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why the router decided on a prompt as it did.

    >>> import moa
    >>> why = moa.Explanation(moa.Routing("math", 0.9), "early", (moa.LevelChoice(0, "math", 0.9, True),))
    >>> why
    Explanation(rule='early', domain='math', confidence=0.90, abstained=False, levels=1)
    >>> len(why.to_frame())
    1
    """

    routing: Routing
    rule: str                          # how the levels' heads become one decision: early, last or vote
    levels: tuple[LevelChoice, ...]

    def to_frame(self) -> "pandas.DataFrame":
        """A DataFrame with a row for each level."""
        return frame(map(record, self.levels))

    def __repr__(self) -> str:
        confidence = self.routing.confidence
        sure = "None" if confidence is None else f"{confidence:.2f}"
        return (f"Explanation(rule={self.rule!r}, domain={self.routing.domain!r}, confidence={sure}, "
                f"abstained={self.routing.abstained}, levels={len(self.levels)})")

    def _repr_html_(self) -> str:
        return html_table([record(level) for level in self.levels], repr(self))


# Building.

@dataclass(frozen=True, slots=True)
class Added:
    """What `Workspace.add` did.

    >>> import moa
    >>> moa.Added("support", new=True, rows=120, files=("rows.jsonl",)).rows
    120
    """

    domain: str
    new: bool                # whether params.yaml had no such domain before
    rows: int                # rows that were given
    files: tuple[str, ...]   # written to data/raw/DOMAIN; none if the same rows were there already


@dataclass(frozen=True, slots=True)
class PlanStep:
    """One stage of a plan.

    >>> import moa
    >>> moa.PlanStep("train@math", "stale", ("train: rank changed",)).state
    'stale'
    """

    name: str
    state: Literal["fresh", "stale", "maybe"]   # maybe: stale only if a step before it changes its output
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What `moa.run` would do.

    >>> import moa
    >>> plan = moa.Plan((moa.PlanStep("assemble", "fresh"),), (), False, 0, 0.0, None, "Nothing to do.")
    >>> plan
    Plan(stale=0, experts=[], minutes=0.0)
    >>> list(plan.to_frame().columns)
    ['name', 'state', 'reasons']
    """

    steps: tuple[PlanStep, ...]
    experts: tuple[str, ...]   # domains whose expert would be trained
    router: bool               # whether the router would be trained
    tokens: int                # estimated, trained over all experts and epochs
    minutes: float             # estimated, of training
    release: str | None        # what would be registered; None = nothing
    text: str                  # as `moa plan` prints it

    @property
    def stale(self) -> tuple[PlanStep, ...]:
        """The steps that would run, or might."""
        return tuple(step for step in self.steps if step.state != "fresh")

    def to_frame(self) -> "pandas.DataFrame":
        """A DataFrame with a row for each step."""
        return frame(map(record, self.steps))

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Plan(stale={len(self.stale)}, experts={list(self.experts)}, minutes={self.minutes})"

    def _repr_html_(self) -> str:
        return html_table([record(step) for step in self.steps], repr(self))


@dataclass(frozen=True, slots=True)
class RunResult:
    """What `moa.run` did.

    >>> import moa
    >>> moa.RunResult(("assemble",), (), {"assemble": 2.5}, 2, 2, "pass", "the first release")
    RunResult(done=1, cached=0, version=2, champion=2, reason='the first release')
    """

    done: tuple[str, ...]       # stages and release steps that ran
    cached: tuple[str, ...]     # stages that were fresh
    seconds: Mapping[str, float]
    version: int | None         # the registered release
    champion: int | None        # the champion after the run
    verdict: str | None         # of the gate: pass, refused, not enough data, or no better
    reason: str                 # of the gate, in words
    waiting: bool = False       # the gate passed the release, and `Registry.promote` makes it champion

    @property
    def promoted(self) -> bool:
        """Whether the release of this run is champion now."""
        return self.version is not None and self.version == self.champion

    def to_frame(self) -> "pandas.DataFrame":
        """A DataFrame with a row for each stage and release step."""
        return frame(self._records())

    def _records(self) -> list[Record]:
        states = [*((name, "done") for name in self.done), *((name, "cached") for name in self.cached)]
        return [{"name": name, "state": state, "seconds": self.seconds.get(name)} for name, state in states]

    def __repr__(self) -> str:
        return (f"RunResult(done={len(self.done)}, cached={len(self.cached)}, version={self.version}, "
                f"champion={self.champion}, reason={self.reason!r})")

    def _repr_html_(self) -> str:
        return html_table(self._records(), repr(self))


# Releases.

@dataclass(frozen=True, slots=True)
class Release:
    """A registered, immutable version of a workspace's mixture.

    >>> import moa
    >>> moa.Release(2, "champion", ("math", "sql"), "2026-01-01T00:00:00+00:00", "0" * 64, True, "the first one")
    Release(version=2, state='champion', domains=('math', 'sql'))
    """

    version: int
    state: str                 # champion, was champion, waiting, not gated, or what the gate said
    domains: tuple[str, ...]
    created: str               # ISO 8601, UTC
    digest: str                # of the content
    passed: bool | None        # whether the gate lets it become champion; None = not asked yet
    reason: str                # of the gate, in words

    def __repr__(self) -> str:
        return f"Release(version={self.version}, state={self.state!r}, domains={self.domains})"


@dataclass(frozen=True, slots=True)
class ChampionChange:
    """One entry of the history of champions. `promote` and `rollback` return the one that they made.

    >>> import moa
    >>> moa.ChampionChange(version=2, previous=1, reason="better").changed
    True
    """

    version: int
    previous: int | None   # the champion before; None = there was none
    reason: str
    changed: bool = True   # False: `version` was champion already, or the change was interrupted
    at: str = ""           # ISO 8601, UTC
    by: str = ""           # the user or program


@dataclass(frozen=True, slots=True)
class DomainComparison:
    """Mean losses of two releases on one domain's test rows, in nats per token.

    >>> import moa
    >>> round(moa.DomainComparison("math", 40, 0.9, 1.1).change, 2)
    -0.2
    """

    domain: str
    rows: int
    challenger_loss: float | None   # None: the release lacks the domain, and does not answer its rows
    incumbent_loss: float | None

    @property
    def change(self) -> float:
        """The challenger's loss minus the incumbent's; below 0 is better, and NaN where one of them is missing."""
        if self.challenger_loss is None or self.incumbent_loss is None:
            return float("nan")
        return self.challenger_loss - self.incumbent_loss


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two releases on the same test rows, each row routed as each release would route it.

    >>> import moa
    >>> both = moa.Comparison(2, 1, (moa.DomainComparison("math", 40, 0.9, 1.1),), 1.0, 0.98)
    >>> both
    Comparison(challenger=2, incumbent=1, domains=1)
    >>> float(both.to_frame()["challenger_loss"][0])
    0.9
    """

    challenger: int
    incumbent: int
    domains: tuple[DomainComparison, ...]
    challenger_accuracy: float   # of routing, on the release's own domains
    incumbent_accuracy: float

    def to_frame(self) -> "pandas.DataFrame":
        """A DataFrame with a row for each domain, and the column `change`."""
        return frame(self._records())

    def _records(self) -> list[Record]:
        return [{**record(each), "change": each.change} for each in self.domains]

    def __repr__(self) -> str:
        return f"Comparison(challenger={self.challenger}, incumbent={self.incumbent}, domains={len(self.domains)})"

    def _repr_html_(self) -> str:
        return html_table(self._records(), repr(self))


# Training.

@dataclass(frozen=True, slots=True)
class EpochResult:
    """One epoch of one expert's training. Losses are in nats per token of the answers.

    >>> import moa
    >>> moa.EpochResult("math", 1, 1.2, 1.1, 0.001).epoch
    1
    """

    expert: str
    epoch: int
    train_loss: float
    validation_loss: float
    learning_rate: float    # at the end of the epoch


@dataclass(frozen=True, slots=True)
class ExpertResult:
    """The training of one expert, which ends with the weights of its best epoch.

    >>> import moa
    >>> moa.ExpertResult("math", best_epoch=2, validation_loss=1.1, tokens=5000, epochs=()).best_epoch
    2
    """

    name: str
    best_epoch: int           # 0 = no epoch was better than the initial weights
    validation_loss: float    # of the best epoch
    tokens: int               # trained, prompts included
    epochs: tuple[EpochResult, ...]


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What `moa.cotrain` returns.

    >>> import moa
    >>> epoch = moa.EpochResult("math", 1, 1.2, 1.1, 0.001)
    >>> result = moa.TrainingResult((moa.ExpertResult("math", 1, 1.1, 500, (epoch,)),))
    >>> result["math"].validation_loss
    1.1
    >>> result
    TrainingResult(math: 1.100)
    >>> len(result.to_frame())
    1
    """

    experts: tuple[ExpertResult, ...]

    def __getitem__(self, name: str) -> ExpertResult:
        return {each.name: each for each in self.experts}[name]

    def to_frame(self) -> "pandas.DataFrame":
        """A DataFrame with a row for each epoch of each expert."""
        return frame(self._records())

    def _records(self) -> list[Record]:
        return [record(epoch) for expert in self.experts for epoch in expert.epochs]

    def __repr__(self) -> str:
        return f"TrainingResult({', '.join(f'{each.name}: {each.validation_loss:.3f}' for each in self.experts)})"

    def _repr_html_(self) -> str:
        return html_table(self._records(), repr(self))
