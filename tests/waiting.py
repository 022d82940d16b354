"""How tests wait: for what happens, not for a time. A slow machine only takes longer.

No test has a deadline of its own: pytest's `timeout` (pyproject.toml) ends one that hangs, and names it.
"""

import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from typing import Any, TypeVar

Found = TypeVar("Found")


def until(seen: Callable[[], Found], process: "Popen[Any] | None" = None) -> Found:
    """Ask `seen` again and again until it finds something, and return that.

    Args:
        process: what is expected to bring it about. Once it has ended, and `seen` still finds nothing, waiting is in
            vain.

    Raises:
        AssertionError: `process` ended before.
    """
    while True:
        ended = process is not None and process.poll() is not None   # before the look: what it did last counts
        if found := seen():
            return found
        if ended:
            said = [stream.read() for stream in (process.stdout, process.stderr) if stream is not None]
            raise AssertionError(f"the process ended before, with status {process.returncode}: {said}")
        time.sleep(0.02)


class Gate:
    """A function at which processes wait until the gate is opened: they are then surely in the middle of their work.

    A process is held if it was started with `environment`, directly or by another one.
    """

    def __init__(self, folder: Path, function: str) -> None:
        """`function` is MODULE:NAME, such as "moa.experts.train:Checkpoint.save_now_and_then"."""
        self._path = folder / "gate"
        self.environment = {"MOA_TEST_HOLD": f"{function}={self._path}"}
        self.close()

    def reached(self) -> set[int]:
        """The pids of all processes that waited here, or still do."""
        try:
            return {int(line) for line in self._path.with_suffix(".reached").read_text().split()}
        except FileNotFoundError:
            return set()

    def open(self) -> None:
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        self._path.touch()
