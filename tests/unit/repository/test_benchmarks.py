"""What the benchmarks say of themselves: a claim for each, and a stored result with all that a figure depends on."""

import json
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import REPOSITORY

FOLDER = REPOSITORY / "benchmarks"
# As a benchmark ends: `finish` is called with a folder, so that no result of the checkout is touched.
FINISH = """
import sys
from pathlib import Path
from common import finish, goal
finish("demo", {"loss": 0.5}, [goal("loss", 0.5, 1.0, True), goal("score", 0.1, 0.2, False)], Path(sys.argv[-1]))
"""


@pytest.fixture
def listing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import listing

    return listing


def test_every_benchmark_has_a_claim(listing: Any) -> None:
    finishing = {match[1]: path.stem for path in FOLDER.glob("*.py")
                 if (match := re.search(r'\bfinish\("(\w+)"', path.read_text(encoding="utf-8")))}
    assert all(name == stem for name, stem in finishing.items())
    assert listing.claims((FOLDER / "README.md").read_text(encoding="utf-8")).keys() == finishing.keys()


def test_a_result_is_stored_with_what_it_depends_on(tmp_path: Path, listing: Any) -> None:
    (tmp_path / "demo.py").write_text(FINISH)
    words = ["--rows=4", "--shared", "/somewhere/else/corpora", "--folder=/tmp/made", str(tmp_path / "results")]
    done = subprocess.run([sys.executable, tmp_path / "demo.py", *words], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": f"{FOLDER}:{REPOSITORY}", "HOME": str(tmp_path)}, cwd=REPOSITORY)
    last = json.loads(done.stdout.splitlines()[-1])
    stored = json.loads((tmp_path / "results" / "demo.json").read_text(encoding="utf-8"))
    assert last.keys() == {"benchmark", "figures", "goals"} and last.items() <= stored.items()
    assert stored["command"] == ["demo.py", "--rows=4", "--shared", "corpora", "--folder=made", "results"]
    assert stored["machine"]["cores"] and stored["machine"]["torch"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    assert stored["commit"] == (head.stdout.strip() or None)
    then = datetime.fromisoformat(stored["date"])
    cells = listing.row("demo", tmp_path / "results" / "demo.json", then + timedelta(days=3, hours=2))
    assert cells[1] == "3 days" and cells[4] == "1 of 2 met"
    assert cells[2].rstrip("+") == str(stored["commit"])[:12] and cells[3] == "0"


def test_the_list_names_what_is_missing(tmp_path: Path, listing: Any) -> None:
    readme = "| script | claim |\n|---|---|\n| `one.py` | it is fast |\n| `two.py` | it is small |\n"
    (tmp_path / "two.json").write_text(json.dumps({
        "benchmark": "two", "figures": {}, "goals": [], "date": "2026-01-01T00:00:00+00:00", "commit": "0" * 40,
        "changed": True, "machine": {}, "command": ["two.py"]}))
    lines = listing.listing(readme, tmp_path, datetime(2026, 1, 2, tzinfo=UTC)).splitlines()
    assert lines[1].split() == ["one", "-", "-", "-", "no", "stored", "result"]
    assert lines[2].split() == ["two", "1", "day", "000000000000+", "?", "0", "of", "0", "met"]   # an unknown commit
    assert "one: it is fast" in lines and lines[-1] == "1 without a stored result: RESULTS.md has what was seen."


def test_the_list_marks_what_was_transcribed_or_measured_by_hand(tmp_path: Path, listing: Any) -> None:
    (tmp_path / "acts.json").write_text(json.dumps({
        "benchmark": "acts", "figures": {}, "goals": [], "date": "2026-01-01", "commit": None, "changed": None,
        "transcribed": True, "machine": {"cores": 2}, "command": [["make", "demo"]]}))
    lines = listing.listing("| `one.py` | it is fast |\n", tmp_path, datetime(2026, 1, 3, tzinfo=UTC)).splitlines()
    assert lines[2].split() == ["acts", "2", "days", "transcribed", "?", "0", "of", "0", "met"]
    assert "acts: measured by hand (RESULTS.md)" in lines
