"""What the record of the lock's holder says, and the lock itself."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from moa.core.files import read_json, write_json
from moa.core.paths import Workspace
from moa.workspace.lock import LockHolder


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path)
    made.local.mkdir()
    return made


def outdated(workspace: Workspace) -> None:
    """The holder's record was renewed for the last time a while ago."""
    path = LockHolder.of(workspace).path
    write_json(path, {**read_json(path), "until": time.time() - 1})


def test_a_lock_that_was_never_taken_or_was_released_is_free(workspace: Workspace) -> None:
    holder = LockHolder.of(workspace)
    assert holder.state() == "free"
    with FileLock(workspace.lock), holder.seen():
        assert holder.state() == "at work"
    assert holder.state() == "free"


def test_a_holder_that_gives_no_sign_is_silent_as_long_as_it_holds_the_lock(workspace: Workspace) -> None:
    holder = LockHolder.of(workspace)
    with holder.seen():
        with FileLock(workspace.lock):
            outdated(workspace)
            assert holder.state() == "silent"
        assert holder.state() == "killed"   # a process that is no longer the holder has its number


def test_a_holder_that_was_killed(workspace: Workspace) -> None:
    script = ("import os, signal, sys; from pathlib import Path; from filelock import FileLock; "
              "from moa.core.paths import Workspace; from moa.workspace.lock import LockHolder\n"
              "workspace = Workspace(Path(sys.argv[1]))\n"
              "with FileLock(workspace.lock), LockHolder.of(workspace).seen(): os.kill(os.getpid(), signal.SIGKILL)")
    subprocess.run([sys.executable, "-c", script, workspace.root], check=False)
    holder = LockHolder.of(workspace)
    record = holder.read()
    assert record is not None and record["pid"] != os.getpid()
    assert holder.state() == "killed" and holder.read() == record   # nothing is changed
