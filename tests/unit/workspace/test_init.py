"""`moa init`: what a new workspace holds, what it leaves alone, and that it may be interrupted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from moa.core import config, files
from moa.core.config_reference import effective
from moa.core.errors import BaseModelError, PipelineError, UsageError
from moa.core.paths import Workspace
from moa.workspace import init
from moa.workspace.pipeline import Pipeline
from tests.tiny import REPOSITORY

FILES = {".dvc/.gitignore", ".dvc/config", ".dvcignore", ".gitignore", "data/.gitignore", "data/README.md", "dvc.yaml",
         "params.yaml", "prefect.yaml"}


def contents(root: Path) -> dict[str, bytes]:
    """What git could keep."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z", "."], cwd=root, check=True,
                            capture_output=True, text=True).stdout
    return {name: (root / name).read_bytes() for name in listed.split("\0") if name}


def scaffold(name: str, project: str) -> str:
    return (init.SCAFFOLD / name).read_text().replace(init.PROJECT, project)


def test_the_pipeline_is_this_repositorys() -> None:
    assert (init.SCAFFOLD / "pipeline.yaml").read_bytes() == (REPOSITORY / "dvc.yaml").read_bytes()
    ours = config.load(REPOSITORY / "params.yaml").project
    assert ours and scaffold("prefect.yaml", ours) == (REPOSITORY / "prefect.yaml").read_text()
    assert ours and scaffold("quickstart.yaml", ours) == (REPOSITORY / "params.yaml").read_text()
    assert (init.SCAFFOLD / "data" / "gitignore").read_bytes() == (REPOSITORY / "data" / ".gitignore").read_bytes()


