"""Keys of params.yaml that moa reads no more are named once and ignored; keys that it does not offer are still read."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from moa.core import config, subprocesses
from moa.core.errors import ConfigError, PipelineError
from moa.core.paths import Workspace
from tests import tiny

GROUPS = ("prompt", "prepare", "train", "assemble", "evaluate", "release", "adapt", "drift")
OFFERING = [tiny.REPOSITORY / name for name in ("params.yaml", "moa/workspace/scaffold/params.yaml", "README.md",
                                                "docs/operations.md", "docs/parameters.md", "docs/scaling.md")]


def load(folder: Path, **groups: Any) -> config.Config:
    """The config of a file with these keys in these groups."""
    path = folder / "params.yaml"
    content = {"base": {"source": "path:x"}, "domains": {"math": {"metric": "exact"}},
               **{group: groups.get(group, {}) for group in GROUPS}}
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(content, file)
    return config.load(path)


@pytest.fixture(autouse=True)
def a_process_that_has_named_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(config.KEYS_NAMED, raising=False)
    config._warn_of_removed.cache_clear()


def unlisted() -> list[tuple[str, str]]:
    return [(group, name) for group in GROUPS
            for name, field in config.Config.model_fields[group].annotation.model_fields.items()
            if config.UNLISTED in field.metadata]


@pytest.mark.parametrize("name", config.REMOVED)
@pytest.mark.parametrize("value", [0, -1, "what it held is not looked at", None, {"a": [1]}])
def test_a_removed_key_has_no_effect(tmp_path: Path, name: str, value: object,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    group, key = name.split(".")
    assert load(tmp_path, **{group: {key: value}}) == load(tmp_path)
    assert capsys.readouterr().err == f"params.yaml: {name} has no effect any more; `moa upgrade` removes it.\n"


def test_all_are_named_in_one_line_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        load(tmp_path, release={"seed": 7, "resamples": 100}, drift={"psi": 0.1})
    assert capsys.readouterr().err == ("params.yaml: release.resamples, release.seed, drift.psi have no effect any "
                                       "more; `moa upgrade` removes them.\n")


def test_a_step_that_ends_without_a_word_is_not_explained_by_them(tmp_path: Path) -> None:
    load(tmp_path, release={"seed": 7})
    script = "import pathlib, sys; from moa.core import config; config.load(pathlib.Path('params.yaml')); sys.exit(7)"
    with pytest.raises(PipelineError, match="step failed: it ended with status 7 and said nothing"):
        subprocesses.execute(Workspace(tmp_path), "step", [sys.executable, "-c", script], lambda _: None)


@pytest.mark.parametrize(("group", "key"), [("release", "seeds"), ("drift", "seed"), ("train", "psi")])
def test_a_key_that_never_was_is_still_refused(tmp_path: Path, group: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key '{group}\.{key}'"):
        load(tmp_path, **{group: {key: 1}})


def test_the_one_seed_is_that_of_training(tmp_path: Path) -> None:
    assert load(tmp_path, train={"seed": 5}).train.seed == 5
    found = [(group, name) for group in GROUPS for name in config.Config.model_fields[group].annotation.model_fields
             if "seed" in name]
    assert found == [("train", "seed")]


def test_keys_that_are_not_offered_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = load(tmp_path, train={"warm_patience": 3}, assemble={"joint_start": "random"}, drift={"cluster": 4},
                 adapt={"settle": 0.0, "poll": 0.5, "golden": 0})
    values = [getattr(getattr(found, group), name) for group, name in unlisted()]
    assert values == [3, "random", 0.0, 0.5, 0, 4] and not capsys.readouterr().err


def test_an_error_offers_none_of_either(tmp_path: Path) -> None:
    for group, name in [*unlisted(), *(each.split(".") for each in config.REMOVED)]:
        with pytest.raises(ConfigError, match="allowed here") as refused:
            load(tmp_path, **{group: {"nonsense": 1}})
        assert name not in re.findall(r"\w+", str(refused.value).partition("allowed here")[2])


@pytest.mark.parametrize("document", OFFERING, ids=lambda path: path.name)
def test_nothing_that_people_read_offers_them(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    names = [*config.REMOVED, *(f"{group}.{name}" for group, name in unlisted())]
    if document.suffix == ".yaml":
        content = YAML(typ="safe").load(text)
        assert not [name for name in names if name.split(".")[1] in (content.get(name.split(".")[0]) or {})]
    else:
        assert not [name for name in names if f"`{name}" in text or f"`{name.split('.')[1]}:" in text]
