"""Run a command so that it ends when the process that started it ends.

A child process survives when its parent is killed, and so do its own children: a training, for instance, would go on
with no process that waits for it. Here the command runs under a supervisor (this same file, run as a script, with the
standard library only). The supervisor leads a process group of its own and reads from a pipe whose other end the
starting process holds. When that end is closed, on purpose or by the death of the starting process, the supervisor ends
the whole group.
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

GRACE = 5.0   # seconds between SIGTERM and SIGKILL
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)   # signals that end a process which does not handle them

_running: "set[SupervisedProcess | ForkServer]" = set()
_guard = threading.Lock()


class SupervisedProcess:
    """A running command and its descendants, in one process group."""

    def __init__(self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str],
                 stdout: int | IO[str] = subprocess.PIPE, stderr: int | IO[str] = subprocess.STDOUT, step: bool = True,
                 server: "ForkServer | None" = None) -> None:
        """Start `command`.

        Args:
            command: a program and its arguments, or, with `server`, an entry point and its arguments.
            cwd: working folder of the command.
            env: its whole environment.
            stdout: as for `subprocess.Popen`; `follow` needs the pipe.
            stderr: as for `subprocess.Popen`.
            step: whether `stop_all` ends the command. False for a server, which handles an interruption by itself.
            server: the fork server that forks the command; None = start a program.
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
        """Whether the command has ended."""
        return self._process.poll() is not None

    def follow(self, on_line: Callable[[str], None]) -> int:
        """Pass each line of output to `on_line` until the command ends. Returns its exit status, as `wait` does."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            on_line(line.rstrip("\n"))
        return self.wait()

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the command ends. Returns its exit status; 128 and the signal's number where a signal ended it.

        Raises subprocess.TimeoutExpired after `timeout` seconds.
        """
        status = self._process.wait(timeout)
        forget(self)
        return status

    def release(self) -> None:
        """Ask the whole group to end, without waiting: SIGTERM now, and SIGKILL after GRACE seconds."""
        self.stopped = True
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def stop(self) -> None:
        """End the whole group as `release` does, and wait until it has ended."""
        self.release()
        try:
            self._process.wait(GRACE + 2)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if not self._cleared:   # where the supervisor or the command was killed, their descendants may still run
            self._cleared = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        forget(self)


def register(process: "SupervisedProcess | ForkServer") -> None:
    """Add a process to those that `stop_all` ends."""
    with _guard:
        _running.add(process)


def forget(process: "SupervisedProcess | ForkServer") -> None:
    """Remove a process from those that `stop_all` ends."""
    with _guard:
        _running.discard(process)


def stop_all() -> None:
    """End all registered steps and fork servers: ask every one to end first, and then wait for each."""
    with _guard:
        processes = list(_running)
    for process in processes:
        process.release()
    for process in processes:
        process.stop()


def end_with_parent(seconds: float = 1.0) -> None:
    """Watch the parent process in a thread: once it has ended, end every step, and this process with status 1.

    Args:
        seconds: time between two checks.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            threading.Event().wait(seconds)
        stop_all()
        os._exit(1)

    if parent != 1:   # a child of process 1, such as a daemon, has no parent to end with
        threading.Thread(target=watch, name="moa-parent", daemon=True).start()


def unmoved_by_signals() -> None:
    """Make this process, a supervisor, ignore the signals of `ENDING`: it ends when its command has ended."""
    for number in ENDING:
        signal.signal(number, lambda *_: None)   # an empty handler, because the command would inherit SIG_IGN


def supervise(wait: Callable[[], int], lead: int) -> int:
    """Supervise a command as the leader of its process group.

    Args:
        wait: waits until the command ends and returns its exit status, negative where a signal ended it.
        lead: file descriptor whose end of file means that the process group, and so this process, shall end.

    Returns:
        The command's exit status; 128 and the signal's number where a signal ended it.
    """
    released = threading.Event()

    def watch() -> None:
        with contextlib.suppress(ConnectionResetError):   # the other end of a socket was closed with unread data
            while os.read(lead, 1024):
                pass
        released.set()
        os.killpg(0, signal.SIGTERM)
        threading.Event().wait(GRACE)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    status = wait()
    if released.is_set():
        os.killpg(0, signal.SIGKILL)   # the command has ended; its descendants, and this process, end now
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    unmoved_by_signals()
    sys.exit(supervise(subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL).wait, lead=0))
