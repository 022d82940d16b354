"""DVC's internals answer as DVC's commands do, through a sequence of changes of a real workspace, one copy for each."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows.launch import run
from flows.steps.session import BuildOptions
from moa.core.errors import PipelineError
from moa.core.paths import Workspace
from moa.workspace.dvc_commands import DvcCommands
from moa.workspace.dvc_repository import Dvc, DvcRepository
from moa.workspace.pipeline import Pipeline
from tests import toy


@pytest.fixture(autouse=True)
def _toy_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "site"))
    monkeypatch.setattr("moa.experts.train.finished", toy.finished)
    monkeypatch.setattr("flows.steps.session._release_hooks", lambda *_: [])


class Pair:
    """The same workspace twice: `fast` is asked in process, `slow` with commands."""

    def __init__(self, root: Path) -> None:
        workspace = toy.make(root / "fast")
        assert run(workspace, BuildOptions(), local=True).failure() is None
        self.workspaces = [workspace, Workspace(shutil.copytree(workspace.root, root / "slow", symlinks=True))]
        self.fast: Dvc = DvcRepository(self.workspaces[0])
        self.slow: Dvc = DvcCommands(self.workspaces[1])
        self.inputs: list[dict[str, dict[str, Any]]] = [{}, {}]

    def each(self, change: Callable[[Workspace, Dvc], object]) -> None:
        """Apply a change to both, with equal results."""
        fast, slow = (change(workspace, dvc) for workspace, dvc in zip(self.workspaces, (self.fast, self.slow),
                                                                       strict=True))
        assert fast == slow
        self.fast.close()   # which files have changed, it watches in part

    def agree(self, stale: set[str] | None = None) -> None:
        """All answers are the same. `stale`: the stages that are stale themselves, where a test knows them."""
        fast, slow = self.fast.graph(), self.slow.graph()
        assert fast.stages == slow.stages
        assert {name: fast.upstream(name) for name in fast.stages} == {name: slow.upstream(name)
                                                                       for name in slow.stages}
        reasons = self.fast.stale()
        assert {name: sorted(why, key=str) for name, why in reasons.items()} == {
            name: sorted(why, key=str) for name, why in self.slow.stale().items()}
        assert stale is None or reasons.keys() == stale
        names = [name for name, stage in fast.stages.items() if stage.command]
        assert self.fast.stale(names[::2]).keys() == reasons.keys() & set(names[::2])
        assert self.fast.restorable(names) == self.slow.restorable(names)
        self._changed_inputs(names)
        assert self.files("dvc.lock") and self.files("*.dvc") and self.files(".gitignore")

    def _changed_inputs(self, names: list[str]) -> None:
        """Digests are each implementation's own: which of them changed since the last time is the same."""
        changes = []
        for number, dvc in enumerate((self.fast, self.slow)):
            now, before = dvc.inputs(names), self.inputs[number]
            changes.append({(name, path) for name, inputs in now.items() for path, digest in inputs.items()
                            if path.rpartition("/")[2] != "params.yaml"
                            and digest != before.get(name, {}).get(path)})
            missing = {(name, path) for name, inputs in now.items() for path, digest in inputs.items()
                       if digest is None}
            changes[-1] |= {("missing", *each) for each in missing}   # type: ignore[arg-type]
            self.inputs[number] = now
        assert changes[0] == changes[1]

    def files(self, pattern: str) -> bool:
        """Whether both hold the same content in the files of this name, order and comments apart."""
        fast, slow = ({path.relative_to(workspace.root).as_posix(): sorted(path.read_text().splitlines())
                       if pattern == ".gitignore" else YAML(typ="safe").load(path)
                       for path in workspace.root.rglob(pattern)
                       if path.is_file() and ".moa" not in path.parts and ".dvc" not in path.parts}
                      for workspace in self.workspaces)
        assert fast == slow
        return True


def written(name: str, old: str, new: str) -> Callable[[Workspace, Dvc], object]:
    """Replaces text in a file of the workspace."""
    def change(workspace: Workspace, _: Dvc) -> object:
        path = workspace.root / name
        text = path.read_text()
        assert old in text
        return path.write_text(text.replace(old, new))
    return change


def removed(name: str) -> Callable[[Workspace, Dvc], object]:
    return lambda workspace, _: shutil.rmtree(workspace.root / name)


