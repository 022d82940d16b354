"""Records which process holds the workspace's lock, for messages.

The lock itself is a file lock of the operating system, which releases it when the process ends, after a crash too. The
lock holder writes its process id and times to a file beside the lock, and renews `until` every few seconds. A holder
that lives but does not renew it (stopped, or blocked by a disk) is reported as silent. Its lock is never broken,
because two writers could destroy data.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

from moa.core.files import read_json, write_json
from moa.core.paths import Workspace

RENEWED, VALID = 10.0, 60.0   # seconds between renewals, and that a renewal counts


class LockHolder:
    """The file that names the process holding the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, workspace: Workspace) -> Self:
        """The lock holder's file of a workspace."""
        # A file of its own, because some versions of filelock truncate the lock file.
        return cls(workspace.lock.with_suffix(".json"))

    def read(self) -> dict[str, Any] | None:
        """The last process that held the lock; None when it released the lock normally.

        Keys: `pid`; `since` and `seen`, ISO times of taking the lock and of the last renewal; `until`, when the renewal
        expires, in seconds since 1970.
        """
        try:
            holder = read_json(self.path)
        except (OSError, ValueError):
            return None
        return holder if isinstance(holder, dict) and {"pid", "since"} <= holder.keys() else None

    def at_work(self) -> bool:
        """Whether a process seems to hold the lock: a hint, since only taking the lock shows it for certain."""
        holder = self.read()
        if holder is None or time.time() > holder.get("until", 0.0):
            return False
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return False
        except OSError:   # the process belongs to another user
            return True
        return True

    def state(self) -> Literal["free", "at work", "silent", "killed"]:
        """What became of the last process that took the lock.

        It is `at work`, or lives, holds the lock and does not renew its record (`silent`), or was `killed`, which frees
        the lock; `free` where it released the lock.
        """
        from filelock import FileLock, Timeout

        if self.read() is None:
            return "free"
        if self.at_work():
            return "at work"
        try:
            # Only here: a process that takes the lock in this moment is told that another one works.
            with FileLock(self.path.with_suffix(".lock"), timeout=0):
                return "killed"
        except Timeout:
            return "silent"

    def described(self) -> str:
        """Describe the lock holder for an error message: ` (pid 12, since ...)`, or ""."""
        holder = self.read()
        if holder is None:
            return ""
        silent = f", silent since {holder['seen']}" if time.time() > holder.get("until", math.inf) else ""
        return f" (pid {holder['pid']}, since {holder['since']}{silent})"

    @contextlib.contextmanager
    def seen(self) -> Iterator[None]:
        """Record this process as the lock holder, and renew the record in a thread, until the block ends."""
        since, ended = _now(), threading.Event()

        def write() -> None:
            write_json(self.path, {"pid": os.getpid(), "since": since, "seen": _now(), "until": time.time() + VALID})

        def renew() -> None:
            while not ended.wait(RENEWED):
                with contextlib.suppress(OSError):   # a full disk must not end the work
                    write()

        write()
        thread = threading.Thread(target=renew, name="moa-lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.path.unlink(missing_ok=True)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
