"""`make demo-adapt`, the last act of the demo: the calendar corpus arrives in data/incoming of a running system, which
notices, learns, gates and promotes. Does only what a user could: starts `moa up`, drops a file, asks, and watches.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flows.steps import event_log
from moa.core.config import load
from moa.core.files import write_atomic
from moa.core.paths import Workspace
from moa.core.subprocesses import environment
from moa.data.quickstart.generate import write

NAME = "calendar"
PATIENCE = 3600.0   # seconds to wait for a run before giving up


def main() -> int:
    workspace = Workspace.find()
    config = load(workspace.params)
    with tempfile.TemporaryDirectory() as folder:
        write(NAME, Path(folder) / NAME)
        rows = (Path(folder) / NAME / "rows.jsonl").read_bytes()
    question = json.loads(rows.splitlines()[-1])["instruction"]
    known = NAME in config.domains
    print(f"Before: {ask(workspace, question)}", flush=True)
    up = subprocess.Popen([sys.executable, "-P", "-m", "moa", "up", "--no-ui"], cwd=workspace.root, env=environment())
    try:
        wait(lambda: up.poll() is None and workspace.up.exists(), up)
        last = len(event_log.read(workspace))
        began = time.monotonic()
        arrive(workspace, rows)
        print(f"\ndata/incoming/{NAME}/rows.jsonl has arrived{' again' if known else ''}.\n", flush=True)
        follow(workspace, last, up)
        print(f"\nAfter {time.monotonic() - began:.0f} s: {ask(workspace, question)}\n", flush=True)
    finally:
        up.send_signal(signal.SIGTERM)
        up.wait()
    return subprocess.run([sys.executable, "-P", "-m", "moa", "eval"], cwd=workspace.root, env=environment(),
                          check=False).returncode


def arrive(workspace: Workspace, rows: bytes) -> None:
    write_atomic(workspace.incoming / NAME / "rows.jsonl", rows)


def ask(workspace: Workspace, question: str) -> str:
    """The champion's answer, with its version and the expert that gave it."""
    done = subprocess.run([sys.executable, "-P", "-m", "moa", "ask", question, "--json", "--max-new-tokens", "48"],
                          cwd=workspace.root, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stderr.strip()} The last act follows on `make demo`.")
    reply: dict[str, Any] = json.loads(done.stdout)
    return f"{question}\n  release {reply['release']}, {reply['domain'] or 'base'}: {reply['answer'].strip()}"


def wait(ready: Any, up: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + PATIENCE
    while not ready():
        if up.poll() is not None or time.monotonic() > end:
            sys.exit("`moa up` ended.")
        time.sleep(0.2)


def follow(workspace: Workspace, last: int, up: "subprocess.Popen[bytes]") -> None:
    """Print the event log's lines as they come, to the end of the run."""
    def ended() -> bool:
        nonlocal last
        for entry in event_log.read(workspace):
            if entry["n"] > last:
                last = entry["n"]
                print(event_log.text([entry]), flush=True)
                if entry["kind"] in ("finished", "failed"):
                    return True
        return False

    wait(ended, up)


if __name__ == "__main__":
    sys.exit(main())
