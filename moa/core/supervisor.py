"""Run a command that ends with the process that started it.

A child started directly survives the sudden death of its parent, and so do its own children: a training that no process
waits for. Here a small supervisor (this same file, run as a script with the standard library only) leads a process
group of its own and holds one end of a pipe. When the other end closes, because we ask for it or because we are gone,
it ends the whole group.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from moa.core.fork_server import ForkServer

GRACE = 5.0   # seconds between asking a group to end and ending it
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_running: "set[SupervisedProcess | ForkServer]" = set()
_guard = threading.Lock()


class SupervisedProcess:
    """A running command with everything it starts."""

    def __init__(self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str],
                 stdout: int | IO[str] = subprocess.PIPE, stderr: int | IO[str] = subprocess.STDOUT, step: bool = True,
                 server: "ForkServer | None" = None) -> None:
        """Start `command`.

        Args:
            step: whether `stop_all` ends it. A server must hear of the interruption by itself.
            server: what forks the command, where it is a Python entry point's and not a program's: see `ForkServer`.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *command], cwd=cwd, env=dict(env), stdin=subprocess.PIPE,
            stdout=stdout, stderr=stderr, start_new_session=True, text=True, errors="replace", bufsize=1,
        ) if server is None else server.fork(command, cwd=cwd, env=env, stderr=stderr)
        self.stopped = self._cleared = False
        if step:
            register(self)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def follow(self, on_line: Callable[[str], None]) -> int:
        """Pass each line of output on until the command ends; its exit status."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            on_line(line.rstrip("\n"))
        return self.wait()

    def wait(self, timeout: float | None = None) -> int:
        status = self._process.wait(timeout)
        self._forget()
        return status

    def release(self) -> None:
        """Ask the group to end, without waiting for it."""
        self.stopped = True
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def stop(self) -> None:
        """End the whole group, gently if it lets us, and wait until it is gone."""
        self.release()
        try:
            self._process.wait(GRACE + 2)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if not self._cleared:   # a supervisor that was killed itself, or whose command was, leaves the others behind
            self._cleared = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._forget()

    def _forget(self) -> None:
        forget(self)


def register(process: "SupervisedProcess | ForkServer") -> None:
    """From now on `stop_all` ends this, too."""
    with _guard:
        _running.add(process)


def forget(process: "SupervisedProcess | ForkServer") -> None:
    """It has ended, or `stop_all` need not end it."""
    with _guard:
        _running.discard(process)


def stop_all() -> None:
    """End every step that runs, and what forks steps, side by side."""
    with _guard:
        processes = list(_running)
    for process in processes:
        process.release()
    for process in processes:
        process.stop()


def end_with_parent(seconds: float = 1.0) -> None:
    """From now on, end every step and this process soon after the process that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            threading.Event().wait(seconds)
        stop_all()
        os._exit(1)

    if parent != 1:   # then this process was started to live on
        threading.Thread(target=watch, name="moa-parent", daemon=True).start()


def unmoved_by_signals() -> None:
    """Let the signals that end a process pass: a supervisor ends when its command has."""
    for number in ENDING:
        signal.signal(number, lambda *_: None)   # a handler, not SIG_IGN, which the command would inherit


def supervise(wait: Callable[[], int], lead: int) -> int:
    """Exit status of the command that `wait` waits for; 128 and the signal's number where one ended it.

    When the descriptor `lead` reaches its end, end the process group, and so this process.
    """
    released = threading.Event()

    def watch() -> None:
        with contextlib.suppress(ConnectionResetError):   # a socket whose other end had something left to read
            while os.read(lead, 1024):
                pass
        released.set()
        os.killpg(0, signal.SIGTERM)
        threading.Event().wait(GRACE)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    status = wait()
    if released.is_set():
        os.killpg(0, signal.SIGKILL)   # the command is gone; what it started must not stay behind
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    unmoved_by_signals()
    sys.exit(supervise(subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL).wait, lead=0))
