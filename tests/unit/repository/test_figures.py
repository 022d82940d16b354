"""Figures in documents are those of the stored results, and benchmarks/render.py says what it cannot fill."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import REPOSITORY

FOLDER = REPOSITORY / "benchmarks"
RESULT = {"benchmark": "demo", "date": "2026-01-02T03:04:05+00:00", "commit": "c" * 40, "changed": False,
          "command": ["demo.py", "--rows", "4", "--name", "two words"],
          "machine": {"cores": 2, "cpu flags": ["avx2"], "threads": 1, "torch": "2.13.0"},
          "figures": {"systems": {"ours-4": {"tokens/s": 447.2, "range": [442, 452]}}, "note": "as it is"},
          "goals": [{"name": "loss", "value": 0.34567, "goal": 0.5, "met": True},
                    {"name": "rate | all", "value": 0.7999, "goal": 0.8, "met": False},
                    {"name": "wrong", "value": 0, "goal": 0, "met": True}]}
BLOCK = """<!-- figures: demo -->

| goal | found | wanted | |
|---|---|---|---|
| loss | 0.346 | at most 0.5 | met |
| rate \\| all | 0.7999 | at least 0.8 | **missed** |
| wrong | 0 | 0 | met |

2026-01-02, commit cccccccccccc; 2 cores, avx2, 1 thread; torch 2.13.0. `.venv/bin/python benchmarks/demo.py --rows 4
--name 'two words'`.

