"""What a user installs is the wheel: all that moa needs is in it, and a workspace may have a `flows/` of its own."""

import os
import shlex
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests import tiny

PARAMS = {"train": {"rank": 2, "alpha": 4.0, "epochs": 1, "batch_tokens": 2048},
          "evaluate": {"generate_rows": 1, "max_new_tokens": 4}, "release": {"min_rows": 4, "metric_rows": 0}}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `moa` and `flows` are the wheel's, and all else is this one's."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(["git", "clone", "-q", tiny.REPOSITORY, source], check=True)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                    "--disable-pip-version-check", "--wheel-dir", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert (site / "moa" / "py.typed").is_file()
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    return {**os.environ, "PYTHONPATH": path, "PATH": scripts, "XDG_CACHE_HOME": str(folder / "cache"),
            "OMP_NUM_THREADS": "1", "MOA_SITE": str(site)}


def run(installed: dict[str, str], root: Path, *words: str) -> str:
    """What a process prints that begins in the workspace and does not have it on its path, as the console script."""
    done = subprocess.run([sys.executable, "-P", *words], cwd=root, env=installed, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_workspace_is_made_and_built_by_the_wheel(installed: dict[str, str], tmp_path: Path) -> None:
    where = run(installed, tmp_path, "-c", "import moa, flows; print(moa.__file__, flows.__file__)").split()
    assert all(each.startswith(installed["MOA_SITE"]) for each in where)
    run(installed, tmp_path, "-m", "moa", "init", "made")
    assert {"params.yaml", "dvc.yaml", "prefect.yaml", ".dvcignore"} <= {
        path.name for path in (tmp_path / "made").iterdir()}
    workspace = tiny.workspace(tmp_path / "w", rows=60, **PARAMS)
    (workspace.root / "flows").mkdir()
    (workspace.root / "flows" / "__init__.py").write_text("raise SystemExit('the flows of a user')\n")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=workspace.root, check=True)
    for name in ("alpha", "beta"):
        run(installed, workspace.root, "-m", "moa", "domain", "add", name)
    assert "release   version 1" in run(installed, workspace.root, "-m", "moa", "run", "--local")
    run(installed, workspace.root, "-m", "moa", "report", "--html", "page.html")   # from templates in the wheel
    assert "version 1" in (workspace.root / "page.html").read_text(encoding="utf-8")
    found = run(installed, workspace.root, "-c", "from moa.base.kernels.build import library; print(library('step'))")
    assert "CDLL" in found
    assert run(installed, workspace.root, "-m", "moa", "ask", tiny.row("alpha", 1)["instruction"],
               "--max-new-tokens", "2") is not None


def test_the_demo_is_made_built_released_and_asked_by_the_wheel(installed: dict[str, str], tmp_path: Path) -> None:
    tiny.base(tmp_path / "tiny-base")
    words = ("-m", "moa", "demo", "made", "--base", "path:tiny-base", "--local")
    said = run(installed, tmp_path, *words)
    assert "champion is version 1" in said
    question = said.rpartition("$ moa ask ")[2].splitlines()[0]
    assert question == shlex.quote(shlex.split(question)[0]) and "answered)" in said.rpartition(question)[2]
    again = run(installed, tmp_path, *words)
    assert "train" not in again.partition("\n\n")[0] and "champion is version 1" in again
