"""Run a step's command: output to a log file of its own, its last words into the error.

While a workspace is held, commands that are moa's own are forked from a process that has imported what they need (see
moa.core.fork_server); all others are started by a shell.
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
from functools import cache
from pathlib import Path
from typing import IO, Any

from moa.core import git
from moa.core.errors import PipelineError
from moa.core.fork_server import ForkServer
from moa.core.loopback import without_proxy
from moa.core.paths import Workspace
from moa.core.progress import MARKER
from moa.core.supervisor import SupervisedProcess
from moa.core.text import sentence

QUIET = {
    "DVC_NO_ANALYTICS": "1",
    "DVC_TEST": "1",   # the only way, but for the workspace's own config, to keep `dvc` from asking for newer versions
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
FAILED_STAGE = re.compile(r"^ERROR: failed to reproduce '[^']*'(: )?")   # DVC; its reason, if any, stands behind
OnLine = Callable[[str], None]
SHELL = ("/bin/sh", "-c")
MODULE = (sys.executable, "-P", "-m", "moa")
KEYS_NAMED = "MOA_QUIET"   # 1 tells a child that its parent has named the removed keys of params.yaml
ENTRY = "moa.cli.main:main"   # what both `moa` and `python -m moa` call
# What two steps or more import, and what takes them longest. A step imports what is missing here by itself.
LIBRARIES = ("typer.rich_utils", "pydantic.main", "pydantic.fields", "ruamel.yaml", "rich.progress", "sqlite3",
             "numpy", "torch", "safetensors.torch", "transformers.models.auto.tokenization_auto",
             "transformers.models.auto.modeling_auto", "transformers.modeling_utils",
             "transformers.tokenization_utils_tokenizers", "transformers.masking_utils",
             "transformers.models.llama.modeling_llama", "peft", "pandas", "pyarrow.parquet", "pyarrow.dataset",
             "rensa")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of our children: this interpreter's scripts first on PATH, no telemetry, no proxy before loopback,
    no variable that ties git to another repository than theirs, nothing about keys that we name ourselves."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**git.environment(), **without_proxy(os.environ), **QUIET, KEYS_NAMED: "1", "PATH": path,
            "PYTHONUNBUFFERED": "1", **(extra or {})}


def execute(workspace: Workspace, name: str, command: Sequence[str], on_line: OnLine,
            extra: Mapping[str, str] | None = None) -> None:
    """Run a command in the workspace; `name` is what log file and error call it.

    Every line of output goes to `on_line`. Raises PipelineError with the reason that the command gives.
    """
    log = workspace.logs / re.sub(r"[^\w@.,+-]", "_", f"{name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: list[str] = []
    with log.open("w", encoding="utf-8") as file:
        print(f"$ {shlex.join(command)}", file=file, flush=True)

        def keep(line: str) -> None:
            if MARKER not in line:   # progress has no place in a log
                print(line, file=file, flush=True)
                tail.append(line)
                del tail[:-200]
            on_line(line)

        process = _begun(command, name, workspace, environment({"MOA_PROGRESS": "json", **(extra or {})}))
        status = process.follow(keep)
    if process.stopped:
        raise PipelineError(f"{name} was interrupted.")
    if status:
        raise PipelineError(f"{name} failed: {last_error(tail, status)} (full output: {workspace.relative(log)})")


def moa_json(workspace: Workspace, *words: str | int) -> tuple[dict[str, Any], str | None]:
    """What `moa WORDS --json` prints, in a process of its own, empty where that is no JSON; and why it failed, or None.

    It ends when we do. Raises PipelineError when it was interrupted.
    """
    command = [*MODULE, *map(str, words), "--json"]
    out: list[str] = []
    # A process has one pipe: what is no JSON goes to a file.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = _begun(command, " ".join(command[2:]), workspace, environment(), said)
        status = process.follow(out.append)
        said.seek(0)
        words_of_error = said.read().splitlines()
    if process.stopped:
        raise PipelineError(f"`{' '.join(command[2:])}` was interrupted.")
    try:
        found: dict[str, Any] = json.loads("\n".join(out))
    except json.JSONDecodeError:
        found = {}
    if not status:
        return found, None if found else f"`{' '.join(command[2:])}` did not print JSON."
    return found, last_error(words_of_error if found else out + words_of_error, status)


def last_error(lines: Sequence[str], status: int) -> str:
    """The sentence in which a failed step says why, out of the end of its output."""
    own = [line for line in lines if line.startswith("moa: ")]
    if own:
        return own[-1].removeprefix("moa: ").strip()
    for line in reversed(lines):
        text = FAILED_STAGE.sub("", line.strip()).removeprefix("ERROR: ")
        if text:
            return sentence(text)
    return f"it ended with status {status} and said nothing."


# Commands that are moa's own, forked.

class _Forking:
    """The fork server of this process, which begins with the first step that can use it."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.users = 0
        self.server: ForkServer | None = None

    def ready(self, root: Path, env: Mapping[str, str]) -> ForkServer | None:
        with self.guard:
            if not self.users or os.environ.get("MOA_FORK_SERVER") == "0" or sys.platform != "linux":
                return None
            if self.server is None:
                self.server = ForkServer(LIBRARIES, cwd=root, env=env)
            server = self.server
        return server if server.ready(env) or server.stopped else None


