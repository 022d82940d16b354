"""A workspace made, given rows, planned and built from Python: real git, DVC and MLflow."""

import asyncio
import json
import os
import signal
import threading
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
from ruamel.yaml import YAML

import moa
from tests import tiny, toy, waiting

# Parameters that make a build small, by group.
SMALL: dict[str, dict[str, object]] = {
    "prepare": {"validation": 0.2, "test": 0.2, "min_rows": 10},
    "train": {"rank": 2, "batch_tokens": 2048, "epochs": 1},
    "evaluate": {"generate_rows": 1, "max_new_tokens": 4}, "release": {"min_rows": 4, "metric_rows": 0},
    "execution": {"workers": 1, "devices": ["cpu"]}}


def rows(domain: str, count: int = 40) -> list[dict[str, str]]:
    return [tiny.row(domain, number) for number in range(count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> moa.Workspace:
    """Two domains, from a list and a DataFrame; not built yet."""
    root = tmp_path_factory.mktemp("made")
    tiny.base(root / "tiny-base")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(root)
        workspace = moa.init("my-experts", base="path:tiny-base")
    yaml = YAML()
    params = yaml.load(workspace.paths.params)
    for group, values in SMALL.items():
        params.setdefault(group, {}).update(values)
    yaml.dump(params, workspace.paths.params)
    workspace.add("alpha", rows("alpha"))
    workspace.add("beta", pandas.DataFrame(rows("beta")).assign(input=[None, np.nan] * 20))
    return workspace


def test_a_workspace_is_found_from_inside_it_and_named_by_its_folder(made: moa.Workspace) -> None:
    assert moa.Workspace.find(made.root / "data" / "raw") == moa.Workspace(made.root) == made
    assert hash(moa.Workspace(made.root)) == hash(made) and made != made.root
    assert repr(made) == "Workspace('my-experts')" and made.domains == ("alpha", "beta")
    with pytest.raises(moa.errors.UsageError, match=r"no workspace"):
        moa.Workspace(made.root / "data")
    with pytest.raises(ValueError, match=r"No workspace"):
        moa.Workspace.find(made.root.parent)
    with pytest.raises(moa.errors.UsageError, match=r"a workspace already"):
        moa.init(made.root)


def test_the_same_rows_are_added_once_whatever_holds_them(made: moa.Workspace) -> None:
    assert made.add("alpha", rows("alpha")) == moa.Added("alpha", False, 40, ())
    assert made.add("alpha", datasets.Dataset.from_list(rows("alpha"))).files == ()
    assert made.add("beta", pandas.DataFrame(rows("beta"))).files == ()   # missing values count as absent
    assert made.add("beta", (row for row in rows("beta"))).files == ()
    (file,) = made.paths.raw("beta").iterdir()
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == rows("beta")
    assert "rows.jsonl" in made.paths.tracked("beta").read_text(encoding="utf-8")   # and no temporary folder's name


@pytest.mark.parametrize(("given", "message"), [
    ([], "no row"), ("rows.jsonl", "a list of dictionaries"), ({"instruction": "x"}, "a list of dictionaries"),
    ([["x"]], "Row 1 is a list"), ([{"instruction": "x", "output": {1, 2}}], "Row 1 cannot be written as JSON"),
    ([{"question": "x", "answer": "y"}], "instruction is missing")])
def test_rows_that_are_none_change_nothing(made: moa.Workspace, given: object, message: str) -> None:
    before = made.paths.params.read_bytes()
    with pytest.raises(moa.errors.DataError, match=message):
        made.add("gamma", given)   # type: ignore[arg-type]
    assert made.paths.params.read_bytes() == before and not made.paths.raw("gamma").exists()


def test_settings_of_a_new_domain_are_the_commands(made: moa.Workspace) -> None:
    with pytest.raises(moa.errors.ConfigError, match="No metric 'nonsense'"):
        made.add("gamma", rows("gamma"), metric="nonsense")
    with pytest.raises(moa.errors.UsageError, match="no key 'question'"):
        made.add("gamma", rows("gamma"), map={"question": "instruction"})


def test_a_plan_runs_nothing_and_is_a_table(made: moa.Workspace) -> None:
    plan = moa.plan(made.root)
    assert plan.experts == ("alpha", "beta") and plan.router and plan.release and plan.minutes > 0
    assert [step.name for step in plan.stale] == [step.name for step in plan.steps]
    assert list(plan.to_frame().columns) == ["name", "state", "reasons"] and len(plan.to_frame()) == 7
    assert "train@alpha" in str(plan) and "train@alpha" in plan._repr_html_()
    assert {step.name for step in moa.plan(made, domains=["beta"]).steps} == {
        "base", "prepare@beta", "train@beta", "assemble", "evaluate"}
    with pytest.raises(moa.errors.ConfigError, match="No domain 'gamma'"):
        moa.plan(made, domains=["gamma"])


def test_a_run_builds_and_releases_under_a_running_event_loop(
        made: moa.Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)   # nothing depends on the current folder

    async def cell() -> moa.RunResult:
        return moa.run(made, promote=True)

    with caplog.at_level("INFO", logger="moa"):
        result = asyncio.run(cell())
    assert result.version == result.champion == 1 and result.promoted and result.verdict == "pass"
    assert {"train@alpha", "evaluate", "promote"} <= set(result.done) and not result.waiting
    assert list(result.to_frame().columns) == ["name", "state", "seconds"]
    assert "evaluate" in result._repr_html_() and "version=1" in repr(result)
    assert "version 1 is champion" in caplog.text
    assert capfd.readouterr() == ("", "")   # a library logs
    assert not moa.plan(made).stale and not list(tmp_path.iterdir())


def test_a_run_that_fails_names_the_step(made: moa.Workspace) -> None:
    text = made.paths.params.read_text(encoding="utf-8")
    made.paths.params.write_text(text.replace("min_rows: 10", "min_rows: 1000"), encoding="utf-8")
    try:
        with pytest.raises(RuntimeError, match=r"Failed: prepare@alpha, prepare@beta") as raised:
            moa.run(made)
    finally:
        made.paths.params.write_text(text, encoding="utf-8")
    assert isinstance(raised.value, moa.errors.PipelineError)


def test_without_a_domain_there_is_nothing_to_plan(tmp_path: Path) -> None:
    empty = moa.init(tmp_path / "empty")
    assert empty.domains == ()
    for function in (moa.plan, moa.run):
        with pytest.raises(moa.errors.ConfigError, match="no domain yet"):
            function(empty)   # type: ignore[operator]
    with pytest.raises(moa.errors.NothingReleased):
        moa.load(empty)
    assert moa.Registry(empty).champion() is None and not moa.Registry(empty).history()


def test_an_interrupted_run_leaves_nothing_half_done(tmp_path: Path) -> None:
    """In a notebook, too, where the kernel's event loop runs."""
    workspace = moa.Workspace(toy.make(tmp_path / "toy").root)
    toy.control(workspace.paths, hold=["prepare@math"])

    async def cell() -> None:
        moa.run(workspace)

    def interrupt() -> None:
        waiting.until(lambda: "prepare math" in toy.runs(workspace.paths))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    loop = asyncio.new_event_loop()
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(cell())
    loop.close()
    thread.join()
    assert not workspace.paths.corpus("math").exists()
    states = {step.name: step.state for step in moa.plan(workspace).steps}
    assert states["base"] == "fresh" and states["prepare@math"] == "stale"
    toy.control(workspace.paths)
    with pytest.raises(moa.errors.PipelineError, match="Failed: register experts"):   # which toy stages do not make
        moa.run(workspace)
    assert not moa.plan(workspace).stale


def test_what_the_command_line_would_print_is_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                                     caplog: pytest.LogCaptureFixture) -> None:
    workspace = moa.init(tmp_path / "old")
    text = workspace.paths.params.read_text(encoding="utf-8")
    workspace.paths.params.write_text(text.replace("drift:\n", "drift:\n  psi: 0.3\n"), encoding="utf-8")
    capfd.readouterr()
    assert workspace.domains == ()
    assert "drift.psi has no effect any more" in caplog.text and capfd.readouterr() == ("", "")
