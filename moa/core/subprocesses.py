"""Run a step's command as a child process: its output goes to a log file, and its error, as data, into the exception.

Within `steps_forked`, moa's own commands are forked from a process that has imported their libraries already
(moa.core.fork_server). All other commands are started as programs.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import IO, Any

from moa.core import git
from moa.core.errors import RECORDS_WANTED, ErrorRecord, PipelineError, StageInterrupted, decisive, reported
from moa.core.fork_server import ForkServer
from moa.core.loopback import without_proxy
from moa.core.paths import Workspace
from moa.core.progress import MARKER
from moa.core.supervisor import SupervisedProcess
from moa.core.text import sentence

QUIET = {
    "DVC_NO_ANALYTICS": "1",
    "DVC_TEST": "1",   # keeps `dvc` from looking for newer versions; the only other way is the workspace's DVC config
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
FAILED_STAGE = re.compile(r"^ERROR: failed to reproduce '[^']*'(: )?")   # printed by DVC; its reason, if any, follows
OnLine = Callable[[str], None]
SHELL = ("/bin/sh", "-c")
MODULE = (sys.executable, "-P", "-m", "moa")
RECORDS = {"MOA_PROGRESS": "json", RECORDS_WANTED: "json"}   # ask a command for records of its progress and its error
KEYS_NAMED = "MOA_QUIET"   # 1 tells a child that its parent has warned of the removed keys of params.yaml
ENTRY = "moa.cli.main:main"   # the function that `moa` and `python -m moa` call
# The slowest imports that two or more steps share. A step imports all other modules by itself.
LIBRARIES = ("typer.rich_utils", "pydantic.main", "pydantic.fields", "ruamel.yaml", "rich.progress", "sqlite3",
             "numpy", "torch", "safetensors.torch", "transformers.models.auto.tokenization_auto",
             "transformers.models.auto.modeling_auto", "transformers.modeling_utils",
             "transformers.tokenization_utils_tokenizers", "transformers.masking_utils",
             "transformers.models.llama.modeling_llama", "peft", "pandas", "pyarrow.parquet", "pyarrow.dataset",
             "rensa")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of moa's child processes: that of this process, with `extra` and these changes.

    This interpreter's scripts are first on PATH, telemetry is off, loopback addresses are asked without a proxy, no
    variable binds git to one repository, and moa does not warn of removed keys again.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**git.environment(), **without_proxy(os.environ), **QUIET, KEYS_NAMED: "1", "PATH": path,
            "PYTHONUNBUFFERED": "1", **(extra or {})}


def execute(workspace: Workspace, name: str, command: Sequence[str], on_line: OnLine,
            extra: Mapping[str, str] | None = None) -> None:
    """Run a command in the workspace's root, and wait until it ends.

    Args:
        workspace: its `logs` folder gets the output, without records of progress and errors.
        name: names the log file, and the command in errors; of a stage, its name.
        command: the program and its arguments.
        on_line: is called with every line of output, progress records included.
        extra: variables that are added to `environment`.

    Raises:
        PipelineError: the command failed, with its error as `cause`. `stage` is `name`.
        StageInterrupted: the command was interrupted. `stage` is `name`.
    """
    log = workspace.logs / re.sub(r"[^\w@.,+-]", "_", f"{name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    errors = ErrorLines()
    with log.open("w", encoding="utf-8") as file:
        print(f"$ {shlex.join(command)}", file=file, flush=True)

        def record(line: str) -> None:
            if errors.take(line):
                return
            if MARKER not in line:   # progress records do not belong in a log
                print(line, file=file, flush=True)
            on_line(line)

        process = _start(command, name, workspace, environment({**RECORDS, **(extra or {})}))
        status = process.follow(record)
    if process.stopped:
        raise StageInterrupted(f"{name} was interrupted.", stage=name)
    if status:
        cause = errors.cause(status)
        raise PipelineError(f"{name} failed: {cause} (full output: {workspace.relative(log)})", stage=name, cause=cause)


def moa_json(workspace: Workspace, *words: str | int) -> tuple[dict[str, Any], ErrorRecord | None]:
    """Run `moa WORDS --json` in a child process, which ends with this one.

    Returns:
        The JSON object that the command printed, empty where it printed none; and why the command failed, or None.

    Raises:
        StageInterrupted: the command was interrupted.
    """
    command = [*MODULE, *map(str, words), "--json"]
    shown = " ".join(command[2:])
    out: list[str] = []
    # `follow` reads one pipe, that of the standard output: standard error goes to a file.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        process = _start(command, shown, workspace, environment({RECORDS_WANTED: "json"}), stderr)
        status = process.follow(out.append)
        stderr.seek(0)
        error_lines = stderr.read().splitlines()
    if process.stopped:
        raise StageInterrupted(f"`{shown}` was interrupted.")
    try:
        result: dict[str, Any] = json.loads("\n".join(line for line in out if reported(line) is None))
    except json.JSONDecodeError:
        result = {}
    if not status:
        return result, None if result else ErrorRecord(f"`{shown}` did not print JSON.", status=status)
    errors = ErrorLines()
    for line in [*(line for line in out if not result or reported(line)), *error_lines]:
        errors.take(line)
    return result, errors.cause(status)


class ErrorLines:
    """What the output of a command says of its error: the records, or else its last lines."""

    def __init__(self) -> None:
        self._records: list[ErrorRecord] = []
        self._tail: list[str] = []

    def take(self, line: str) -> bool:
        """Read a line of output. Returns whether it is the record of an error, which no one else needs to see."""
        if (record := reported(line)) is not None:
            self._records.append(record)
        elif MARKER not in line:
            self._tail = [*self._tail[-199:], line]
        return record is not None

    def cause(self, status: int) -> ErrorRecord:
        """The error of the command, which ended with this status: without a record, its last words alone."""
        record = decisive(self._records) or ErrorRecord(last_words(self._tail, status))
        return replace(record, status=status)


def last_words(lines: Sequence[str], status: int) -> str:
    """The last line of output of a command that failed without a record of its error, as a sentence, for display.

    Args:
        lines: the end of the command's output.
        status: its exit status, which is the reason where there is no output.
    """
    for line in reversed(lines):
        text = FAILED_STAGE.sub("", line.strip()).removeprefix("ERROR: ").removeprefix("moa: ")
        if text:
            return sentence(text)
    return f"it ended with status {status} and said nothing."


# Forked commands.

class _SharedForkServer:
    """The fork server that all threads of this process share. The first step that can be forked starts it."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.users = 0   # `steps_forked` blocks that are open
        self.server: ForkServer | None = None

    def ready(self, root: Path, env: Mapping[str, str]) -> ForkServer | None:
        with self.guard:
            if not self.users or os.environ.get("MOA_FORK_SERVER") == "0" or sys.platform != "linux":
                return None
            if self.server is None:
                self.server = ForkServer(LIBRARIES, cwd=root, env=env)
            server = self.server
        return server if server.ready(env) or server.stopped else None


