"""The walls between rooms: who may import what, and dvc.yaml against the code and the paths it speaks of."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from moa import code
from moa.config import Config
from moa.workspace import MANIFEST, Workspace

REPOSITORY = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "peft", "mlflow", "prefect", "dvc", "datasets", "safetensors", "pyarrow"}
# Rooms that are about tensors, or are a flow: only these may be slow to import, and only steps import them.
SLOW = {"moa.adapters", "moa.attention", "moa.batches", "moa.calibration", "moa.compiled", "moa.decoding", "moa.fused",
        "moa.generation", "moa.heads", "moa.joint", "moa.llama", "moa.lora", "moa.mapped", "moa.mixture", "moa.packing",
        "moa.paging", "moa.product", "moa.router", "moa.sampling", "moa.serving", "moa.shelf", "moa.training",
        "flows.adapt", "flows.build", "flows.deployments", "flows.drift"}
# What every stage stands on, and what words its results: no part of what it computes.
INFRASTRUCTURE = {"moa", "moa.code", "moa.workspace", "moa.config", "moa.errors", "moa.digests", "moa.progress"}
STAGES = {"base": "moa.base", "quickstart": "moa.quickstart", "prepare": "moa.corpus", "train": "moa.experts",
          "assemble": "moa.assemble", "evaluate": "moa.evaluate"}
WORDING = {"evaluate": {"moa.report"}}
# Read by many stages, a dependency of none: where a step runs must not change its result, and the base's source
# reaches every stage as the digests in the base's manifest.
EVERYWHERE = {"execution", "base"}


def _modules() -> dict[str, Path]:
    files = [path for room in ("moa", "flows") for path in sorted((REPOSITORY / room).rglob("*.py"))]
    names = {path: ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
             for path in files}
    return {name: path for path, name in names.items()}


MODULES = _modules()


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def imported(module: str) -> frozenset[str]:
    """Every module that `module` may import, at its top, inside a function or for its types; ours by full name."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively"
            assert node.module is not None
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (parts & MODULES.keys()) | (set() if parts <= MODULES.keys() else {node.module})
    return frozenset(found)


def packages(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(module)}


def importers(package: str) -> set[str]:
    return {module for module in MODULES if package in packages(module)}


# Who imports what.

def test_the_library_knows_no_prefect_and_no_flow() -> None:
    commands = {"moa.cli", "moa.cli_adapt", "moa.cli_release", "moa.cli_up"}
    assert {module for module in importers("flows") if module.startswith("moa")} == commands
    assert not {module for module in importers("prefect") if module.startswith("moa")}


def test_flows_hold_no_machine_learning() -> None:
    for module in MODULES:
        if module.startswith("flows"):
            assert not packages(module) & {"torch", "peft", "transformers", "mlflow"}, module


def test_one_room_talks_to_mlflow_and_one_to_dvc() -> None:
    assert importers("mlflow") == {"moa.tracking", "moa.registry", "moa.registration", "moa.pyfunc"}
    assert importers("dvc") == {"moa.pipeline", "moa.repository", "moa.versions"}


# What importing does.

@pytest.fixture(scope="module")
def after_imports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """What is different after one process has imported every module but the slow ones, in an empty folder."""
    folder = tmp_path_factory.mktemp("empty")
    names = sorted(MODULES.keys() - SLOW - {"moa.__main__"})
    script = f"""
import logging, os, sys
environment = dict(os.environ)
import importlib
for name in {names}:
    importlib.import_module(name)
    loaded = sorted({HEAVY} & sys.modules.keys())
    if loaded:
        sys.exit(f"{{name}} loads {{loaded}}")
print(logging.getLogger().handlers, dict(os.environ) == environment, os.listdir())
"""
    done = subprocess.run([sys.executable, "-B", "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    yield [done.stdout.strip(), done.stderr.strip()]


def test_importing_loads_nothing_heavy_and_does_nothing(after_imports: list[str]) -> None:
    assert after_imports == ["[] True []", ""]


# dvc.yaml against paths, code and parameters.

@cache
def stages() -> dict[str, dict[str, Any]]:
    written = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return {name: stage.get("do", stage) for name, stage in written.items()}


def test_dvc_finds_one_pipeline_here() -> None:
    rooms = (path for path in REPOSITORY.iterdir() if path.is_dir() and not path.name.startswith("."))
    assert not [path for room in rooms for path in room.rglob("dvc.yaml")]


def paths(entries: list[Any]) -> set[str]:
    """Of `outs` or `deps`, the name of the domain written as NAME."""
    plain = {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries}
    return {entry.replace("${key}", "NAME").replace("${item}", "NAME") for entry in plain}


def test_dvc_and_the_workspace_speak_of_the_same_paths() -> None:
    place = Workspace(Path("/"))
    raw, corpus, expert, mixture, reports, manifest, model = (
        place.relative(path) for path in (place.raw("NAME"), place.corpus("NAME"), place.expert("NAME"), place.mixture,
                                          place.reports, place.base_manifest, place.base))
    corpora, experts = (str(Path(path).parent) for path in (corpus, expert))
    outputs = {"base": {manifest, model}, "quickstart": {raw}, "prepare": {corpus}, "train": {expert},
               "assemble": {mixture}, "evaluate": {reports}}
    inputs = {"base": set(), "quickstart": set(), "prepare": {raw, manifest}, "train": {corpus, manifest},
              "assemble": {corpora, experts, manifest}, "evaluate": {corpora, mixture, manifest}}
    for name, stage in stages().items():
        assert paths(stage["outs"]) == outputs[name]
        assert {path for path in paths(stage.get("deps", [])) if path.startswith("data")} == inputs[name]
    assert stages().keys() == STAGES.keys() == outputs.keys()
    assert Path(manifest).name == MANIFEST


def reached(stage: str) -> set[str]:
    """The modules of moa that can change what `stage` computes."""
    ignored = INFRASTRUCTURE | WORDING.get(stage, set())
    found: set[str] = set()
    new = {STAGES[stage]}
    while new:
        found |= new
        new = {name for module in new for name in imported(module) & MODULES.keys()} - found - ignored
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_code_is_every_module_it_can_import(stage: str) -> None:
    listed = {f"moa/{name}" for name in code.MODULES[stage]}
    needed = {MODULES[module].relative_to(REPOSITORY).as_posix() for module in reached(stage)}
    folders = {path for path in listed if not path.endswith(".py")}
    files = {path for path in needed if not any(path.startswith(f"{folder}/") for folder in folders)}
    assert files == listed - folders, f"{stage}: moa/code.py and the imports differ"
    assert all((REPOSITORY / path).exists() for path in listed)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_lists_the_parameters_it_reads(stage: str) -> None:
    entries, place = stages()[stage]["params"], Workspace(Path("/"))
    assert entries[-1] == {place.relative(place.code): [stage]}
    own = [{place.relative(place.projection): ["${key}"]}] if stage == "train" else []
    assert [entry for entry in entries[:-1] if not isinstance(entry, str)] == own
    listed = {entry.removesuffix(".${key}") for entry in entries[:-1] if isinstance(entry, str)}
    assert listed <= Config.model_fields.keys()
    read = {node.attr for node in ast.walk(tree(STAGES[stage])) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == "config" and node.attr in Config.model_fields}
    assert read - EVERYWHERE <= listed, f"{stage} reads groups that dvc.yaml does not list"


def test_every_command_of_the_pipeline_is_a_command() -> None:
    from moa import cli

    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    for stage in stages().values():
        program, command, *_ = stage["cmd"].split()
        assert program == "moa" and command in known
