"""Fork a step from a process that has its libraries imported already.

Importing torch and transformers takes a step three seconds or more, which is most of what a small step takes. Here one
process (this same file, run as a script) imports them once, and forks a step when it is asked to. It does nothing else:
it never runs a step itself, starts no thread, touches no GPU, and imports no module of moa that a step uses, so that a
step runs the code that is on the disk when it starts.

    the caller --- control: a request for each step, with its descriptors ---> the fork server
                                                                                | fork
    the caller <-- channel of one step: its process group, its status ------ supervisor, leader of a process group
                   its end is the end of the group (moa.core.supervisor)        | fork
    the caller <-- output ---------------------------------------------------- the step

The fork server ends when its control socket does, so neither it nor a step outlives the caller.
"""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from moa.core import supervisor

READY = b"r"
NUMBER = struct.Struct("!i")
# What these variables say is read when a step runs. Any other may have been read when a library was imported.
READ_LATE = ("MOA_", "DVC_", "MLFLOW_", "PREFECT_")


class ForkServer:
    """The process that forks steps, as its caller sees it. The libraries are imported while the caller goes on."""

    def __init__(self, libraries: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> None:
        """Start it. A library that cannot be imported is left to the step that needs it."""
        self.stopped = False
        self._imported: bool | None = None
        self._guard = threading.Lock()
        self._environment = _read_early(env)
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, *libraries], cwd=cwd, env=dict(env), stdin=theirs.fileno(),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        supervisor.register(self)

    def ready(self, env: Mapping[str, str]) -> bool:
        """Whether it can fork a step with this environment, once the libraries are imported."""
        with self._guard:
            if self._imported is None:
                with suppress(OSError):
                    self._imported = self._control.recv(1) == READY
        return bool(self._imported) and self._process.poll() is None and _read_early(env) == self._environment

    def fork(self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str],
             stderr: int | IO[str] = subprocess.STDOUT) -> "Forked":
        """Start a step.

        Args:
            command: an entry point, such as `moa.cli.main:main`, and what it finds in `sys.argv`.
            stderr: subprocess.STDOUT, or a file.
        """
        read, write = os.pipe()
        channel, theirs = socket.socketpair()
        with theirs:
            request = json.dumps([list(command), str(cwd), dict(env)]).encode()
            err = write if isinstance(stderr, int) else stderr.fileno()
            try:
                with self._guard:
                    socket.send_fds(self._control, [NUMBER.pack(len(request))], [theirs.fileno(), write, err])
                    self._control.sendall(request)
            except OSError:
                pass   # it is gone, and what comes through the channel says so: nothing
            finally:
                os.close(write)
        return Forked(channel, read)

    def release(self) -> None:
        """End it, without waiting for it. Steps that it forked have supervisors of their own."""
        self.stopped = True
        self._process.kill()

    def stop(self) -> None:
        self.release()
        self._process.wait()
        self._control.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
        supervisor.forget(self)


class Forked:
    """A step of a fork server, with what a supervisor uses of `subprocess.Popen`."""

    def __init__(self, channel: socket.socket, output: int) -> None:
        self.stdin = _Lead(channel)
        self.stdout = open(output, errors="replace", buffering=1)   # noqa: SIM115
        self.returncode: int | None = None
        self._channel = channel
        self._guard = threading.Lock()   # one thread reads the channel, others wait for what it reads
        self._group: int | None = None

    @property
    def pid(self) -> int:
        """Its process group. Raises ProcessLookupError where the server was gone before it began."""
        if self._group is None:
            raise ProcessLookupError
        return self._group

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status; -SIGKILL where its supervisor was killed. Raises subprocess.TimeoutExpired."""
        if not self._guard.acquire(timeout=-1 if timeout is None else timeout):
            raise subprocess.TimeoutExpired("a step", timeout or 0)
        try:
            self._channel.settimeout(timeout)
            if self.returncode is None and self._group is None:
                self._group = self._number()
            if self.returncode is None:
                status = self._number()
                self.returncode = -signal.SIGKILL if status is None else status
        except (TimeoutError, BlockingIOError):
            raise subprocess.TimeoutExpired("a step", timeout or 0) from None
        finally:
            self._guard.release()
        return self.returncode

    def _number(self) -> int | None:
        """The next number from the supervisor, None once it is gone. It writes each in one piece."""
        try:
            said = self._channel.recv(NUMBER.size)
        except ConnectionError:
            return None
        return NUMBER.unpack(said)[0] if said else None


class _Lead:
    """The end of a channel that keeps a step alive, as the pipe to a supervisor's standard input does."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def close(self) -> None:
        self._channel.shutdown(socket.SHUT_WR)   # what the supervisor says last can still be read


def _read_early(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if not name.startswith(READ_LATE)}


# The script's part.

def _serve(control: socket.socket, libraries: Sequence[str]) -> Callable[[], Any] | None:
    """Fork until the caller is gone, which gives None. Also returns in each step, with what it has to call."""
    for name in libraries:
        with suppress(Exception):   # the step that needs it will say so
            importlib.import_module(name)
    gc.collect()
    gc.freeze()   # a collection in a step would write to every object, and so copy all of this memory
    control.sendall(READY)
    while True:
        size, descriptors, _, _ = socket.recv_fds(control, NUMBER.size, 3)
        if not size:
            return None
        request = b""
        while len(request) < NUMBER.unpack(size)[0]:
            if not (piece := control.recv(NUMBER.unpack(size)[0] - len(request))):
                return None
            request += piece
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            control.close()
            return _step(*json.loads(request), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _step(command: list[str], cwd: str, env: dict[str, str], channel: int, out: int, err: int) -> Callable[[], Any]:
    """Lead a process group and supervise a step in it. Returns in the step alone, with what it has to call."""
    supervisor.unmoved_by_signals()
    os.setsid()
    os.write(channel, NUMBER.pack(os.getpid()))
    if step := os.fork():
        os.close(out)
        os.close(err)
        status = supervisor.supervise(lambda: os.waitstatus_to_exitcode(os.waitpid(step, 0)[1]), channel)
        os.write(channel, NUMBER.pack(status))
        os._exit(0)
    for number in supervisor.ENDING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for descriptor in (channel, out, err):
        os.close(descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    entry, *sys.argv = command
    return pkgutil.resolve_name(entry)   # type: ignore[no-any-return]


def _status(run: Callable[[], Any]) -> int:
    """Call `run`; the exit status that the interpreter would end with."""
    try:
        code = run()
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def _leave(status: list[int]) -> None:
    """End a step once its threads and all exit handlers have ended, without taking its modules apart.

    That would write to every object of the libraries, and so copy their memory: it took a small step a second.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status[-1])


if __name__ == "__main__":
    _statuses = [1]   # of what ends before it has begun
    atexit.register(_leave, _statuses)   # before any library's, and so after it
    _control = socket.socket(fileno=os.dup(0))
    _null = os.open(os.devnull, os.O_RDWR)
    for _stream in (0, 1, 2):   # Python has opened them by now, and takes both outputs for pipes, as a step's are
        os.dup2(_null, _stream)
    os.close(_null)
    if (_run := _serve(_control, sys.argv[1:])) is not None:
        _statuses.append(_status(_run))
