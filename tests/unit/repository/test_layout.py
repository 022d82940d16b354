"""Where modules and tests lie, what importing a module does, and dvc.yaml against the paths, stages and parameters it
speaks of. Layers are import-linter's (`make lint`)."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from moa.core import code_version
from moa.core.config import Config
from moa.core.paths import MANIFEST, Workspace
from tests.tiny import REPOSITORY

HEAVY = {"torch", "transformers", "peft", "mlflow", "prefect", "dvc", "datasets", "safetensors", "pyarrow", "jinja2"}
# Modules that are about tensors, or are a flow: only these may be slow to import, and only steps import them.
SLOW = {"moa.base.kernels.attention", "moa.base.kernels.llama_ops", "moa.experts.batches", "moa.experts.cotraining",
        "moa.experts.lora", "moa.experts.lora_autograd", "moa.experts.peft_format",
        "moa.mixture.calibration", "moa.mixture.expert_cache", "moa.mixture.generation.decoding",
        "moa.mixture.generation.engine", "moa.mixture.generation.native", "moa.mixture.generation.sampling",
        "moa.mixture.generation.static_decoding",
        "moa.mixture.joint_training", "moa.mixture.layer_routing", "moa.mixture.mixture", "moa.mixture.router",
        "moa.serving.active_release", "flows.adapt", "flows.build", "flows.deployments", "flows.drift",
        "flows.retrain"}
# Read by many stages, a dependency of none: where a step runs must not change its result, and the base's source
# reaches every stage as the digests in the base's manifest.
EVERYWHERE = {"execution", "base"}

# Folders of tests that are about no package: the checkout and the suite's own helpers, and several packages at once.
OTHER_FOLDERS = {"unit": {"repository"}, "integration": {"product"}}


def _modules() -> dict[str, Path]:
    files = [path for package in ("moa", "flows") for path in sorted((REPOSITORY / package).rglob("*.py"))]
    names = {path: ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
             for path in files}
    return {name: path for path, name in names.items()}


MODULES = _modules()


def test_the_architecture_names_every_module() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\w+", text.partition("## Packages")[2].partition("## On disk")[0]))
    known = {name.rpartition(".")[2] for name, path in MODULES.items() if path.name != "__init__.py"
             and not name.startswith(("moa.data.quickstart.", "moa.workspace.scaffold."))} - {"__main__"}
    assert known - named == set()


def test_packages_import_nothing() -> None:
    """All but `moa`, which imports its public names when they are used."""
    assert not [name for name, path in MODULES.items() if path.name == "__init__.py" and name != "moa"
                and re.search(r"^\s*(import|from) ", path.read_text(encoding="utf-8"), re.MULTILINE)]


@pytest.mark.parametrize("kind", OTHER_FOLDERS)
def test_tests_lie_and_are_named_as_what_they_test(kind: str) -> None:
    """test_MODULE.py or test_MODULE_AND_MORE.py, in the folder of the module's package."""
    root, astray = REPOSITORY / "tests" / kind, []
    for path in root.rglob("test_*.py"):
        folder = path.relative_to(root).parent
        package = ".".join(folder.parts if folder.parts[0] == "flows" else ("moa", *folder.parts))
        modules = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == package}
        if folder.name not in OTHER_FOLDERS[kind] and not any(
                f"{path.stem}_".startswith(f"test_{module}_") for module in modules):
            astray.append(path)
    assert not astray


# Private parts of frameworks, behind one door each. import-linter does not see modules within a framework.
DOORS = {"prefect": re.compile(r"flows\.prefect_server"), "transformers": re.compile(r"moa\.base\..*"),
         "dvc": re.compile(r"moa\.workspace\.dvc_repository")}
# Modules that are no part of the framework's documented interface, beside those whose names begin with an underscore.
INTERNAL = {"prefect": r"prefect\.(server|events\.worker|logging\.handlers)\b",
            "transformers": r"transformers\.(models|integrations|masking_utils|modeling_\w+)\b", "dvc": r"dvc\b"}
