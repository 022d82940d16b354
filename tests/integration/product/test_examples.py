"""The examples run as they are, on a toy base, and are typed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

EXAMPLES = tiny.REPOSITORY / "examples"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("base"))


def run(folder: Path, name: str, *words: str | Path) -> str:
    """What an example prints, which runs beside what it makes and far from the checkout."""
    variables = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    done = subprocess.run([sys.executable, EXAMPLES / name, *words], cwd=folder, env=variables, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_quickstart_builds_releases_and_answers(base: Path, tmp_path: Path) -> None:
    printed = run(tmp_path, "quickstart.py", "--base", f"path:{base}")
    assert "train@minutes" in printed and "Release 1: " in printed
    assert printed.count("?  [") == 3
    assert (tmp_path / "my-experts" / "params.yaml").is_file()


def test_a_table_becomes_an_expert_that_helps(base: Path, tmp_path: Path) -> None:
    printed = run(tmp_path, "own_data.py", "--base", f"path:{base}", "--directory", tmp_path / "here")
    assert "52 rows in " in printed and "train@support" in printed
    losses = printed.partition("were kept: ")[2].split()
    assert float(losses[0]) < float(losses[4])
    table = tmp_path / "few.csv"
    table.write_text("question,answer\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(12)), encoding="utf-8")
    done = subprocess.run([sys.executable, EXAMPLES / "own_data.py", table, "--base", f"path:{base}"], cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("The build stopped: Failed: prepare@support")


def test_the_library_trains_experts_that_peft_reads(base: Path, tmp_path: Path) -> None:
    printed = run(tmp_path, "library.py", base)
    assert "validation_loss" in printed and "the model alone: " in printed
    assert {path.name for path in (tmp_path / "experts").iterdir()} == {"sums", "opposites"}
    assert (tmp_path / "experts" / "sums" / "adapter_model.safetensors").is_file()
