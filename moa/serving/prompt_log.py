"""Prompts that `moa serve` keeps, with what the router made of each: what drift and missing domains are seen by.

Kept only where somebody asked for it, without personal data, for their owner's eyes, and never beyond a bound. Keeping
neither delays nor fails an answer: one thread writes, and what it cannot keep up with is let go. Knows nothing of HTTP,
of models, or of what the prompts are evidence of.

    .moa/evidence/TIME-PROCESS.jsonl    segments, one prompt a line, the oldest deleted first
"""

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa.base.encoding import Message
from moa.core.paths import Workspace
from moa.data.redaction import Redactor

if TYPE_CHECKING:
    from moa.mixture.router import Decision

MEGABYTE = 1_000_000
SEGMENTS = 8          # of the bound: what deleting the oldest takes away
CHARACTERS = 8_000    # of one prompt, counted from its end, which is the end that the router reads
WAITING = 1_000       # prompts between an answer and the disk
END_SECONDS = 5.0     # for the last prompts when the server ends


@dataclass(frozen=True, kw_only=True)
class LoggedPrompt:
    """One prompt that was answered."""

    at: float                  # seconds since 1970
    release: int               # version
    digest: str                # of the release
    messages: list[Message]    # the last one always, those before it while there is room
    cut: bool                  # something at the front was left out
    domain: str                # the router's best guess, or what the caller named
    forced: bool               # the caller named it: the router was not asked
    abstained: bool = False
    score: float | None = None         # None where the caller chose, as is the confidence
    confidence: float | None = None

    @property
    def text(self) -> str:
        """The last user message."""
        return next((one["content"] for one in reversed(self.messages) if one["role"] == "user"), "")


class PromptLogger:
    """Writes prompts behind the back of whoever answers them. `close` writes what still waits."""

    def __init__(self, workspace: Workspace, megabytes: float, redact: Sequence[str]) -> None:
        self.lost = 0   # prompts let go, because too many waited or the disk refused
        self._segments = _Segments(folder(workspace), int(megabytes * MEGABYTE))
        self._redactor = Redactor(redact)
        self._queue: queue.Queue[LoggedPrompt | None] = queue.Queue(WAITING)
        self._complained = False
        self._thread = threading.Thread(target=self._write, name="moa-evidence", daemon=True)
        self._thread.start()

    def keep(self, kept: LoggedPrompt) -> None:
        """Returns at once, and never raises."""
        try:
            self._queue.put_nowait(kept)
        except queue.Full:
            self.lost += 1

    def routed(self, release: int, digest: str, messages: Sequence[Message], decision: "Decision") -> None:
        """Keep a prompt that the router of this release decided on."""
        self.keep(LoggedPrompt(at=time.time(), release=release, digest=digest, messages=list(messages), cut=False,
                               domain=decision.domain, forced=False, abstained=decision.abstained, score=decision.score,
                               confidence=decision.confidence))

    def named(self, release: int, digest: str, messages: Sequence[Message], domain: str) -> None:
        """Keep a prompt whose domain the caller named: the router was not asked."""
        self.keep(LoggedPrompt(at=time.time(), release=release, digest=digest, messages=list(messages), cut=False,
                               domain=domain, forced=True))

    def close(self) -> None:
        with suppress(queue.Full):
            self._queue.put(None, timeout=END_SECONDS)
            self._thread.join(END_SECONDS)

    def _write(self) -> None:
        while (kept := self._queue.get()) is not None:
            try:
                self._segments.add(_line(kept, self._redactor))
            except Exception as error:   # of any kind: this thread ends with the server, not before
                self.lost += 1
                if not self._complained:   # once, not at every prompt
                    print(f"moa: prompts cannot be kept, answers go on: {error}", file=sys.stderr, flush=True)
                self._complained = True
        self._segments.close()


def _line(kept: LoggedPrompt, redactor: Redactor) -> bytes:
    """`kept` without personal data and within its bound. Redacted whole: a cut could hide half of an address."""
    room = CHARACTERS
    messages: list[Message] = []
    for message in reversed(kept.messages):
        if room <= 0:
            break
        text = redactor(message["content"])
        messages.insert(0, {"role": message["role"], "content": text[-room:]})
        room -= len(text)
    cut = room < 0 or len(messages) < len(kept.messages)
    while cut and len(messages) > 1 and messages[0]["role"] != "user":   # no template begins with an answer
        del messages[0]
    record = {**asdict(kept), "messages": messages, "cut": kept.cut or cut}
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


class _Segments:
    """Lines in files of an eighth of the bound. Each process begins its own, so a torn line ends its file."""

    def __init__(self, home: Path, bound: int) -> None:
        self.home, self.size, self.bound = home, bound // SEGMENTS, bound
        self._file: int | None = None
        self._written = 0

    def add(self, line: bytes) -> None:
        if self._file is None or self._written + len(line) > self.size or not os.fstat(self._file).st_nlink:
            self._begin()
        assert self._file is not None
        try:
            whole = os.write(self._file, line) == len(line)
        except OSError:
            self.close()
            raise
        self._written += len(line)
        if not whole:
            self.close()
            raise OSError("the disk is full")

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _begin(self) -> None:
        """A new file, after the oldest made room for it."""
        self.close()
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = [(path, path.stat().st_size) for path in segments(self.home) if path.is_file()]
        total = sum(size for _, size in found)
        for path, size in found:
            if total + self.size <= self.bound:
                break
            path.unlink(missing_ok=True)
            total -= size
        path = self.home / f"{time.time_ns():020d}-{os.getpid()}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._written = 0


# Reading.

def folder(workspace: Workspace) -> Path:
    return workspace.local / "evidence"


def segments(home: Path) -> list[Path]:
    """Oldest first."""
    return sorted(home.glob("*.jsonl")) if home.is_dir() else []


def read(workspace: Workspace, release: int | None = None, since: float | None = None) -> Iterator[LoggedPrompt]:
    """What is kept, as good as in order of time: all, or of one version, or from a time (seconds since 1970) on.

    Lines that a crash tore are passed over, and so is a file that is deleted meanwhile.
    """
    for path in segments(folder(workspace)):
        with suppress(FileNotFoundError), path.open("rb") as file:
            for line in file:
                kept = _parse(line)
                if kept is not None and release in (None, kept.release) and (since is None or kept.at >= since):
                    yield kept


def _parse(line: bytes) -> LoggedPrompt | None:
    try:
        found: Any = json.loads(line)
        return LoggedPrompt(**found) if isinstance(found, dict) else None
    except (ValueError, TypeError):   # torn, or of another version of moa
        return None
