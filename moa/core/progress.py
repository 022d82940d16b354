"""Progress bars of long steps, on both sides of a process boundary.

A step counts with `track`. Run by itself it draws a bar. Run by a driver, which sets MOA_PROGRESS=json, it prints
records, which the driver's `Screen` turns into one bar for each running stage.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from types import TracebackType
from typing import Any, Self

MARKER = "::moa-progress::"   # begins a record in a step's output
RECORD_SECONDS = 0.2    # least time between two records of one step
PLAIN_SECONDS = 15.0    # without a terminal: time between two lines of one step,
PLAIN_SHARE = 0.1       # unless the share that is done has grown by this much
STAMP_LINES = "MOA_STAMP_LINES"   # environment variable: set = each line begins with the local time

_logger: ContextVar[logging.Logger | None] = ContextVar("logger", default=None)   # set by `logged`


@contextmanager
def logged(logger: logging.Logger) -> Iterator[None]:
    """Within the block, `notice` and every new `Screen` log their lines and draw no bars: a library does not print."""
    token = _logger.set(logger)
    try:
        yield
    finally:
        _logger.reset(token)


def notice(text: str) -> None:
    """Print a line on standard error, or log it (`logged`)."""
    if (logger := _logger.get()) is not None:
        logger.warning(text)
    else:
        print(text, file=sys.stderr)


def stamped(text: str) -> str:
    """`text` after the local time (ISO 8601, to the second) where STAMP_LINES is set, as for the flows of `moa up`."""
    return f"{datetime.now().isoformat(timespec='seconds')}  {text}" if os.environ.get(STAMP_LINES) else text


class track:   # a verb in lower case, because it is used like a function: `with track(...)`
    """Show the progress of the block's work, which `advance` counts, on standard error.

    Args:
        label: name of the work.
        total: the count at the end; None = not known.
        unit: name of what is counted.
    """

    def __init__(self, label: str, total: int | None = None, unit: str = "") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.note = 0, ""
        self._last = 0.0
        self._records = os.environ.get("MOA_PROGRESS") == "json"
        self._screen: Screen | None = None

    def __enter__(self) -> Self:
        if not self._records:
            self._screen = Screen().__enter__()
            self._screen.start(self.label)
        self._show(True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._show(True)
        if self._screen is not None:
            self._screen.finish(self.label, "failed" if kind else "done")
            self._screen.__exit__(kind, error, trace)

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more; `note` replaces the text behind the count."""
        self.done += count
        if note is not None:
            self.note = note
        self._show(self.done == self.total)

    def _show(self, now: bool) -> None:
        record = {"label": self.label, "done": self.done, "total": self.total, "unit": self.unit, "note": self.note}
        if self._screen is not None:
            self._screen.update(self.label, record)
        elif now or time.monotonic() - self._last >= RECORD_SECONDS:
            self._last = time.monotonic()
            print(f"{MARKER}{json.dumps(record)}", file=sys.stderr, flush=True)


class Screen:
    """Shows the progress of stages on standard error: bars on a terminal, a few lines elsewhere. See also `logged`.

    Each stage that ends leaves one line. `verbose` also shows the stages' output.
    """

    def __init__(self, *, verbose: bool = False) -> None:
        self._verbose = verbose
        self._logger = _logger.get()
        self._guard = threading.Lock()
        self._started: dict[str, float] = {}
        self._shown: dict[str, tuple[float, float]] = {}   # of the last plain line: its time, and the share done then
        self._bars: dict[str, Any] = {}
        self._progress: Any = None

    def __enter__(self) -> Self:
        if self._logger is None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._progress = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"),
                                      TimeElapsedColumn(), TextColumn("{task.fields[note]}", markup=False),
                                      console=Console(stderr=True), transient=True)
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def start(self, name: str) -> None:
        """Begin to measure the time of stage `name`, and show its bar."""
        with self._guard:
            self._started[name] = time.monotonic()
            if self._progress is not None:
                self._bars[name] = self._progress.add_task(name, total=None, count="", note="")

    def line(self, name: str, line: str) -> None:
        """Take one line of a stage's output: a progress record, or other text, which only `verbose` shows."""
        _, marker, text = line.partition(MARKER)
        if not marker:
            if self._verbose:
                self.say(f"{name}: {line}")
            return
        try:
            record = json.loads(text)
        except ValueError:
            return   # two processes wrote into one line; the next record brings the count
        self.update(name, record)

    def update(self, name: str, record: dict[str, Any]) -> None:
        """Show a progress record (label, done, total, unit, note) of stage `name`."""
        done, total, note = record["done"], record["total"], record["note"]
        count = f"{done}/{total} {record['unit']}" if total else f"{done} {record['unit']}" if done else ""
        if self._progress is not None:
            named_like_stage = record["label"].split(" ")[0] == name.split("@")[0].split(" ")[0]
            label = name if named_like_stage else f"{name} · {record['label']}"
            if name in self._bars:
                self._progress.update(self._bars[name], description=label, completed=done, total=total,
                                      count=count, note=note)
            return
        share, now = (done / total if total else 0.0), time.monotonic()
        shown_at, shown_share = self._shown.get(name, (self._started.get(name, now), 0.0))
        if 0 < share < shown_share:
            shown_share = 0.0   # the stage has begun another count
        if (share - shown_share >= PLAIN_SHARE and share < 1) or now - shown_at >= PLAIN_SECONDS:
            self._shown[name] = (now, share)
            self.say("  ".join(part for part in (f"{name}: {record['label']}", count, note) if part))

    def finish(self, name: str, state: str, detail: str = "") -> None:
        """Remove the bar of stage `name`, and print its last line: `state`, its duration and `detail`."""
        with self._guard:
            seconds = time.monotonic() - self._started.pop(name, time.monotonic())
            self._shown.pop(name, None)
            bar = self._bars.pop(name, None)
        if bar is not None:
            self._progress.remove_task(bar)
        self.say(f"{name:<24} {state}{f' in {duration(seconds)}' if seconds >= 0.05 else ''}"
                 f"{f'  {detail}' if detail else ''}")

    def say(self, text: str) -> None:
        """Print a line above the bars, or log it (`logged`)."""
        if self._logger is not None:
            self._logger.info(text)
            return
        text = stamped(text)
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A duration in words: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
