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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import quick

    return quick


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


def test_the_quick_plan_names_options_that_there_are(quick: Any) -> None:
    claimed = set(re.findall(r"^\| `(\w+)\.py` \|", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert quick.PLAN.keys() <= claimed
    for name in quick.PLAN:
        words = quick.command(name, quick.PLAN[name])
        source = Path(words[1]).read_text(encoding="utf-8")
        for option in [word.replace("--no-", "--") for word in words[2:] if word.startswith("--")]:
            assert f'add_argument("{option}"' in source, f"{name} has no {option}"


def test_the_quick_plan_can_be_listed_in_part(quick: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert quick.main(["--list", "--only", "serve", "decoding"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [Path(line.split()[1]).stem for line in lines] == ["decoding", "serve"]
    with pytest.raises(SystemExit):
        quick.main(["--only", "gate"])


def test_a_quick_run_goes_on_after_a_failure_and_stores_nothing_here(tmp_path: Path, quick: Any,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{FOLDER}:{REPOSITORY}")
    scripts, now, stored = (tmp_path / name for name in ("scripts", "now", "stored"))
    for folder in (scripts, now, stored):
        folder.mkdir()
    (scripts / "broken.py").write_text("raise SystemExit(3)\n")
    (scripts / "silent.py").write_text("")
    (scripts / "demo.py").write_text(FINISH.replace(", Path(sys.argv[-1]))", ")"))
    (stored / "demo.json").write_text(json.dumps({"goals": [{"name": "loss", "value": 0.25, "goal": 1, "met": True}]}))
    before = sorted((FOLDER / "results").iterdir())
    ended = quick.measure({"broken": "", "silent": "", "demo": "--rows 4"}, now, scripts)
    assert [code for code, _ in ended.values()] == [3, 0, 0] and sorted((FOLDER / "results").iterdir()) == before
    assert json.loads((now / "demo.json").read_text(encoding="utf-8"))["command"] == ["demo.py", "--rows", "4"]
    cells = [re.split(r" {2,}", line) for line in quick.report(ended, now, stored).splitlines()]
    assert cells[:5] == [
        ["benchmark", "ratio", "now", "stored", "goal"],
        ["broken", "failed with exit code 3", "-", "-", "-", "failed"],
        ["silent", "stored no result", "-", "-", "-", "failed"],
        ["demo", "loss", "0.5", "0.25", "at most 1", "met"],
        ["demo", "score", "0.1", "-", "at least 0.2", "missed"]]


def test_a_quick_run_fails_only_where_a_benchmark_does(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"goals": [{"name": "rate", "value": 1.0, "goal": 2.0, "met": False}]}

    def measured(code: int) -> Any:
        def measure(plan: Any, results: Path) -> dict[str, tuple[int, float]]:
            (results / "decoding.json").write_text(json.dumps(result))
            return dict.fromkeys(plan, (code, 1.0))
        return measure

    for code in (0, 1):
        monkeypatch.setattr(quick, "measure", measured(code))
        assert quick.main(["--only", "decoding"]) == code
