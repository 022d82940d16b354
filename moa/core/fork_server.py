"""Fork steps from a process that has already imported their libraries.

Importing torch and transformers takes a step three seconds or more, which is most of the time of a small step. Here one
process, the fork server (this same file, run as a script), imports them once and forks a step for each request. It does
nothing else: it runs no step itself, starts no thread, uses no GPU, and imports no module of moa that a step uses, so
that a step runs the code that is on the disk when the step starts.

    the caller --- control: a request for each step, with its descriptors ---> the fork server
                                                                                | fork
    the caller <-- channel of one step: its process group, its status ------ supervisor, leader of a process group
                   closing it ends the group (moa.core.supervisor)              | fork
    the caller <-- output ---------------------------------------------------- the step

The fork server ends when its control socket is closed, so neither it nor a step outlives the caller.
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
# Variables with these prefixes are read while a step runs. Libraries may have read any other variable when they were
# imported, so a step is forked only where its other variables equal the fork server's.
READ_LATE = ("MOA_", "DVC_", "MLFLOW_", "PREFECT_")


class ForkServer:
    """The caller's handle of a fork server. It imports the libraries while the caller goes on."""

    def __init__(self, libraries: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> None:
        """Start the process.

        Args:
            libraries: names of the modules to import; one that cannot be imported is left to the step that needs it.
            cwd: folder in which the libraries are imported.
            env: environment in which the libraries are imported.
        """
        self.stopped = False
        self._imported: bool | None = None
        self._guard = threading.Lock()
        self._environment = _import_environment(env)
        self._control, server_end = socket.socketpair()
        with server_end:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, *libraries], cwd=cwd, env=dict(env), stdin=server_end.fileno(),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        supervisor.register(self)

    def ready(self, env: Mapping[str, str]) -> bool:
        """Wait until the libraries are imported. Whether a step with the environment `env` can be forked then."""
        with self._guard:
            if self._imported is None:
                with suppress(OSError):
                    self._imported = self._control.recv(1) == READY
        running = bool(self._imported) and self._process.poll() is None
        return running and _import_environment(env) == self._environment

    def fork(self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str],
             stderr: int | IO[str] = subprocess.STDOUT) -> "Forked":
        """Start a step that calls an entry point. Where the fork server is gone, the step ends at once as if killed.

        Args:
            command: an entry point, such as `moa.cli.main:main`, followed by the step's `sys.argv`.
            cwd: the step's working folder.
            env: the step's whole environment, which `ready` has accepted.
            stderr: subprocess.STDOUT, or a file.
        """
        read, write = os.pipe()
        channel, supervisor_end = socket.socketpair()
        with supervisor_end:
            request = json.dumps([list(command), str(cwd), dict(env)]).encode()
            err = write if isinstance(stderr, int) else stderr.fileno()
            try:
                with self._guard:
                    socket.send_fds(self._control, [NUMBER.pack(len(request))],
                                    [supervisor_end.fileno(), write, err])
                    self._control.sendall(request)
            except OSError:
                pass   # The fork server is gone: `Forked` finds the channel closed without an exit status.
            finally:
                os.close(write)
        return Forked(channel, read)

    def release(self) -> None:
        """Kill the fork server, without waiting for its end. The steps that it forked go on under their supervisors."""
        self.stopped = True
        self._process.kill()

    def stop(self) -> None:
        """Kill the fork server, wait for its end and close its descriptors."""
        self.release()
        self._process.wait()
        self._control.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
        supervisor.forget(self)


class Forked:
    """A forked step, with the part of the interface of `subprocess.Popen` that `SupervisedProcess` uses."""

    def __init__(self, channel: socket.socket, output: int) -> None:
        self.stdin = _ChannelInput(channel)
        self.stdout = open(output, errors="replace", buffering=1)   # noqa: SIM115
        self.returncode: int | None = None
        self._channel = channel
        self._guard = threading.Lock()   # one thread reads the channel, and the others wait for its result
        self._group: int | None = None

    @property
    def pid(self) -> int:
        """The step's process group, known after `poll` or `wait`. Raises ProcessLookupError while it is not known."""
        if self._group is None:
            raise ProcessLookupError
        return self._group

    def poll(self) -> int | None:
        """The step's exit status; None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The step's exit status; -SIGKILL where its supervisor was killed. Raises subprocess.TimeoutExpired."""
        if not self._guard.acquire(timeout=-1 if timeout is None else timeout):
            raise subprocess.TimeoutExpired("a step", timeout or 0)
        try:
            self._channel.settimeout(timeout)
            if self.returncode is None and self._group is None:
                self._group = self._receive_number()
            if self.returncode is None:
                status = self._receive_number()
                self.returncode = -signal.SIGKILL if status is None else status
        except (TimeoutError, BlockingIOError):
            raise subprocess.TimeoutExpired("a step", timeout or 0) from None
        finally:
            self._guard.release()
        return self.returncode

    def _receive_number(self) -> int | None:
        """The supervisor's next number, which arrives in one piece; None once the supervisor is gone."""
        try:
            message = self._channel.recv(NUMBER.size)
        except ConnectionError:
            return None
        return NUMBER.unpack(message)[0] if message else None


class _ChannelInput:
    """Stands in for the pipe to a supervisor's standard input: closing it ends the step."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def close(self) -> None:
        self._channel.shutdown(socket.SHUT_WR)   # the exit status can still be received


def _import_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of `env` that a library may read when it is imported."""
    return {name: value for name, value in env.items() if not name.startswith(READ_LATE)}


# What the script runs: the fork server, a step's supervisor, and the step.

def _serve(control: socket.socket, libraries: Sequence[str]) -> Callable[[], Any] | None:
    """Fork a step for each request, until the caller is gone.

    Returns None in the fork server, and in each step the function that the step calls.
    """
    for name in libraries:
        with suppress(Exception):   # the step that needs the library reports the error
            importlib.import_module(name)
    gc.collect()
    gc.freeze()   # a collection in a step would write to every object, and so copy these pages of memory
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
    """Lead a process group and supervise a step in it. Returns in the step alone: the function that it calls."""
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
    """Call `run` and return the exit status that the interpreter would end with."""
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
    """Exit handler, called after all others, that ends a step without finalizing the interpreter.

    Finalizing writes to every object of the libraries, and so copies their pages of memory: it took a small step a
    second.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status[-1])


if __name__ == "__main__":
    _statuses = [1]   # the status of a process that ends before its step is called
    atexit.register(_leave, _statuses)   # registered before any library's exit handler, and so called after it
    _control = socket.socket(fileno=os.dup(0))
    _null = os.open(os.devnull, os.O_RDWR)
    for _stream in (0, 1, 2):   # sys.stdout and sys.stderr keep the buffering for pipes, which a step's outputs are
        os.dup2(_null, _stream)
    os.close(_null)
    if (_run := _serve(_control, sys.argv[1:])) is not None:
        _statuses.append(_status(_run))
