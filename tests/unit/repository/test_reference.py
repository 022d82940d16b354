"""docs/reference.md is what docs/generate_reference.py makes of the present docstrings."""

import subprocess
import sys
from pathlib import Path

import moa
from tests.tiny import REPOSITORY

SCRIPT = REPOSITORY / "docs" / "generate_reference.py"


def generate(script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, script, *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_the_reference_is_fresh_and_has_every_name() -> None:
    done = generate(SCRIPT, "--check")
    assert done.returncode == 0, done.stderr
    text = (SCRIPT.parent / "reference.md").read_text(encoding="utf-8")
    assert not [name for name in moa.__all__ if f"### moa.{name}\n" not in text]
    assert not [name for name in moa.errors.__all__ if f"| `{name}` |" not in text]


def test_a_stale_reference_is_named_and_rewritten(tmp_path: Path) -> None:
    script = tmp_path / SCRIPT.name
    script.write_bytes(SCRIPT.read_bytes())
    (tmp_path / "reference.md").write_text("old", encoding="utf-8")
    done = generate(script, "--check")
    assert done.returncode == 1 and "is out of date" in done.stderr
    assert generate(script).returncode == 0
    assert (tmp_path / "reference.md").read_bytes() == (SCRIPT.parent / "reference.md").read_bytes()
