"""Releases listed, compared, promoted and rolled back from Python: real MLflow."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import moa
from flows.steps import release as releasing
from moa.core.config import load
from moa.core.paths import Workspace
from moa.experts import train
from moa.mixture.assemble import assemble
from moa.release.registry import Registry
from tests import tiny


@pytest.fixture(scope="module")
def two(exact: None, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """With a second release, whose experts were trained longer; version 1 is champion."""
    made = tiny.released(tmp_path_factory.mktemp("two") / "workspace")
    text = made.params.read_text(encoding="utf-8")
    made.params.write_text(text.replace("epochs: 1", "epochs: 2"), encoding="utf-8")
    config = load(made.params)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(made.root)
        train.train(made, config, list(config.domains))
        assemble(made, config)
        registry = Registry(made, config)
        releasing.register_mixture(made, config, releasing.register_experts(made, config))
        assert len(registry.versions()) == 2
    return made


def test_releases_are_listed_newest_first(two: Workspace) -> None:
    registry = moa.Registry(two.root)
    newest, first = registry.releases()
    assert [newest.version, first.version] == [2, 1] and newest.state == "not gated" and newest.passed is None
    assert registry.champion() == first == registry.get(1) and first.domains == ("alpha", "beta")
    assert len(first.digest) == 64 and repr(first) == "Release(version=1, state='champion', domains=('alpha', 'beta'))"
    assert list(registry.releases().to_frame()["version"]) == [2, 1]
    assert "champion" in registry._repr_html_() and repr(registry) == "Registry('workspace')"
    with pytest.raises(moa.errors.RegistryError, match="no version 3"):
        registry.get(3)


def test_two_releases_are_compared_by_domain(two: Workspace) -> None:
    comparison = moa.Registry(two.root).compare(2, 1)
    assert (comparison.challenger, comparison.incumbent) == (2, 1)
    assert [each.domain for each in comparison.domains] == ["alpha", "beta"]
    for each in comparison.domains:
        assert each.rows > 5 and each.change == (each.challenger_loss or 0) - (each.incumbent_loss or 0) != 0
    assert 0 <= comparison.challenger_accuracy <= 1
    assert list(comparison.to_frame()["change"]) == [each.change for each in comparison.domains]
    assert "alpha" in comparison._repr_html_() and repr(comparison).startswith("Comparison(challenger=2")
    assert moa.Registry(two.root).compare(2).incumbent == 1   # the champion
    with pytest.raises(moa.errors.UsageError, match="cannot be compared with itself"):
        moa.Registry(two.root).compare(1)


def test_the_commands_say_the_same(two: Workspace) -> None:
    def command(*words: str) -> Any:
        done = subprocess.run([sys.executable, "-m", "moa", *words, "--json"], cwd=two.root, capture_output=True,
                              text=True, check=True)
        return json.loads(done.stdout)

    registry, plan = moa.Registry(two.root), moa.plan(two.root)
    assert [(each["version"], each["state"], each["digest"]) for each in command("release", "list")["releases"]] == [
        (each.version, each.state, each.digest) for each in registry.releases()]
    assert [each["version"] for each in command("release", "history")["history"]] == [
        each.version for each in registry.history()]
    rows = command("compare", "2", "--against", "1")["rows"]
    for domain in registry.compare(2, 1).domains:
        losses = [row["challenger_loss"] for row in rows if row["domain"] == domain.domain]
        assert sum(losses) / len(losses) == pytest.approx(domain.challenger_loss)
    assert [(each["name"], each["state"]) for each in command("plan")["stale"]] == [
        (each.name, each.state) for each in plan.stale] != []
    question = tiny.row("alpha", 1)["instruction"]
    reply, out = command("ask", question, "--max-new-tokens", "4"), moa.load(two.root).generate(question,
                                                                                               max_new_tokens=4)
    assert (reply["answer"], reply["answered_by"], reply["confidence"]) == (
        out.text, out.answered_by, pytest.approx(out.routing.confidence))


def test_a_forced_promotion_is_rolled_back(two: Workspace) -> None:
    registry = moa.Registry(two.root)
    with pytest.raises(moa.errors.UsageError, match="needs --reason"):
        registry.promote(2, force=True)
    with pytest.raises(RuntimeError, match="nothing to roll back"):
        registry.rollback()
    change = registry.promote(2, force=True, reason="a test")
    assert (change.version, change.previous, change.changed) == (2, 1, True) and change.by and change.at
    assert not registry.promote(2).changed
    champion = registry.champion()
    assert champion is not None and champion.version == 2
    assert registry.rollback(reason="enough").version == 1
    history = registry.history()
    assert [entry.version for entry in history] == [1, 2, 1] and "enough" in history[-1].reason
    assert json.loads(history.to_frame()["version"].to_json(orient="values")) == [1, 2, 1]


def test_the_default_is_the_workspace_around_the_current_folder(
        two: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(two.root / "data")
    assert len(moa.Registry().releases()) == 2
    monkeypatch.chdir(Path(two.root.anchor))
    with pytest.raises(moa.errors.UsageError):
        moa.Registry()
