"""Logs the prompts that `moa serve` answered, with the router's decisions, for `moa drift`.

Prompts are logged only with `--keep-prompts` (or drift.keep). Personal data are redacted, only the files' owner can
read them, and their size is bounded. Logging neither delays nor fails an answer: one thread writes, and prompts are
dropped when its queue is full.

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
CHARACTERS = 8_000    # of one prompt that are logged, from its end, because the router reads the end
WAITING = 1_000       # prompts in the queue of the writing thread
END_SECONDS = 5.0     # to write the last prompts when the server ends


@dataclass(frozen=True, kw_only=True)
class LoggedPrompt:
    """One answered prompt."""

    at: float                  # seconds since 1970
    release: int               # version
    digest: str                # of the release
    messages: list[Message]    # the last one, and earlier ones within CHARACTERS
    cut: bool                  # whether text at the beginning was left out
    domain: str                # the router's best guess, or the caller's choice
    forced: bool               # whether the caller named the domain, so that the router did not decide
    abstained: bool = False
    score: float | None = None         # None where the caller named the domain, as is `confidence`
    confidence: float | None = None

    @property
    def text(self) -> str:
        """The last user message."""
        return next((message["content"] for message in reversed(self.messages) if message["role"] == "user"), "")


class PromptLogger:
    """Appends prompts to disk in a background thread, so that logging never delays an answer."""

    def __init__(self, workspace: Workspace, megabytes: float, redact: Sequence[str]) -> None:
        """Start the thread. `megabytes` bounds the log; `redact` names the kinds of personal data to redact."""
        self.lost = 0   # prompts dropped because the queue was full or a write failed
        self._segments = _Segments(folder(workspace), int(megabytes * MEGABYTE))
        self._redactor = Redactor(redact)
        self._queue: queue.Queue[LoggedPrompt | None] = queue.Queue(WAITING)
        self._complained = False
        self._thread = threading.Thread(target=self._write, name="moa-evidence", daemon=True)
        self._thread.start()

    def keep(self, prompt: LoggedPrompt) -> None:
        """Queue a prompt. Never blocks or raises: a full queue drops it."""
        try:
            self._queue.put_nowait(prompt)
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
        while (prompt := self._queue.get()) is not None:
            try:
                self._segments.add(_line(prompt, self._redactor))
            except Exception as error:   # of any kind: the thread must not end before the server
                self.lost += 1
                if not self._complained:   # printed once, not for every prompt
                    print(f"moa: prompts cannot be kept, answers go on: {error}", file=sys.stderr, flush=True)
                self._complained = True
        self._segments.close()


def _line(prompt: LoggedPrompt, redactor: Redactor) -> bytes:
    """The line of one prompt, redacted and cut to `CHARACTERS`.

    Messages are redacted before they are cut, because half of an address would not be recognised.
    """
    room = CHARACTERS
    messages: list[Message] = []
    for message in reversed(prompt.messages):
        if room <= 0:
            break
        text = redactor(message["content"])
        messages.insert(0, {"role": message["role"], "content": text[-room:]})
        room -= len(text)
    cut = room < 0 or len(messages) < len(prompt.messages)
    while cut and len(messages) > 1 and messages[0]["role"] != "user":   # a conversation begins with the user
        del messages[0]
    record = {**asdict(prompt), "messages": messages, "cut": prompt.cut or cut}
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


class _Segments:
    """Writes lines to files of `bound / SEGMENTS` bytes each, and deletes the oldest beyond the bound.

    A process writes to files of its own, so only the last line of a file can be torn.
    """

    def __init__(self, home: Path, bound: int) -> None:
        self.home, self.size, self.bound = home, bound // SEGMENTS, bound
        self._file: int | None = None
        self._written = 0

    def add(self, line: bytes) -> None:
        """Append a line, to a new file where the present one is full or was deleted. Raises OSError."""
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
        present = [(path, path.stat().st_size) for path in segments(self.home) if path.is_file()]
        total = sum(size for _, size in present)
        for path, size in present:
            if total + self.size <= self.bound:
                break
            path.unlink(missing_ok=True)
            total -= size
        path = self.home / f"{time.time_ns():020d}-{os.getpid()}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._written = 0


# Reading.

def folder(workspace: Workspace) -> Path:
    """The folder of the log's segments."""
    return workspace.local / "evidence"


def segments(home: Path) -> list[Path]:
    """The segment files in the folder `home`, oldest first."""
    return sorted(home.glob("*.jsonl")) if home.is_dir() else []


def read(workspace: Workspace, release: int | None = None, since: float | None = None) -> Iterator[LoggedPrompt]:
    """Read the logged prompts, in the order of time except where several servers wrote at once.

    Args:
        release: only prompts answered by this version.
        since: only prompts from this time on, in seconds since 1970.

    Lines that a crash tore are skipped, and so are files that a server deletes meanwhile.
    """
    for path in segments(folder(workspace)):
        with suppress(FileNotFoundError), path.open("rb") as file:
            for line in file:
                prompt = _parse(line)
                if prompt is not None and release in (None, prompt.release) and (since is None or prompt.at >= since):
                    yield prompt


def _parse(line: bytes) -> LoggedPrompt | None:
    """The prompt in a line; None for a line that is torn, or was written by another version of moa."""
    try:
        record: Any = json.loads(line)
        return LoggedPrompt(**record) if isinstance(record, dict) else None
    except (ValueError, TypeError):
        return None