def ran(*names: str) -> Callable[[Workspace, Dvc], object]:
    """Runs stages as a build does."""
    def change(workspace: Workspace, dvc: Dvc) -> object:
        pipeline = Pipeline(workspace, dvc)
        for name in names:
            pipeline.reproduce(name, lambda _: None)
        return len(toy.runs(workspace)) <= len(names)   # some are restored
    return change


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    monkeypatch.chdir(tmp_path)
    return Pair(tmp_path)


def test_a_sequence_of_changes(pair: Pair) -> None:
    pair.agree(set())
    pair.each(written("params.yaml", "rank: 8", "rank: 4"))
    pair.agree({"train@math", "train@sql"})
    pair.each(written("params.yaml", "rank: 4", "rank: 8"))
    pair.each(lambda workspace, _: toy.add_rows(workspace, "sql", "more"))
    pair.agree({"prepare@sql"})
    pair.each(ran("prepare@sql"))
    pair.agree({"train@sql", "assemble"})
    pair.each(removed("data/mixture"))
    pair.each(ran("train@sql", "assemble", "evaluate"))
    pair.agree(set())
    pair.each(lambda workspace, _: toy.add_rows(workspace, "sql", "sql"))   # as before: all of it can be restored
    pair.each(ran("prepare@sql", "train@sql", "assemble", "evaluate"))
    pair.agree(set())
    pair.each(lambda workspace, _: toy.add_domain(workspace, "law"))
    pair.agree({"prepare@law", "train@law", "assemble"})
    pair.each(lambda workspace, _: (workspace.corpus("math") / "manifest.json").write_text("{}"))
    pair.each(removed("data/reports"))
    pair.each(written("dvc.yaml", "steps.py base", "steps.py  base"))
    pair.agree({"base", "prepare@math", "prepare@law", "train@math", "train@law", "assemble", "evaluate"})


def test_what_is_recorded_and_what_is_not(pair: Pair) -> None:
    names = ["train@math", "train@sql"]

    def train(workspace: Workspace, dvc: Dvc) -> object:
        """Trains both outside of DVC, while the rows of one change."""
        before = dvc.inputs(names)
        for name in ("math", "sql"):
            (workspace.expert(name) / "manifest.json").write_text('{"value": "NEW"}')
        (workspace.corpus("sql") / "manifest.json").write_text('{"value": "other", "rows": {"train": 10}}')
        dvc.close()
        return dvc.record(names, before)

    pair.each(train)
    pair.agree()
    stale = pair.fast.stale()
    assert "train@sql" in stale and "train@math" not in stale

    def fails(workspace: Workspace, dvc: Dvc) -> object:
        shutil.rmtree(workspace.mixture)
        with pytest.raises(PipelineError, match=r"^assemble could not be recorded: "):
            dvc.record(["assemble"])
        return None

    pair.each(fails)
    pair.agree()


def test_data(pair: Pair) -> None:
    pair.each(lambda workspace, dvc: dvc.add(workspace.raw("math")))
    pair.agree()

    def cached(workspace: Workspace, dvc: Dvc) -> object:
        md5 = YAML(typ="safe").load(workspace.tracked("math"))["outs"][0]["md5"]
        return md5, {name: path.relative_to(dvc.cache()).as_posix() for name, path in dvc.cached(md5).items()}

    pair.each(cached)
    pair.each(lambda workspace, dvc: dvc.cached("0" * 32 + ".dir"))
    pair.each(lambda workspace, _: toy.add_rows(workspace, "math", "more"))
    pair.each(lambda workspace, dvc: dvc.add(workspace.raw("math")))
    pair.each(lambda workspace, dvc: dvc.cache().relative_to(workspace.root).as_posix())
    pair.agree()
    pair.each(ran("prepare@math"))   # the corpus of the rows before is used by nothing now
    pair.each(lambda _, dvc: dvc.purge({"data/corpora/math", "data/experts/math"}, []))
    pair.agree()
    pair.each(lambda workspace, dvc: dvc.forget(["train@sql"], [workspace.expert("sql")]))
    pair.agree()
    pair.each(lambda workspace, dvc: dvc.lock_file_is_whole())
    pair.each(written("dvc.lock", "stages:", "stages: ["))
    pair.each(lambda workspace, dvc: dvc.lock_file_is_whole())
