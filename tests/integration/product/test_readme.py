"""Every `moa` command of the README and of the list of commands runs, in their order, in a workspace with real git,
DVC, Prefect and MLflow. tests/integration/product/test_wheel.py runs `moa demo`."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moa.core.paths import Workspace
from tests import tiny
from tests.unit.repository.test_readme import FENCE, named

# All but those that do not end or take minutes, and those whose words are placeholders.
COMMANDS = [words for wanted in ("README.md", "commands.md") for document, words in named("moa")
            if document == wanted and not words[0].startswith("-") and words[0] not in ("serve", "up", "demo")
            and "NAME" not in words and not any("REVISION" in word for word in words)]
# Exit codes that answer a question: a domain would get worse, or it waits or data are too few; this machine's disk is
# nearly full.
VERDICTS = {"gate": {3, 4}, "adapt": {3, 4}, "retrain": {3, 4}, "run": {3, 4}, "drift": {3}, "doctor": {1}}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = tiny.workspace(
        tmp_path_factory.mktemp("readme"), ("math", "sql"), prompt={"system": None, "max_tokens": 1024},
        train={"rank": 2, "alpha": 4.0, "epochs": 1, "rows_per_epoch": 8, "validation_rows": 4},
        evaluate={"rows": 6, "generate_rows": 1, "max_new_tokens": 4}, release={"min_rows": 2})
    tickets = "".join(f"The printer in room {number} is on fire,Send {number % 7} people with {number} buckets\n"
                      for number in range(40))
    (made.root / "tickets.csv").write_text("question,answer\n" + tickets.replace("room 7 ", ""), encoding="utf-8")
    shutil.copy(made.root / "tickets.csv", made.root.parent)
    (made.root / "new-tickets.csv").write_text("question,answer\n" + tickets.replace("printer", "copier"),
                                              encoding="utf-8")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=made.root, check=True, capture_output=True)
    return made


def python(workspace: Workspace, *words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=workspace.root, text=True, capture_output=True, check=False,
                          env={**os.environ, "MOA_DTYPE": "float32"})
    assert done.returncode in {0, *VERDICTS.get(" ".join(words[2:3]), ())}, (
        f"python {shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def run(workspace: Workspace, *words: str) -> str:
    return python(workspace, "-m", "moa", *words)


def reseed(params: Path) -> None:
    """A second release needs other content."""
    text = params.read_text(encoding="utf-8")
    params.write_text(text.replace("epochs: 1\n", "epochs: 1\n  seed: 1\n"), encoding="utf-8")


def test_the_readme_has_commands() -> None:
    assert {words[0] for words in COMMANDS} >= {"plan", "run", "ask", "eval", "status", "compare", "train", "ingest"}


def test_every_command_of_the_readme_runs(workspace: Workspace, prefect_url: str) -> None:
    assert prefect_url   # which `moa run` finds in the environment: one server for all of them
    ran = []
    run(workspace, "run")   # in the place of `moa demo`
    for words in COMMANDS:
        if words[0] in ("init", "export"):   # shown in more than one place
            shutil.rmtree(workspace.root / words[1], ignore_errors=True)
        if words[0] == "compare" and not ran.count("compare"):
            reseed(workspace.params)
            run(workspace, "run", "--local", "--no-promote")
        printed = run(workspace, *words)
        ran.append(words[0])
        if "--json" in words:
            assert json.loads(printed)
        elif words[0] in ("plan", "eval", "status", "compare"):
            assert re.search(r"\w", printed), f"moa {shlex.join(words)} printed nothing"
    assert (workspace.mixture / "manifest.json").is_file()
    blocks = [block for language, block in FENCE.findall((tiny.REPOSITORY / "README.md").read_text(encoding="utf-8"))
              if language == "python"]
    assert blocks
    for block in blocks:
        printed = python(workspace, "-c", block)
        assert "Release(version=" in printed, printed