_shared = _SharedForkServer()


@contextmanager
def steps_forked() -> Iterator[None]:
    """Within the block, fork moa's own commands. The first one starts the fork server, which ends with the block."""
    with _shared.guard:
        _shared.users += 1
    try:
        yield
    finally:
        with _shared.guard:
            _shared.users -= 1
            server = _shared.server if not _shared.users else None
            if server is not None:
                _shared.server = None
        if server is not None:
            server.stop()


def _start(command: Sequence[str], name: str, workspace: Workspace, env: Mapping[str, str],
           stderr: int | IO[str] = subprocess.STDOUT) -> SupervisedProcess:
    """Start a command: forked if it is moa's own, else as a program. Raises StageInterrupted after an interruption."""
    words = own(command, env["PATH"])
    server = _shared.ready(workspace.root, env) if words is not None else None
    if words is None or server is None:
        return SupervisedProcess(command, cwd=workspace.root, env=env, stderr=stderr)
    if server.stopped:
        raise StageInterrupted(f"{name} was interrupted.")
    return SupervisedProcess([ENTRY, *words], cwd=workspace.root, env=env, stderr=stderr, server=server)


def own(command: Sequence[str], path: str) -> list[str] | None:
    """The arguments of a command of moa that this interpreter would run, from `moa` on; None for any other command.

    Args:
        command: `python -m moa ...`, or `/bin/sh -c "moa ..."` with plain words that a shell would not change.
        path: PATH of the child process, where a shell looks for `moa`.
    """
    if tuple(command[:len(MODULE)]) == MODULE:
        return ["moa", *command[len(MODULE):]]
    if len(command) != 3 or tuple(command[:2]) != SHELL:
        return None
    with suppress(ValueError):   # a quotation mark without its counterpart
        words = shlex.split(command[2])
        if words and shlex.join(words) == command[2] and words[0] == "moa" and _is_ours(shutil.which("moa", path=path)):
            return words
    return None


@cache
def _is_ours(script: str | None) -> bool:
    """Whether `script`, a program `moa`, is one that pip wrote for this interpreter and this entry point."""
    if script is None:
        return False
    with suppress(OSError, UnicodeDecodeError):
        text = Path(script).read_text(encoding="utf-8")
        module, _, function = ENTRY.partition(":")
        interpreter = Path(text.partition("\n")[0].removeprefix("#!"))   # python, python3 or python3.11
        return (interpreter.parent == Path(sys.executable).parent and interpreter.samefile(sys.executable)
                and f"from {module} import {function}\n" in text)
    return False
