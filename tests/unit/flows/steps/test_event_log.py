"""The ledger only grows, whoever writes and however they end, and every entry can be read by people."""

import json
import os
import re
import resource
import signal
import sys
from pathlib import Path
from subprocess import Popen

import pytest

from flows.steps import event_log
from moa.core.errors import ArtifactError
from moa.core.paths import Workspace
from moa.core.progress import STAMP_LINES, Screen


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def test_entries_are_numbered_and_come_back(workspace: Workspace) -> None:
    assert event_log.read(workspace) == []
    first = event_log.append(workspace, "arrived", domain="law", rows=3)
    second = event_log.append(workspace, "skipped", reason="Two\nlines, Zürich", path=Path("a"))
    event_log.append(workspace, "arrived", domain="tax", rows=4)
    assert (first["n"], second["n"], first["rows"], second["path"]) == (1, 2, 3, "a")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first["at"])
    assert event_log.read(workspace)[:2] == [first, second]
    assert [entry["n"] for entry in event_log.read(workspace, last=2)] == [2, 3]
    assert [entry["n"] for entry in event_log.read(workspace, last=1, kinds=["arrived"])] == [3]
    assert event_log.read(workspace, last=0) == [] == event_log.read(workspace, kinds=[])
    assert len(workspace.event_log.read_bytes().splitlines()) == 3


@pytest.mark.parametrize("cut", [1, 10, 30, -1])
def test_a_torn_line_breaks_neither_reading_nor_the_next_append(workspace: Workspace, cut: int) -> None:
    event_log.append(workspace, "up", pid=1)
    whole = workspace.event_log.read_bytes()
    event_log.append(workspace, "skipped", reason="übel")
    line = workspace.event_log.read_bytes()[len(whole):]
    torn = line[:cut]   # -1: only the end of the line is missing, so the entry is whole
    workspace.event_log.write_bytes(whole + torn)
    kept = 2 if cut == -1 else 1
    assert len(event_log.read(workspace)) == kept
    assert event_log.append(workspace, "down", pid=1)["n"] == kept + 1
    assert [entry["n"] for entry in event_log.read(workspace)] == list(range(1, kept + 2))
    assert torn in workspace.event_log.read_bytes()   # nothing was taken away


def test_lines_that_are_no_entries_are_passed_over(workspace: Workspace) -> None:
    event_log.append(workspace, "up", pid=1)
    with workspace.event_log.open("ab") as file:
        file.write(b'[]\n{"n": "x"}\n\xff\xfe\n{"n": 7}\n')
    assert [entry["n"] for entry in event_log.read(workspace)] == [1]
    assert event_log.append(workspace, "down", pid=1)["n"] == 2


WRITER = """
import sys
from pathlib import Path
from flows.steps import event_log
from moa.core.paths import Workspace
from moa.core.progress import STAMP_LINES, Screen
for number in range(int(sys.argv[2])):
    event_log.append(Workspace(Path(sys.argv[1])), "skipped", reason="x" * 200, number=number)
    print(number, flush=True)
"""


def test_several_writers_and_one_that_is_killed(workspace: Workspace) -> None:
    def writer(count: int) -> Popen[bytes]:
        return Popen([sys.executable, "-c", WRITER, str(workspace.root), str(count)], stdout=-1)

    writers = [writer(20), writer(20)]
    victim = writer(100_000)
    assert victim.stdout is not None
    for _ in range(20):
        said = victim.stdout.readline()
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    rest = victim.stdout.read().splitlines()
    victim.stdout.close()
    for each in writers:
        each.communicate()
        assert each.returncode == 0
    last = event_log.append(workspace, "down", pid=1)
    entries = event_log.read(workspace)
    promised = 40 + len(rest) + int(said) + 1
    assert [entry["n"] for entry in entries] == list(range(1, last["n"] + 1))
    assert len(entries) - 1 in (promised, promised + 1)   # it may have been killed before it could say so


def test_a_full_disk_leaves_no_half_a_line(workspace: Workspace) -> None:
    event_log.append(workspace, "up", pid=1)
    before = workspace.event_log.read_bytes()
    child = os.fork()
    if child == 0:   # the operating system refuses what goes beyond
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, len(before) + 50))
            try:
                event_log.append(workspace, "skipped", reason="x" * 100)
            except ArtifactError as error:
                status = 0 if str(error) == ("ledger.jsonl cannot be written: File too large; mend that and run the "
                                             "command again.") else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert workspace.event_log.read_bytes() == before


# For people.

def test_every_kind_has_a_meaning_and_a_sentence() -> None:
    assert event_log.KINDS.keys() == event_log.SENTENCES.keys()
    for kind in event_log.KINDS:
        assert "{" not in event_log.sentence({"n": 1, "at": "", "kind": kind})


@pytest.mark.parametrize(("kind", "facts", "sentence"), [
    ("arrived", {"domain": "law", "rows": 40, "files": ["a.jsonl", "b.csv"], "new": True},
     "40 rows of law in a.jsonl, b.csv (new: yes)"),
    ("arrived", {"domain": "law", "files": [{"name": "a.jsonl", "digest": "0" * 64}], "new": False}, "law in a.jsonl"),
    ("rejected", {"domain": "law", "file": "a.jsonl", "reason": "write {column} [twice]"},
     "a.jsonl of law: write {column} [twice]"),
    ("start-chosen", {"domain": "tax", "parent": None, "reason": None}, "tax begins from none"),
    ("start-chosen", {"domain": "tax", "parent": "law", "reason": "it saves a third"},
     "tax begins from law: it saves a third"),
    ("trained", {"domains": ["a", "b"], "seconds": 12.3456}, "a, b in 12.3 s"),
    ("released", {"version": 4, "seconds": 1234.56, "scores": {"a": 0.5}}, "version 4 after 1235 s"),
    ("taken-over", {"pid": 7, "since": "noon"}, "from a run with pid 7 since noon"),
    ("invented", {"what": "a\nthing", "none": None}, "what: a thing"),
    ("invented", {}, ""),
])
def test_sentences(kind: str, facts: dict[str, object], sentence: str) -> None:
    assert event_log.sentence({"n": 1, "at": "2026-01-02T03:04:05+00:00", "kind": kind, **facts}) == sentence


def test_flows_of_moa_up_print_what_happens(workspace: Workspace, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    event_log.append(workspace, "released", version=1)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(STAMP_LINES, "1")
    event_log.append(workspace, "released", version=2)
    event_log.append(workspace, "gate", version=2, verdict="pass")   # `stage_order` prints a line of its own
    Screen().say("gate PASSED version 2: better: math")
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d  "
    assert re.fullmatch(f"{stamp}released +version 2\n{stamp}gate PASSED version 2: better: math\n",
                        capsys.readouterr().err)


def test_one_line_for_each_entry(workspace: Workspace) -> None:
    assert event_log.text([]) == "Nothing has happened yet."
    for number in range(10):
        event_log.append(workspace, "drift" if number % 2 else "start-chosen", domain="law", reason="a\nb")
    lines = event_log.text(event_log.read(workspace)).splitlines()
    assert len(lines) == 10 and re.match(r" 1  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d  start-chosen  law begins", lines[0])
    assert json.loads(workspace.event_log.read_text().splitlines()[0])["reason"] == "a\nb"