UNDERSCORED = re.compile(r"_(?!_)\w+")
NO_FRAMEWORKS = {"_exit", "_replace"}   # of os, and of named tuples


def private_parts(module: str, tree: ast.Module) -> Iterator[str]:
    """The private parts of other packages that a module uses outside their doors."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name) and node.value.id == "self"}
    open_doors = [name for name, door in DOORS.items() if door.fullmatch(module)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            for name in (".".join(filter(None, (origin, alias.name))) for alias in node.names):
                package = name.partition(".")[0]
                internal = package in INTERNAL and re.match(INTERNAL[package], name)
                if package not in open_doors and (internal or any(map(UNDERSCORED.fullmatch, name.split(".")))):
                    yield f"{module}:{node.lineno} imports {name}"
        elif isinstance(node, ast.Attribute) and UNDERSCORED.fullmatch(node.attr) and not open_doors:
            owner = node.value.id if isinstance(node.value, ast.Name) else None
            if owner not in ("self", "cls") and node.attr not in own | NO_FRAMEWORKS:
                yield f"{module}:{node.lineno} uses {node.attr}"


def test_private_parts_of_frameworks_have_one_door_each() -> None:
    assert not [use for name, path in MODULES.items()
                for use in private_parts(name, ast.parse(path.read_text(encoding="utf-8")))]


@pytest.mark.parametrize(("module", "code", "used"), [
    ("flows.build", "from prefect.server.api.server import create_app", True),
    ("flows.build", "from prefect._internal import concurrency", True),
    ("flows.build", "from prefect.client.orchestration import get_client", False),
    ("flows.prefect_server", "from prefect.server.api.server import create_app", False),
    ("moa.mixture.mixture", "import transformers.masking_utils", True),
    ("moa.mixture.mixture", "from transformers import DynamicCache", False),
    ("moa.mixture.mixture", "model.config._attn_implementation", True),
    ("moa.base.load", "model.config._attn_implementation", False),
    ("moa.workspace.pipeline", "from dvc.repo import Repo", True),
    ("moa.workspace.pipeline", "repo.stage_cache._load(stage)", True),
    ("moa.workspace.pipeline", "self._lock", False)])
def test_what_a_private_part_is(module: str, code: str, used: bool) -> None:
    assert bool(list(private_parts(module, ast.parse(code)))) is used


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
    assert stages().keys() == code_version.STAGES.keys() == outputs.keys()
    assert Path(manifest).name == MANIFEST


@pytest.mark.parametrize("stage", code_version.STAGES)
def test_a_stage_lists_the_parameters_it_reads(stage: str) -> None:
    entries, place = stages()[stage]["params"], Workspace(Path("/"))
    assert entries[-1] == {place.relative(place.code): [stage]}
    own = {"train": [{place.relative(place.projection): ["${key}"]}],
           "assemble": [{place.relative(place.calibration): ["extends"]}]}.get(stage, [])
    assert [entry for entry in entries[:-1] if not isinstance(entry, str)] == own
    listed = {entry.removesuffix(".${key}") for entry in entries[:-1] if isinstance(entry, str)}
    assert listed <= Config.model_fields.keys()
    step = ast.parse(MODULES[code_version.STAGES[stage]].read_text(encoding="utf-8"))
    read = {node.attr for node in ast.walk(step) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == "config" and node.attr in Config.model_fields}
    assert read - EVERYWHERE <= listed, f"{stage} reads groups that dvc.yaml does not list"


def test_every_command_of_the_pipeline_is_a_command() -> None:
    from moa.cli import main

    known = {command.name or command.callback.__name__ for command in main.app.registered_commands if command.callback}
    for stage in stages().values():
        program, command, *_ = stage["cmd"].split()
        assert program == "moa" and command in known
