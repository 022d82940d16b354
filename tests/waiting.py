"""How tests wait: for a condition, not for a time, so that a slow machine only takes longer.

No test has a deadline of its own: pytest's `timeout` (pyproject.toml) ends a test that hangs, and names it.
"""

import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from typing import Any, TypeVar

Found = TypeVar("Found")


def until(seen: Callable[[], Found], process: "Popen[Any] | None" = None) -> Found:
    """Call `seen` again and again until its value is true, and return that value.

    Args:
        process: the process that is expected to make it true; without one, there is no end but pytest's timeout.

    Raises:
        AssertionError: `process` ended, and the value is still false.
    """
    while True:
        ended = process is not None and process.poll() is not None   # before `seen`: the process may make it true last
        if found := seen():
            return found
        if ended:
            output = [stream.read() for stream in (process.stdout, process.stderr) if stream is not None]
            raise AssertionError(f"the process ended before, with status {process.returncode}: {output}")
        time.sleep(0.02)


class Gate:
    """Holds processes in the middle of their work: they wait before a function until the gate is opened.

    A process is held if it, or a process that started it, has `environment` in its environment variables.
    """

    def __init__(self, folder: Path, function: str) -> None:
        """`function` is MODULE:NAME, such as "moa.experts.train:Checkpoint.save_now_and_then"."""
        self._path = folder / "gate"
        self.environment = {"MOA_TEST_HOLD": f"{function}={self._path}"}
        self.close()

    def reached(self) -> set[int]:
        """The pids of all processes that waited at the gate, or still do."""
        try:
            return {int(line) for line in self._path.with_suffix(".reached").read_text().split()}
        except FileNotFoundError:
            return set()

    def open(self) -> None:
        """Let the processes that wait, and later ones, go on."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Hold processes from now on."""
        self._path.touch()
