"""Prompts kept by a server: bounded, private, without personal data, and never in an answer's way."""

import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.core.paths import Workspace
from moa.serving import prompt_log
from moa.serving.prompt_log import LoggedPrompt, PromptLogger

SOON = 120   # seconds, until a hanging test fails
ALL = ("email", "phone", "card", "account")


@pytest.fixture(scope="module", autouse=True)
def patient() -> Iterator[None]:
    """A server's end lets go of what is not written within seconds; a test wants all of it, on any machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_log, "END_SECONDS", SOON)
        yield


def prompt(text: str, *earlier: str, at: float = 1.0, **named: Any) -> LoggedPrompt:
    roles = ("user", "assistant")
    turns = [*earlier, text]
    messages = [{"role": roles[(len(turns) - 1 - place) % 2], "content": each} for place, each in enumerate(turns)]
    return LoggedPrompt(**{"at": at, "release": 1, "digest": "d", "messages": messages, "cut": False, "domain": "law",
                           "forced": False, "abstained": True, "score": 0.25, "confidence": 0.5} | named)


def keep(workspace: Workspace, prompts: list[LoggedPrompt], megabytes: float = 1,
         redact: tuple[str, ...] = ALL) -> PromptLogger:
    """Keep these and end; waits where a server would let go."""
    keeper = PromptLogger(workspace, megabytes, redact)
    for each in prompts:
        while keeper._queue.full():
            time.sleep(0.001)
        keeper.keep(each)
    keeper.close()
    assert not keeper._thread.is_alive()
    return keeper


def size(workspace: Workspace) -> int:
    return sum(path.stat().st_size for path in prompt_log.segments(prompt_log.folder(workspace)))


@settings(max_examples=30)
@given(st.lists(st.builds(
    prompt, st.text(st.characters(exclude_categories=["Cs"])), at=st.floats(0, 2e9), score=st.none() | st.floats(-9, 9),
    abstained=st.booleans(), forced=st.booleans(), release=st.integers(1, 3)), max_size=8))
def test_what_is_kept_is_read_again(tmp_path_factory: pytest.TempPathFactory, prompts: list[LoggedPrompt]) -> None:
    workspace = Workspace(tmp_path_factory.mktemp("w"))
    keep(workspace, prompts, redact=())
    assert list(prompt_log.read(workspace)) == prompts
    assert list(prompt_log.read(workspace, release=2)) == [each for each in prompts if each.release == 2]
    assert list(prompt_log.read(workspace, since=1e9)) == [each for each in prompts if each.at >= 1e9]


def test_nothing_is_written_before_the_first_prompt_and_then_only_for_the_owner(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    keep(workspace, [])
    assert not prompt_log.folder(workspace).exists() and list(prompt_log.read(workspace)) == []
    before = os.umask(0)
    try:
        keep(workspace, [prompt("a")])
    finally:
        os.umask(before)
    (segment,) = prompt_log.segments(prompt_log.folder(workspace))
    assert stat.S_IMODE(segment.stat().st_mode) == 0o600
    assert stat.S_IMODE(segment.parent.stat().st_mode) == 0o700


def test_personal_data_never_reaches_the_disk(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    keep(workspace, [prompt("write to jo@example.org or tel: 030 1234567", "I am ann@example.org", "who?")])
    (kept,) = prompt_log.read(workspace)
    assert kept.text == "write to [EMAIL] or tel: [PHONE]" and kept.messages[0]["content"] == "I am [EMAIL]"
    assert all(b"example.org" not in path.read_bytes() for path in prompt_log.segments(prompt_log.folder(workspace)))


def test_a_long_prompt_keeps_its_end_and_hides_an_address_that_the_cut_goes_through(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    tail = "x " * (prompt_log.CHARACTERS // 2 - 2)
    keep(workspace, [prompt(f"jo@example.org {tail}"), prompt("b", "q" * prompt_log.CHARACTERS, "a"), prompt("short")])
    long, turns, short = prompt_log.read(workspace)
    assert long.cut and len(long.text) == prompt_log.CHARACTERS and long.text.endswith(tail)
    assert "example" not in long.text
    assert turns.cut and turns.messages[0]["role"] == "user" and turns.text == "b"
    assert sum(len(one["content"]) for one in turns.messages) <= prompt_log.CHARACTERS
    assert not short.cut


@pytest.mark.parametrize("megabytes", [0.02, 0.1])
def test_the_oldest_make_room_and_the_bound_holds(tmp_path: Path, megabytes: float) -> None:
    workspace = Workspace(tmp_path)
    bound, largest = megabytes * prompt_log.MEGABYTE, 0
    for start in range(0, 2000, 100):
        keep(workspace, [prompt(f"{number} {'y' * (number % 300)}", at=number) for number in range(start, start + 100)],
             megabytes)
        largest = max(largest, size(workspace))
    assert bound / 2 < largest <= bound * (1 + 1 / prompt_log.SEGMENTS)
    times = [int(kept.at) for kept in prompt_log.read(workspace)]
    assert times == list(range(times[0], 2000)) and times[0] > 0


def test_two_servers_write_side_by_side(tmp_path: Path) -> None:
    script = ("import sys; from pathlib import Path; from moa.serving import prompt_log\n"
              "from moa.serving.prompt_log import *\n"
              f"prompt_log.END_SECONDS = {SOON}; w = Workspace(Path(sys.argv[1]))\n"
              "keeper = PromptLogger(w, 1, ())\n"
              "for n in range(200): keeper.keep(LoggedPrompt(at=n, release=1, digest='d', cut=False, "
              "domain=sys.argv[2], "
              "forced=True, messages=[{'role': 'user', 'content': str(n)}]))\n"
              "keeper.close(); assert not keeper.lost")
    running = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), name]) for name in ("one", "two")]
    assert [each.wait(SOON) for each in running] == [0, 0]
    found = list(prompt_log.read(Workspace(tmp_path)))
    for name in ("one", "two"):
        assert [kept.text for kept in found if kept.domain == name] == [str(n) for n in range(200)]


def test_torn_and_strange_lines_are_passed_over(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    keep(workspace, [prompt("a"), prompt("b")])
    (segment,) = prompt_log.segments(prompt_log.folder(workspace))
    whole = segment.read_bytes()
    for torn in (whole[:-1], whole[:-20], whole + b'{"at": 1, "more": 2}\n[1]\n\xff\n\n'):
        segment.write_bytes(torn)
        expected = ["a", "b"][:1 + (torn != whole[:-20])]
        assert [kept.text for kept in prompt_log.read(workspace)] == expected
    keep(workspace, [prompt("c")])   # a new server begins a file of its own
    assert [kept.text for kept in prompt_log.read(workspace)] == ["a", "b", "c"]


def test_a_killed_server_leaves_what_it_wrote(tmp_path: Path) -> None:
    script = ("import os, signal, sys, time; from pathlib import Path; from moa.serving.prompt_log import *\n"
              "w = Workspace(Path(sys.argv[1])); keeper = PromptLogger(w, 1, ())\n"
              "keeper.keep(LoggedPrompt(at=1, release=1, digest='d', cut=False, domain='law', forced=True, "
              "messages=[{'role': 'user', 'content': 'hello'}]))\n"
              "while not list(read(w)): time.sleep(0.01)\n"
              "os.kill(os.getpid(), signal.SIGKILL)")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, timeout=SOON)
    assert done.returncode == -9
    assert [kept.text for kept in prompt_log.read(Workspace(tmp_path))] == ["hello"]


def test_a_disk_that_refuses_costs_prompts_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    workspace = Workspace(tmp_path)
    workspace.local.mkdir()
    prompt_log.folder(workspace).write_text("in the way")
    keeper = keep(workspace, [prompt("a"), prompt("b")])
    assert keeper.lost == 2
    assert capfd.readouterr().err.count("prompts cannot be kept") == 1
    prompt_log.folder(workspace).unlink()
    assert keep(workspace, [prompt("c")]).lost == 0
    assert [kept.text for kept in prompt_log.read(workspace)] == ["c"]


def test_whoever_answers_never_waits(tmp_path: Path) -> None:
    """The writer is held up; prompts wait as far as there is room, and the others are counted."""
    keeper = PromptLogger(Workspace(tmp_path), 1, ())
    held, go_on = threading.Event(), threading.Event()
    add = keeper._segments.add

    def slow(line: bytes) -> None:
        held.set()
        assert go_on.wait(SOON)
        add(line)

    keeper._segments.add = slow   # type: ignore[method-assign]
    keeper.keep(prompt("0"))
    assert held.wait(SOON)
    for number in range(1, prompt_log.WAITING + 6):
        keeper.keep(prompt(str(number)))
    assert keeper.lost == 5
    go_on.set()
    keeper.close()
    expected = [str(number) for number in range(prompt_log.WAITING + 1)]
    assert [kept.text for kept in prompt_log.read(Workspace(tmp_path))] == expected


def test_deleting_the_folder_while_it_is_written_begins_anew(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    keeper = PromptLogger(workspace, 1, ())
    keeper.keep(prompt("a"))
    while not list(prompt_log.read(workspace)):
        time.sleep(0.001)
    for segment in prompt_log.segments(prompt_log.folder(workspace)):
        segment.unlink()
    prompt_log.folder(workspace).rmdir()
    keeper.keep(replace(prompt("b"), at=2.0))
    keeper.close()
    assert [kept.text for kept in prompt_log.read(workspace)] == ["b"] and not keeper.lost
    (segment,) = prompt_log.segments(prompt_log.folder(workspace))
    assert json.loads(segment.read_text())["at"] == 2.0