<!-- end figures -->
"""


@pytest.fixture
def render(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import render

    return render


@pytest.fixture
def results(tmp_path: Path, render: Any) -> Any:
    (tmp_path / "demo.json").write_text(json.dumps(RESULT), encoding="utf-8")
    return render.Results(tmp_path)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, FOLDER / "render.py", *words], capture_output=True, text=True, check=False)


def test_every_document_is_fresh(render: Any) -> None:
    named = {path.relative_to(REPOSITORY).as_posix() for path in render.documents()}
    assert {"README.md", "docs/speed.md", "benchmarks/RESULTS.md"} <= named
    checked = run("--check")
    assert checked.returncode == 0, checked.stderr


def test_every_stored_result_is_in_the_results(render: Any) -> None:
    text = (FOLDER / "RESULTS.md").read_text(encoding="utf-8")
    missing = [path.stem for path in render.RESULTS.glob("*.json") if f"<!-- figures: {path.stem} -->" not in text]
    assert not missing, f"RESULTS.md has no block for {missing}: benchmarks/README.md says how"


def test_a_transcribed_result_has_all_that_a_stored_one_has(render: Any) -> None:
    for path in render.RESULTS.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert {"date", "commit", "changed", "command", "machine", "benchmark", "figures", "goals"} <= result.keys()
        assert result["benchmark"] == path.stem and result["machine"]["cores"]
        assert all({"name", "value", "goal", "met"} <= each.keys() for each in result["goals"])
        assert (result["commit"] is None) == bool(result.get("transcribed"))


def test_a_block_is_filled_and_stays(render: Any, results: Any) -> None:
    assert render.render("before\n\n<!-- figures: demo -->\n<!-- end figures -->\nafter\n", results) == (
        f"before\n\n{BLOCK}after\n")
    assert render.render(BLOCK, results) == BLOCK
    assert render.render(BLOCK.replace("0.346", "0.1"), results) == BLOCK


@pytest.mark.parametrize(("reference", "shown"), [
    ('demo.goals["loss"]', "0.346"), ('demo.goals["loss"] .1%', "34.6 %"), ("demo.date", "2026-01-02"),
    ('demo.figures["systems"]["ours-4"]["tokens/s"] .0f', "447"), ('demo.machine["cores"]', "2"),
    ('demo.figures["systems"]["ours-4"]["range"][1] .1f', "452.0"), ('demo.figures["note"]', "as it is")])
def test_a_figure_within_a_line(render: Any, results: Any, reference: str, shown: str) -> None:
    line = f"| a <!-- figure: {reference} -->old<!-- /figure --> of <!-- figure: {reference} --><!-- /figure -->. |"
    assert render.render(line, results) == line.replace("old", shown).replace("--><!-- /f", f"-->{shown}<!-- /f")


@pytest.mark.parametrize(("text", "said"), [
    ("<!-- figures: other -->\n<!-- end figures -->\n", "other has no stored result: other.json is not in"),
    ('<!-- figure: other.goals["loss"] --><!-- /figure -->', "other has no stored result"),
    ('<!-- figure: demo.goals["los"] --><!-- /figure -->', "demo has no 'los' there; there are loss, rate | all,"),
    ('<!-- figure: demo.goals[0] --><!-- /figure -->', "demo has no 0 there"),
    ('<!-- figure: demo.date["day"] --><!-- /figure -->', "demo has no 'day' there."),
    ('<!-- figure: demo.figures["systems"] --><!-- /figure -->', 'demo.figures["systems"] is no single figure.'),
    ('<!-- figure: demo.goals["loss"] .1x --><!-- /figure -->', ".1x is no format of a number."),
    ('<!-- figure: demo.goals["a --b"] --><!-- /figure -->', "a comment within a line ends at `--`"),
    ("<!-- figures: demo -->\n", "half a marker"), ("a\n<!-- end figures -->\n", "half a marker"),
    ('<!-- figure: demo.goals["loss"] -->0.3', "half a marker"), ("<!-- figure: demo -->1<!-- /figure -->", "half a"),
    ("<!-- figures: demo -->\n<!-- figures: demo -->\n<!-- end figures -->\n", "half a marker")])
def test_what_cannot_be_filled_is_named(render: Any, results: Any, text: str, said: str) -> None:
    with pytest.raises(render.FigureError) as error:
        render.render(text, results)
    assert said in str(error.value)


def test_fenced_code_is_left_as_it_is(render: Any, results: Any) -> None:
    text = "```markdown\n<!-- figures: nothing -->\n```\n"
    assert render.render(text, results) == text


def test_the_table_of_speeds_is_worded_by_what_was_found(render: Any, tmp_path: Path) -> None:
    for path in render.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    many = json.loads((tmp_path / "many_experts.json").read_text(encoding="utf-8"))
    for value, said in ((1.18, "| no fewer tokens/s than eight |"), (0.964, "| 0.96 of the tokens/s of eight |")):
        many["goals"] = [{**each, "value": value} for each in many["goals"] if each["name"].startswith("uniform")]
        (tmp_path / "many_experts.json").write_text(json.dumps(many), encoding="utf-8")
        assert said in render.speed(render.Results(tmp_path))
    (tmp_path / "serve.json").unlink()
    with pytest.raises(render.FigureError, match="serve has no stored result"):
        render.speed(render.Results(tmp_path))


def test_a_bound_that_the_value_does_not_tell_is_stored(render: Any) -> None:
    goal = {"name": "rate, at a worse loss", "value": 3.0, "goal": 2.5, "met": False}
    assert render.wanted({**goal, "above": True}) == "at least 2.5" and render.wanted(goal) == "at most 2.5"


def test_numbers(render: Any) -> None:
    assert [render.number(value) for value in (26603, 349, 99.5, 0.0268, 0, -0.014)] == [
        "26,603", "349", "99.5", "0.0268", "0", "-0.014"]


def test_the_command_checks_and_fills(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text('<!-- figure: gate.goals["nats lost in twenty releases"] .3f -->?<!-- /figure -->\n')
    checked = run("--check", str(document))
    assert checked.returncode == 1 and "figures are out of date: run `make figures`." in checked.stderr
    assert "?" in document.read_text() and run(str(document)).returncode == 0
    assert "?" not in document.read_text() and run("--check", str(document)).returncode == 0
    document.write_text("<!-- figures: nothing -->\n<!-- end figures -->\n")
    refused = run(str(document))
    assert refused.returncode == 1 and "nothing has no stored result" in refused.stderr
    assert "Traceback" not in refused.stderr
