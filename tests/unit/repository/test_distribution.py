"""The installed distribution: its name, its version and its metadata; the import name and the command are `moa`."""

import tomllib
from importlib import metadata
from typing import Any

import pytest

import moa
from tests.tiny import REPOSITORY

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


def test_every_python_of_the_workflow_is_named() -> None:
    named = {each.rpartition(" ")[2] for each in PROJECT["classifiers"]
             if each.startswith("Programming Language :: Python :: 3.")}
    assert named == {"3.11", "3.12", "3.13"} and PROJECT["requires-python"] == ">=3.11"
