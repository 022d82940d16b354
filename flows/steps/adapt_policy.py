"""Whether what waits in data/incoming should be learned now, and why: params.yaml's `adapt` applied to what is known.

Pure: it looks at no file and at no clock. Times are seconds since 1970.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flows.steps import deferral
from moa.core.config import AdaptParams
from moa.core.names import printable

GRAIN = 0.001   # seconds; file systems and sleeping are no finer


@dataclass(frozen=True)
class PendingRows:
    """What waits for one domain. `rows` can be used; `newest` is when the last of its files was written."""

    domain: str
    known: bool      # the domain is in params.yaml
    rows: int
    newest: float
    files: int
    lacking: int = 0  # they were tried, and wait for so many more rows
    why: str = ""     # then why, such as "not enough data"
    of: str = ""      # the domain whose rows are lacking

    @property
    def waits(self) -> bool:
        """Whether too few rows have arrived since they were tried."""
        return self.rows > 0 and self.lacking > 0


@dataclass(frozen=True)
class AdaptDecision:
    """`domains` are learned if `run`, and else are what a run would learn. `wait`: after so many seconds the answer is
    another one, if nothing else arrives; None = then it stays the same."""

    run: bool
    domains: tuple[str, ...]
    reason: str
    wait: float | None = None


def decide(pending: Sequence[PendingRows], params: AdaptParams, now: float, last_end: float | None,
           min_new: int) -> AdaptDecision:
    """Whether to begin a run. `last_end`: when the last one ended; `min_new`: fewest rows of a domain that is new.

    A new domain with fewer rows does not count, neither as a reason nor as a newcomer to wait for, and neither does a
    domain whose rows were tried and wait for more. Times that lie ahead of `now` come from a clock that was put back,
    and are passed over.
    """
    counted = [each for each in pending if each.rows > 0 and (each.known or each.rows >= min_new) and not each.waits]
    names = tuple(sorted(each.domain for each in counted))
    rows = sum(each.rows for each in counted)
    small = "; ".join(filter(None, [
        _small([each for each in pending if not each.known and each.rows < min_new and not each.waits], min_new),
        *(f"{printable(each.domain)} waits: {deferral.sentence(each.why, each.lacking, printable(each.of))}"
          for each in sorted(pending, key=lambda each: each.domain) if each.waits)]))
    if not counted:
        return AdaptDecision(False, (), f"{small}." if small else "nothing that can be learned waits.")
    what = f"{_count(rows, 'new row')} of {_listed(names)}{f'; {small}' if small else ''}"
    if rows < params.min_rows:
        return AdaptDecision(False, names, f"adapt.min_rows is {params.min_rows}; waiting: {what}.")
    cool = _left(last_end, params.cooldown, now)
    calm = max(_left(each.newest, params.debounce, now) for each in counted)
    if max(cool, calm) < GRAIN:
        return AdaptDecision(True, names, f"{what}.")
    why = (f"the last run ended less than adapt.cooldown ({params.cooldown:g} s) ago" if cool >= calm else
           f"the newest file is younger than adapt.debounce ({params.debounce:g} s)")
    return AdaptDecision(False, names, f"{why}; waiting: {what}.", max(cool, calm))


def _left(since: float | None, seconds: float, now: float) -> float:
    return 0.0 if since is None or since > now else max(0.0, since + seconds - now)


def _small(pending: Sequence[PendingRows], min_new: int) -> str:
    """The new domains that wait for more rows."""
    parts = [f"{printable(each.domain)} has {_count(each.rows, 'usable row')}" for each in
             sorted(pending, key=lambda each: each.domain)]
    return f"{_listed(parts)}, and a new domain needs {min_new}" if parts else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
