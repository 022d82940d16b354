"""Code digests: what changes them, and what does not. Each case is an edit of a copy of the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moa.core import code_version

PACKAGE = Path(code_version.__file__).parents[1]
SCRIPT = """
import json
from moa.core import code_version
print(json.dumps({stage: code_version.digest(stage) for stage in code_version.STAGES}))
"""


def digests(folder: Path, home: Path | None = None) -> dict[str, str]:
    """The digests that the copy of `moa` in `folder` computes."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(home or folder / "cache")}
    done = subprocess.run([sys.executable, "-P", "-c", SCRIPT], env=environment, cwd=folder, check=True, text=True,
                          stdout=subprocess.PIPE)
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    shutil.copytree(PACKAGE, folder / "moa", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original / "moa", tmp_path / "moa")
    return tmp_path


def edit(folder: Path, module: str, change: Callable[[str], str]) -> None:
    path = folder / Path(*module.split(".")).with_suffix(".py")
    before = path.read_text(encoding="utf-8")
    after = change(before)
    assert after != before
    path.write_text(after, encoding="utf-8")


def test_the_copy_has_the_digests_of_the_original(original: Path) -> None:
    assert digests(original) == {stage: code_version.digest(stage) for stage in code_version.STAGES}


def test_comments_docstrings_and_layout_do_not_count(original: Path, copy: Path) -> None:
    edit(copy, "moa.experts.cotraining", lambda text: "# Another comment.\n" + text.replace('"""', '"""Reworded: ', 1))
    edit(copy, "moa.mixture.router", lambda text: re.sub(r"\n\n\n", "\n\n\n\n", text))
    source = copy / "moa" / "base" / "kernels" / "csrc" / "lora.c"
    source.write_text("// Another comment.\n" + source.read_text())
    assert digests(copy) == digests(original)


def test_core_and_wording_do_not_count(original: Path, copy: Path) -> None:
    edit(copy, "moa.core.config", lambda text: text + "\nANOTHER = 1\n")
    edit(copy, "moa.evaluation.summary", lambda text: text.replace("routing accuracy", "accuracy of routing"))
    assert digests(copy) == digests(original)


def test_a_moved_module_does_not_count(original: Path, copy: Path) -> None:
    (copy / "moa" / "experts" / "batches.py").rename(copy / "moa" / "experts" / "collation.py")
    for path in (copy / "moa").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("moa.experts.batches", "moa.experts.collation"), encoding="utf-8")
    assert digests(copy) == digests(original)


@pytest.mark.parametrize(("module", "pattern", "stages"), [
    ("moa.experts.cotraining", r"^([A-Z_]+ = )(\d+)", {"train", "assemble"}),
    ("moa.data.near_duplicates", r"^([A-Z_]+ = )(\d+)", {"prepare"}),
    ("moa.evaluation.scoring", r"^(SPARE_TOKENS = )(\d+)", {"evaluate"}),
])
def test_a_changed_constant_counts(module: str, pattern: str, stages: set[str], original: Path, copy: Path) -> None:
    edit(copy, module, lambda text: re.sub(pattern, r"\g<1>1\g<2>", text, count=1, flags=re.MULTILINE))
    before, after = digests(original), digests(copy)
    assert {stage for stage in before if before[stage] != after[stage]} == stages


def test_changed_c_counts(original: Path, copy: Path) -> None:
    source = copy / "moa" / "base" / "kernels" / "csrc" / "lora.c"
    source.write_text(source.read_text() + "\nint another;\n")
    before, after = digests(original), digests(copy)
    assert {stage for stage in before if before[stage] != after[stage]} == {"train", "assemble", "evaluate"}


def test_a_changed_data_file_counts(original: Path, copy: Path) -> None:
    source = copy / "moa" / "data" / "quickstart" / "tables.yaml"
    source.write_text(source.read_text().replace("low: 2000", "low: 3000"))
    before, after = digests(original), digests(copy)
    assert {stage for stage in before if before[stage] != after[stage]} == {"quickstart"}


def test_without_a_home_they_are_computed_each_time(original: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert digests(original, tmp_path / "file") == digests(original)
