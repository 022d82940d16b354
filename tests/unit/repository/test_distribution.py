"""The distribution, its metadata, and the files for those who host, build and change it."""

import json
import os
import runpy
import shlex
import shutil
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import moa
from tests.tiny import REPOSITORY
from tests.unit.repository.test_readme import check

PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_it_is_installed_under_its_name_alone() -> None:
    installed = metadata.distribution(PROJECT["name"])
    assert installed.version == PROJECT["version"] == moa.__version__
    (script,) = (each for each in installed.entry_points if each.group == "console_scripts")
    assert (script.name, script.value) == ("moa", PROJECT["scripts"]["moa"])
    assert set(metadata.packages_distributions()["moa"]) == {PROJECT["name"]}, "run `make .venv/installed`"


def test_no_other_project_is_taken_for_it() -> None:
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.distribution("moa")


def test_the_pythons_that_it_names_are_tested() -> None:
    named = [each.rpartition(" ")[2] for each in PROJECT["classifiers"]
             if each.startswith("Programming Language :: Python :: 3.")]
    (job,) = YAML(typ="safe").load(REPOSITORY / ".github" / "workflows" / "test.yml")["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == named and PROJECT["requires-python"] == f">={named[0]}"
    assert job["steps"][-1] == {"run": ".ci/run"} and os.access(REPOSITORY / ".ci" / "run", os.X_OK)


def test_hooks_run_what_is_installed() -> None:
    (local,) = YAML(typ="safe").load(REPOSITORY / ".pre-commit-config.yaml")["repos"]
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert local["repo"] == "local"
    for hook in local["hooks"]:
        folder, tool = shlex.split(hook["entry"])[0].rsplit("/", 1)
        assert folder == ".venv/bin" and shutil.which(tool, path=Path(sys.executable).parent)
        assert f"\t$(BIN)/{tool}" in makefile.partition("\nlint:")[2].partition("\n\n")[0]


@pytest.mark.parametrize("name", ["bug.yml", "feature.yml"])
def test_forms_ask_something(name: str) -> None:
    form = YAML(typ="safe").load(REPOSITORY / ".github" / "ISSUE_TEMPLATE" / name)
    assert form["name"] and form["description"]
    assert any(field.get("validations", {}).get("required") for field in form["body"])
    assert all(field["attributes"]["label"] for field in form["body"])


def test_the_image_is_built_from_files_that_there_are() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert {"LICENSE", "README.md", "constraints.txt", "flows", "moa", "pyproject.toml"} == copied
    assert all((REPOSITORY / name).exists() for name in copied)
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    commands = [json.loads(line.partition(" ")[2]) for line in text.splitlines()
                if line.startswith(("ENTRYPOINT", "CMD"))]
    check([*commands[0][1:], *commands[1]])


def test_the_site_has_every_document() -> None:
    content = YAML(typ="safe").load(REPOSITORY / "mkdocs.yml")
    pages = [page for entry in content["nav"] for page in entry.values()]
    added = runpy.run_path(str(REPOSITORY / "docs" / "pages.py"))["PAGES"]
    assert sorted(pages) == sorted([*added, *(path.name for path in (REPOSITORY / "docs").glob("*.md"))])
    assert not [source for source in added.values() if not (REPOSITORY / source).exists()]
    ignored = (REPOSITORY / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert f"{content['site_dir'].split('/')[0]}/" in ignored and content["theme"]["font"] is False