_forking = _Forking()


@contextmanager
def steps_forked() -> Iterator[None]:
    """Within the block, fork what can be forked; the libraries are imported once, if at all, and not kept beyond it."""
    with _forking.guard:
        _forking.users += 1
    try:
        yield
    finally:
        with _forking.guard:
            _forking.users -= 1
            server = _forking.server if not _forking.users else None
            if server is not None:
                _forking.server = None
        if server is not None:
            server.stop()


def _begun(command: Sequence[str], name: str, workspace: Workspace, env: Mapping[str, str],
           stderr: int | IO[str] = subprocess.STDOUT) -> SupervisedProcess:
    """Start a command: forked if it is moa's own, else as it is. Raises PipelineError after an interruption."""
    words = own(command, env["PATH"])
    server = _forking.ready(workspace.root, env) if words is not None else None
    if words is None or server is None:
        return SupervisedProcess(command, cwd=workspace.root, env=env, stderr=stderr)
    if server.stopped:
        raise PipelineError(f"{name} was interrupted.")
    return SupervisedProcess([ENTRY, *words], cwd=workspace.root, env=env, stderr=stderr, server=server)


def own(command: Sequence[str], path: str) -> list[str] | None:
    """The words of a command of moa that this interpreter runs, `moa` first; None for every other command.

    Of a shell's command only a list of plain words counts, in which no character means anything to a shell.
    """
    if tuple(command[:len(MODULE)]) == MODULE:
        return ["moa", *command[len(MODULE):]]
    if len(command) != 3 or tuple(command[:2]) != SHELL:
        return None
    with suppress(ValueError):   # a quotation that does not end
        words = shlex.split(command[2])
        if words and shlex.join(words) == command[2] and words[0] == "moa" and _is_ours(shutil.which("moa", path=path)):
            return words
    return None


@cache
def _is_ours(script: str | None) -> bool:
    """Whether a program `moa` is this interpreter's and calls the entry point, as pip writes it."""
    if script is None:
        return False
    with suppress(OSError, UnicodeDecodeError):
        text = Path(script).read_text(encoding="utf-8")
        module, _, function = ENTRY.partition(":")
        interpreter = Path(text.partition("\n")[0].removeprefix("#!"))   # python, python3 or python3.11 of one folder
        return (interpreter.parent == Path(sys.executable).parent and interpreter.samefile(sys.executable)
                and f"from {module} import {function}\n" in text)
    return False
