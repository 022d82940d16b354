"""Run a step's command: output to a log file of its own, its last words into the error. Knows nothing of DVC."""

import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moa.core import git
from moa.core.errors import PipelineError
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


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of our children: this interpreter's scripts first on PATH, no telemetry, no proxy before loopback,
    no variable that ties git to another repository than theirs, nothing about keys that we name ourselves."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**git.environment(), **without_proxy(os.environ), **QUIET, "MOA_QUIET": "1", "PATH": path,
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

        leash = SupervisedProcess(command, cwd=workspace.root,
                                  env=environment({"MOA_PROGRESS": "json", **(extra or {})}))
        status = leash.follow(keep)
    if leash.stopped:
        raise PipelineError(f"{name} was interrupted.")
    if status:
        raise PipelineError(f"{name} failed: {last_error(tail, status)} (full output: {workspace.relative(log)})")


def moa_json(workspace: Workspace, *words: str | int) -> tuple[dict[str, Any], str | None]:
    """What `moa WORDS --json` prints, in a process of its own, empty where that is no JSON; and why it failed, or None.

    It ends when we do. Raises PipelineError when it was interrupted.
    """
    command = [sys.executable, "-P", "-m", "moa", *map(str, words), "--json"]
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        out: list[str] = []
        # A leash has one pipe: what is no JSON goes to a file.
        leash = SupervisedProcess(["/bin/sh", "-c", 'exec "$@" 2>"$0"', str(said), *command], cwd=workspace.root,
                                  env=environment())
        status = leash.follow(out.append)
        words_of_error = said.read_text(encoding="utf-8", errors="replace").splitlines() if said.exists() else []
    if leash.stopped:
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
