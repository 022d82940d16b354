"""What an adaptation by hand waits for."""

import os
import threading
import time
from pathlib import Path

import pytest

from flows.steps.learning import MOST_WAITS, wait_until_settled
from moa.core.paths import Workspace

SETTLE = 0.2


def arrived(root: Path) -> Path:
    path = root / "data" / "incoming" / "math" / "rows.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("{}\n")
    return path


def test_what_was_just_written_is_waited_for(tmp_path: Path) -> None:
    path = arrived(tmp_path)
    wait_until_settled(Workspace(tmp_path), SETTLE)
    assert time.time() - path.stat().st_mtime >= SETTLE


def test_nothing_is_waited_for_where_nothing_was_just_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.steps.learning.time.sleep", lambda _: pytest.fail("it waits"))
    wait_until_settled(Workspace(tmp_path), SETTLE)
    os.utime(arrived(tmp_path), (1e9, 1e9))
    wait_until_settled(Workspace(tmp_path), SETTLE)


def test_a_file_that_keeps_growing_is_left_to_the_next_run(tmp_path: Path) -> None:
    path, done = arrived(tmp_path), threading.Event()

    def write() -> None:
        while not done.wait(SETTLE / 20):
            path.open("a").write("{}\n")

    writer = threading.Thread(target=write)
    writer.start()
    began = time.monotonic()
    wait_until_settled(Workspace(tmp_path), SETTLE)
    assert time.monotonic() - began >= MOST_WAITS * SETTLE
    done.set()
    writer.join()
