"""Which process holds the workspace's lock, for messages.

The lock itself is the operating system's, and ends with its owner, however that ends: nothing has to be guessed to
take over from a crashed run. The owner says beside it who it is, and renews `until`. One that is alive and does not
(stopped, or hanging on a dead disk) is named as silent and never robbed: two writers would be worse than none.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from moa.core.files import read_json, write_json
from moa.core.paths import Workspace

RENEWED, VALID = 10.0, 60.0   # seconds


class LockHolder:
    """The file that names the owner."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, workspace: Workspace) -> Self:
        return cls(workspace.lock.with_suffix(".json"))   # beside it: some versions of filelock truncate the lock

    def read(self) -> dict[str, Any] | None:
        """`pid`, `since`, `seen` and `until` (seconds since 1970) of the last process that wrote it.

        None when that process ended normally.
        """
        try:
            found = read_json(self.path)
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and {"pid", "since"} <= found.keys() else None

    def at_work(self) -> bool:
        """Whether a process seems to hold the lock: a hint, since only taking the lock shows it for certain."""
        found = self.read()
        if found is None or time.time() > found.get("until", 0.0):
            return False
        try:
            os.kill(found["pid"], 0)
        except ProcessLookupError:
            return False
        except OSError:   # a process of another user
            return True
        return True

    def described(self) -> str:
        """For an error message: ` (pid 12, since ...)`, or nothing."""
        found = self.read()
        if found is None:
            return ""
        silent = f", silent since {found['seen']}" if time.time() > found.get("until", math.inf) else ""
        return f" (pid {found['pid']}, since {found['since']}{silent})"

    @contextlib.contextmanager
    def seen(self) -> Iterator[None]:
        """Say who we are, and go on saying that we are there, until the block ends."""
        since, ended = _now(), threading.Event()

        def say() -> None:
            write_json(self.path, {"pid": os.getpid(), "since": since, "seen": _now(), "until": time.time() + VALID})

        def renew() -> None:
            while not ended.wait(RENEWED):
                with contextlib.suppress(OSError):   # a full disk must not end the work
                    say()

        say()
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
