"""A workspace says which layout it has, and a newer one is refused before anything is read or changed."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from filelock import FileLock

from moa.core import layout
from moa.core.errors import ConfigError
from moa.core.paths import Workspace
from moa.workspace import init
from moa.workspace.pipeline import Pipeline
from tests import tiny

NEWER = layout.LAYOUT + 1
COMMANDS = [["status"], ["plan"], ["run", "--local"], ["ask", "?"], ["release", "list"], ["domain", "list"],
            ["upgrade"], ["ingest", "a", "b"], ["train", "--domain", "a"], ["up"]]


def make(root: Path, tracked: int | None = None, local: int | str | None = None) -> Path:
    """A folder that is taken for a workspace with these layouts."""
    (root / ".moa").mkdir()
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / "params.yaml").write_text("" if tracked is None else f"base: {{}}\nformat: {tracked}   # a comment\n")
    if local is not None:
        (root / ".moa" / "format").write_text(f"{local}\n")
    return root


@pytest.mark.parametrize("tracked", [None, 0, layout.LAYOUT])
@pytest.mark.parametrize("local", [None, 0, layout.LAYOUT])
def test_an_older_layout_is_read(tmp_path: Path, tracked: int | None, local: int | None) -> None:
    assert Workspace.find(make(tmp_path, tracked, local)) == Workspace(tmp_path)
    assert (layout.tracked_layout(tmp_path), layout.local_layout(tmp_path)) == (tracked, local)


@pytest.mark.parametrize(("tracked", "local", "place"), [(NEWER, None, "params.yaml"), (None, NEWER, r"\.moa/format"),
                                                         (NEWER, 1, "params.yaml"), (1, 12345, r"\.moa/format")])
def test_a_newer_layout_is_refused(tmp_path: Path, tracked: int | None, local: int | None, place: str) -> None:
    make(tmp_path, tracked, local)
    (tmp_path / "below").mkdir()
    sentence = (rf"This workspace has layout \d+ \({place}\), which a newer moa made, and moa \S+ reads layouts 0 "
                r"to 1: run `pip install -U moa-lora` and the command again\.")
    with pytest.raises(ConfigError, match=rf"^{sentence}$"):
        Workspace.find(tmp_path / "below")


def test_the_sentence_names_the_distribution() -> None:
    project = tomllib.loads((tiny.REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"pip install -U {project['name']}`" in Path(layout.__file__).read_text(encoding="utf-8")


@pytest.mark.parametrize("line", ['"format": 9', "'format': 9", "format : 9", "format:\t9", "format: 9 #"])
def test_the_number_is_found_however_its_line_is_written(tmp_path: Path, line: str) -> None:
    make(tmp_path)
    (tmp_path / "params.yaml").write_bytes(f"base: {{}}\n{line}\nprompt: {{}}\n".encode())
    assert layout.tracked_layout(tmp_path) == 9


def test_a_number_elsewhere_in_the_parameters_is_none_of_the_layout(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "params.yaml").write_text("prompt:\n  format: 9\n  system: |\n    format: 9\n# format: 9\nformats: 9\n")
    assert layout.tracked_layout(tmp_path) is None


@pytest.mark.parametrize("text", ["", "two", "1.5", "-1", "1 2"])
def test_a_damaged_number_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"\.moa/format should hold the number .*: delete the file"):
        Workspace.find(make(tmp_path, local=text))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_refuses_it_and_changes_nothing(tmp_path: Path, words: list[str]) -> None:
    make(tmp_path, local=NEWER)
    done = subprocess.run([sys.executable, "-m", "moa", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == ConfigError.exit_code and done.stderr.startswith("moa: This workspace has layout 2")
    assert done.stderr.count("\n") == 1 and not done.stdout
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".moa", "dvc.yaml", "format", "params.yaml"]


def test_a_new_workspace_says_it_in_both_places(tmp_path: Path) -> None:
    root = tmp_path / "w"
    init.init(root, None, tmp_path)
    assert layout.tracked_layout(root) == layout.local_layout(root) == layout.LAYOUT


def test_a_clone_says_it_with_its_first_change(tmp_path: Path) -> None:
    root = tmp_path / "w"
    init.init(root, None, tmp_path)
    (root / ".moa" / "format").unlink()   # git does not keep it
    workspace = Workspace.find(root)
    Pipeline(workspace).snapshot()
    assert layout.local_layout(root) is None
    with Pipeline(workspace).lock():
        assert layout.local_layout(root) == layout.LAYOUT
    (root / ".moa" / "format").write_text("0\n")   # what is there stays
    with Pipeline(workspace).lock():
        assert layout.local_layout(root) == 0
    with FileLock(workspace.lock):
        assert Workspace.find(root) == workspace