def test_the_parameters_are_valid_and_name_what_is_watched(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(scaffold("params.yaml", "shop-1a2b3c"))
    content = config.load(tmp_path / "params.yaml")
    assert content.project == "shop-1a2b3c"
    assert content.domains == {} and content.quickstart == [] and content.base.source == init.DEFAULT_BASE
    written = YAML(typ="safe").load(init.SCAFFOLD / "params.yaml")
    assert set(config.LEFT_OUT) <= written.keys()   # so that DVC's own command reads the pipeline, too
    assert [each.name for group in effective(content) for each in group.parameters if each.differs] == [
        "format", "project", "prompt.system"]


def test_what_is_made(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "er"
    done = init.init(root, None, tmp_path)
    assert contents(root).keys() == FILES and done["git"] and done["dvc"]
    assert Workspace.find(root) == Workspace(root)
    snapshot = Pipeline(Workspace(root)).snapshot()
    assert set(snapshot.graph.stages) == {"base", "assemble", "evaluate"}
    assert "cd deep/er" in init.text(done, tmp_path) and "moa domain add NAME FILE" in init.text(done, tmp_path)
    (root / ".moa" / "x").write_text("")
    (root / "data" / "x.tmp").write_text("")
    assert contents(root).keys() == FILES


def test_the_demo_is_made_once_and_takes_no_other_workspace(tmp_path: Path) -> None:
    demo, mine = tmp_path / "demo", tmp_path / "mine"
    assert init.demo(demo, None, tmp_path)
    made = contents(demo)
    assert set(config.load(demo / "params.yaml").domains) == {"math", "sql", "extract", "python"}
    assert not init.demo(demo, None, tmp_path) and contents(demo) == made
    done = init.init(mine, None, tmp_path)
    assert "moa domain add" in init.text(done, tmp_path)
    with pytest.raises(UsageError, match="mine is a workspace with domains of its own"):
        init.demo(mine, None, tmp_path)


def test_below_a_git_repository_with_files_of_its_own(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    root = tmp_path / "part"
    (root / "data").mkdir(parents=True)
    (root / ".gitignore").write_text("*.log\n.moa/")
    (root / "data" / "README.md").write_text("ours")
    done = init.init(root, None, tmp_path)
    assert not done["git"] and not (root / ".git").exists() and done["dvc"]
    assert (root / ".gitignore").read_text() == "*.log\n.moa/\n*.tmp\n"
    assert (root / "data" / "README.md").read_text() == "ours" and "data/README.md" not in done["files"]
    assert Pipeline(Workspace(root)).snapshot().graph.stages


@pytest.mark.parametrize("name", ["params.yaml", "dvc.yaml"])
def test_nothing_is_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("stages: {}\n")
    with pytest.raises(UsageError, match=f"has a {name} of its own, and `moa init` overwrites nothing"):
        init.init(tmp_path, None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_workspace_is_left_alone(tmp_path: Path) -> None:
    init.init(tmp_path, None, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="is a workspace already"):
        init.init(tmp_path, None, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; name a folder"):
        init.init(tmp_path / "file", None, tmp_path)
    assert contents(tmp_path) == before | {"file": b""}


@pytest.mark.parametrize(("source", "written"), [
    ("hub:own/model@main", "hub:own/model@main"), ("wheel:llm-x==1.0", "wheel:llm-x==1.0"),
    ("path:bases/ my # one", "path:../bases/ my # one")])
def test_another_base(source: str, written: str, tmp_path: Path) -> None:
    (tmp_path / "bases" / " my # one").mkdir(parents=True)
    init.init(tmp_path / "w", source, tmp_path)
    text = (tmp_path / "w" / "params.yaml").read_text()
    assert config.load(tmp_path / "w" / "params.yaml").base.source == written and "# or hub:NAME@REVISION" in text


@pytest.mark.parametrize(("source", "sentence"), [
    ("smollm", "base.source 'smollm' is not understood"), ("path:nowhere", "there is no folder nowhere")])
def test_a_base_that_is_none(source: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=sentence):
        init.init(tmp_path / "w", source, tmp_path)
    assert not (tmp_path / "w").exists()


def without_id(root: Path) -> dict[str, bytes]:
    """`contents` with a placeholder for the id that params.yaml names."""
    project = config.load(root / "params.yaml").project
    assert project
    return {name: data.replace(project.encode(), b"ID") for name, data in contents(root).items()}


@pytest.mark.parametrize(("folder", "begins"), [("Kunden & Support", "kunden-support-"), ("日本", "project-"),
                                                ("x" * 80, "x" * 24 + "-"), ("-a-", "a-")])
def test_each_workspace_has_an_id_of_its_own(folder: str, begins: str, tmp_path: Path) -> None:
    found = []
    for place in ("one", "other"):
        init.init(tmp_path / place / folder, None, tmp_path)
        project = config.load(tmp_path / place / folder / "params.yaml").project
        assert project and project.startswith(begins) and len(project) == len(begins) + 6
        assert f"moa.project.{project}.domain.*" in (tmp_path / place / folder / "prefect.yaml").read_text()
        found.append(project)
    assert found[0] != found[1]


def test_an_interrupted_init_is_run_again(tmp_path: Path) -> None:
    init.init(tmp_path / "whole", None, tmp_path)
    wanted = without_id(tmp_path / "whole")
    write = files.write_atomic
    for number in range(6):
        root, calls = tmp_path / f"w{number}", []

        def stop(path: Path, data: bytes, last: int = number, calls: list[Any] = calls) -> None:
            if len(calls) == last:
                raise KeyboardInterrupt
            calls.append(path)
            write(path, data)

        with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
            patch.setattr(init, "write_atomic", stop)
            init.init(root, None, tmp_path)
        assert not ((root / "params.yaml").exists() and (root / "dvc.yaml").exists())
        init.init(root, None, tmp_path)
        assert without_id(root) == wanted   # one id, that which the first run chose


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot become a workspace: Not a directory; mend that and run `moa init`"):
        init.init(tmp_path / "file" / "w", None, tmp_path)


def test_dvc_that_had_hardly_begun(tmp_path: Path) -> None:
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    assert init.init(tmp_path, None, tmp_path)["dvc"]
    other = tmp_path / "ignored"
    other.mkdir()
    (other / ".gitignore").write_text(".dvc\n")
    with pytest.raises(PipelineError, match="DVC cannot be set up"):
        init.init(other, None, tmp_path)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    def moa(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "moa", *words], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "COLUMNS": "100"})

    done = moa("init", "w", "--json")
    assert done.returncode == 0 and set(json.loads(done.stdout)["files"]) == FILES - {".dvc/.gitignore", ".dvc/config"}
    again = moa("init", "w")
    assert again.returncode == 2 and again.stderr.startswith(f"moa: {tmp_path / 'w'} is a workspace already")
    for words in (["status", "--workspace", "w"], ["--workspace", "w", "status"],
                  ["domain", "list", "--workspace", "w"], ["domain", "--workspace", "w", "list"]):
        assert moa(*words).returncode == 0, words
    for words in (["plan"], ["domain"], ["domain", "add"], ["train"], []):
        assert "--workspace" in moa(*words, "--help").stdout, words
