"""The log of prompts that `moa serve` answered, with the router's decisions: `moa drift` reads it.

Prompts are logged only with `--keep-prompts` (or drift.keep), without personal data, readable by their owner alone and
up to a bound in bytes. Logging neither delays nor fails an answer: one thread writes, and prompts are dropped when its
queue is full.

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
SEGMENTS = 8          # files that the bound is divided into; the oldest is deleted first
CHARACTERS = 8_000    # kept of one prompt, from its end: the router reads the end
WAITING = 1_000       # prompts in the queue of the writing thread
END_SECONDS = 5.0     # for the last prompts when the server ends


@dataclass(frozen=True, kw_only=True)
class LoggedPrompt:
    """One answered prompt."""

    at: float                  # seconds since 1970
    release: int               # version
    digest: str                # of the release
    messages: list[Message]    # the last one always, earlier ones within CHARACTERS
    cut: bool                  # whether text at the beginning was left out
    domain: str                # the router's best guess, or the caller's choice
    forced: bool               # the caller named the domain, so the router did not decide
    abstained: bool = False
    score: float | None = None         # None where the caller named the domain, as is `confidence`
    confidence: float | None = None

    @property
    def text(self) -> str:
        """The last user message."""
        return next((one["content"] for one in reversed(self.messages) if one["role"] == "user"), "")


class PromptLogger:
    """Appends prompts to disk in a background thread, so that logging never delays an answer."""

    def __init__(self, workspace: Workspace, megabytes: float, redact: Sequence[str]) -> None:
        self.lost = 0   # prompts dropped because the queue was full or a write failed
        self._segments = _Segments(folder(workspace), int(megabytes * MEGABYTE))
        self._redactor = Redactor(redact)
        self._queue: queue.Queue[LoggedPrompt | None] = queue.Queue(WAITING)
        self._complained = False
        self._thread = threading.Thread(target=self._write, name="moa-evidence", daemon=True)
        self._thread.start()

    def keep(self, kept: LoggedPrompt) -> None:
        """Queue a prompt. Never blocks or raises: a full queue drops it."""
        try:
            self._queue.put_nowait(kept)
        except queue.Full:
            self.lost += 1

    def routed(self, release: int, digest: str, messages: Sequence[Message], decision: "Decision") -> None:
        """Log a prompt that the router of this release decided on."""
        self.keep(LoggedPrompt(at=time.time(), release=release, digest=digest, messages=list(messages), cut=False,
                               domain=decision.domain, forced=False, abstained=decision.abstained, score=decision.score,
                               confidence=decision.confidence))

    def named(self, release: int, digest: str, messages: Sequence[Message], domain: str) -> None:
        """Log a prompt whose domain the caller named, so that the router did not decide."""
        self.keep(LoggedPrompt(at=time.time(), release=release, digest=digest, messages=list(messages), cut=False,
                               domain=domain, forced=True))

    def close(self) -> None:
        """Write queued prompts and end the thread, within `END_SECONDS`."""
        with suppress(queue.Full):
            self._queue.put(None, timeout=END_SECONDS)
            self._thread.join(END_SECONDS)

    def _write(self) -> None:
        while (kept := self._queue.get()) is not None:
            try:
                self._segments.add(_line(kept, self._redactor))
            except Exception as error:   # of any kind: the thread must not end before the server
                self.lost += 1
                if not self._complained:   # once, not at every prompt
                    print(f"moa: prompts cannot be kept, answers go on: {error}", file=sys.stderr, flush=True)
                self._complained = True
        self._segments.close()


def _line(kept: LoggedPrompt, redactor: Redactor) -> bytes:
    """The line of one prompt, redacted and cut to `CHARACTERS`.

    Messages are redacted before they are cut, because half of an address would not be recognised.
    """
    room = CHARACTERS
    messages: list[Message] = []
    for message in reversed(kept.messages):
        if room <= 0:
            break
        text = redactor(message["content"])
        messages.insert(0, {"role": message["role"], "content": text[-room:]})
        room -= len(text)
    cut = room < 0 or len(messages) < len(kept.messages)
    while cut and len(messages) > 1 and messages[0]["role"] != "user":   # a conversation begins with the user
        del messages[0]
    record = {**asdict(kept), "messages": messages, "cut": kept.cut or cut}
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


class _Segments:
    """Files of `bound / SEGMENTS` bytes each. A process writes to files of its own, so a torn line is the last of its
    file."""

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
        """Start a new file, after deleting the oldest ones until it fits into the bound."""
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
    """Where the segments are."""
    return workspace.local / "evidence"


def segments(home: Path) -> list[Path]:
    """Segment files, oldest first."""
    return sorted(home.glob("*.jsonl")) if home.is_dir() else []


def read(workspace: Workspace, release: int | None = None, since: float | None = None) -> Iterator[LoggedPrompt]:
    """Logged prompts, in the order of time except where several servers write at once.

    Args:
        release: only prompts answered by this version.
        since: only prompts from this time on, in seconds since 1970.

    Lines that a crash tore are skipped, and so are files that are deleted meanwhile.
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
