"""`moa upgrade`: brings the files of an older workspace to the present layout, in one transaction.

`plan` makes the new texts from the old ones and changes nothing. Comments and the users' values are preserved: the
upgrade removes only keys that moa no longer reads, and adds only what moa's own stages must name. No name on a server
changes, so a workspace without a project id gets none. Where a key is removed from params.yaml, it is also removed from
dvc.lock, so that the removal makes no stage stale.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

from moa.core import config as parameters
from moa.core import layout
from moa.core.config import Config
from moa.core.errors import ConfigError
from moa.core.paths import Workspace
from moa.core.project import Names
from moa.core.transaction import transaction
from moa.experts import warm_start
from moa.workspace import params_editor, stage_inputs
from moa.workspace.dvc_repository import dumps_yaml, parse_for_update
from moa.workspace.init import SCAFFOLD
from moa.workspace.pipeline import Pipeline

PARAMS, PIPELINE, LOCK, PREFECT = FILES = ("params.yaml", "dvc.yaml", "dvc.lock", "prefect.yaml")
FORMAT_COMMENT = "of this folder's files; `moa upgrade` raises it"
OLD_TRIGGER = "moa.domain.*"   # matches no event of a project with an id
ENTRYPOINTS = {"flows.adapt.retrain": "flows.retrain.retrain"}   # former names, which still work
Texts = dict[str, str]         # by file


@dataclass
class Upgrade:
    """The changes of an upgrade, made or planned."""

    old: Texts
    new: Texts
    done: list[str] = field(default_factory=list)   # descriptions of the changes
    left: list[str] = field(default_factory=list)   # what the user must decide

    def diff(self) -> str:
        """The changes as a unified diff, which `git apply` accepts."""
        return "".join(line if line.endswith("\n") else f"{line}\n" for name in self.changed()
                       for line in difflib.unified_diff(_lines(self.old[name]), _lines(self.new[name]),
                                                        f"a/{name}", f"b/{name}"))

    def changed(self) -> list[str]:
        """Names of the files that change."""
        return [name for name in FILES if self.new.get(name) != self.old.get(name)]

    def as_dict(self, *, dry_run: bool) -> dict[str, Any]:
        """The upgrade as a JSON value, for --json."""
        return {"layout": layout.LAYOUT, "dry_run": dry_run, "files": self.changed(), "done": self.done,
                "left": self.left, "diff": self.diff()}

    def text(self, *, dry_run: bool) -> str:
        """The upgrade as text for a terminal."""
        left = [f"Left as it is: {line}." for line in self.left]
        if not self.changed():
            return "\n".join([f"Nothing to do: the workspace has layout {layout.LAYOUT}.", *left])
        if dry_run:
            return "\n".join([self.diff(), *left, "Nothing was changed: `moa upgrade` does this."])
        return "\n".join([*(f"  {line}" for line in self.done), *left, f"The workspace has layout {layout.LAYOUT} now. "
                          f"Commit {', '.join(self.changed())} to git."])


def upgrade(workspace: Workspace, *, dry_run: bool = False) -> Upgrade:
    """Upgrade the workspace's files to the present layout, or with `dry_run` only plan it. Returns the changes.

    Raises ConfigError where a file cannot be read or must be edited by hand; nothing has changed then.
    """
    if dry_run:
        return plan(workspace, _read(workspace.root))
    with Pipeline(workspace).lock():
        made = plan(workspace, _read(workspace.root))
        files = {workspace.root / name: made.new[name] for name in made.changed()}
        if files:
            with transaction(workspace, "moa upgrade", files=files) as change:
                for path, text in files.items():
                    change.write(path, text)
    return made


def plan(workspace: Workspace, texts: Mapping[str, str]) -> Upgrade:
    """Plan the upgrade of files with these texts, by name. Changes nothing. Raises ConfigError."""
    made = Upgrade(dict(texts), dict(texts))
    config, removed = parameters.parse(texts[PARAMS], Path(PARAMS))
    for name in removed:
        if name in texts[PIPELINE]:   # as a parameter of a stage, or in a command
            made.left.append(f"{name} in {PARAMS}, which {PIPELINE} names and moa reads no more")
            continue
        made.new[PARAMS] = params_editor.remove_key(made.new[PARAMS], *name.split("."))
        made.done.append(f"{PARAMS}: {name} removed, which had no effect any more")
    if (config.format or 0) < layout.LAYOUT:
        made.new[PARAMS] = params_editor.set_number(made.new[PARAMS], "format", layout.LAYOUT, FORMAT_COMMENT)
        made.done.append(f"{PARAMS}: layout {layout.LAYOUT} named")
    edit_pipeline(workspace, made)
    edit_lock(workspace, made, [name for name in removed if not any(name in line for line in made.left)])
    edit_prefect(made, config)
    return made


# dvc.yaml

def edit_pipeline(workspace: Workspace, made: Upgrade) -> None:
    """Add to moa's own stages in dvc.yaml the parameters that they lack, and remove dependencies on modules of moa.

    A stage with another command than moa's stays as it is. Updates `made`.
    """
    yaml, content = _editable(made.new[PIPELINE], PIPELINE)
    before = len(made.done)
    for name, ours in _our_stages().items():
        stage = _body(content, name)
        if stage is None or stage.get("cmd") != ours["cmd"]:
            continue
        params = stage.setdefault("params", [])
        for at, entry in enumerate(ours["params"]):
            if isinstance(params, list) and not any(_covers(other, entry) for other in params):
                params.insert(at, entry)
                made.done.append(f"{PIPELINE}: {name} depends on {_named(entry)}")
        for path in [path for path in _modules(stage) if not (workspace.root / path).exists()]:
            stage["deps"].remove(path)
            made.done.append(f"{PIPELINE}: {name} depends no more on {path}, which is not there")
        if stage.get("deps") == []:
            del stage["deps"]
    if len(made.done) > before:
        made.new[PIPELINE] = _dumped(yaml, content, made.old[PIPELINE])


def _our_stages() -> dict[str, Any]:
    """The stages of a new workspace's dvc.yaml, each without its loop over domains."""
    _, content = _editable((SCAFFOLD / "pipeline.yaml").read_text("utf-8"), "pipeline.yaml")
    return {name: stage.get("do", stage) for name, stage in content["stages"].items()}


def _body(content: Any, name: str) -> Any:
    """The definition of a stage in dvc.yaml, without its loop over domains; None where it is missing or malformed."""
    stages = content.get("stages") if isinstance(content, Mapping) else None
    stage = stages.get(name) if isinstance(stages, Mapping) else None
    body = stage.get("do", stage) if isinstance(stage, Mapping) else None
    return body if isinstance(body, Mapping) else None


def _covers(entry: Any, wanted: Any) -> bool:
    """Whether a stage that lists `entry` among its parameters depends on `wanted`."""
    if isinstance(entry, Mapping) and isinstance(wanted, Mapping):
        return all(file in entry and (not entry[file] or set(keys) <= set(entry[file]))
                   for file, keys in wanted.items())
    return entry == wanted or (isinstance(entry, str) and isinstance(wanted, str) and wanted.startswith(f"{entry}."))


def _named(entry: Any) -> str:
    """An entry of a stage's parameters in words: its key, or its file."""
    return ", ".join(entry) if isinstance(entry, Mapping) else str(entry)


def _modules(stage: Mapping[str, Any]) -> list[str]:
    """The stage's dependencies on modules of moa, from before the code's digest was a parameter."""
    deps = stage.get("deps")
    listed = deps if isinstance(deps, list) else []
    return [path for path in listed if isinstance(path, str) and path.startswith("moa/")]


# dvc.lock

def edit_lock(workspace: Workspace, made: Upgrade, removed: list[str]) -> None:
    """Edit what stages recorded in dvc.lock, so that changes without effect on results make no stage stale.

    DVC compares whole groups of params.yaml with the recorded ones, so keys that are `removed` are removed here, too. A
    training that recorded no initial expert gets the present one, and a mixture that recorded no calibration extends
    none: older layouts had no such parameters. Updates `made`.
    """
    if LOCK not in made.old:
        return
    stages = (_parsed(made.old[LOCK], LOCK) or {}).get("stages") or {}
    starts = warm_start.read(workspace) if made.new[PIPELINE] != made.old[PIPELINE] else None
    edits = [*_recorded(stages, removed), *([] if starts is None else [*_startless(workspace, stages, starts),
                                                                       *_uncalibrated(workspace, stages)])]
    if not edits:
        return
    content = parse_for_update(made.old[LOCK], LOCK)
    for name, file, group, value in edits:
        recorded = content["stages"][name]["params"]
        if file == PARAMS:
            del recorded[file][group][value]
            made.done.append(f"{LOCK}: {group}.{value} removed from what {name} recorded")
        else:
            recorded[file] = {group: value}
            what = "that it extends no calibration" if name == "assemble" else "where its training began"
            made.done.append(f"{LOCK}: {name} recorded {what}")
    made.new[LOCK] = dumps_yaml(content)


def _recorded(stages: Mapping[str, Any], removed: list[str]) -> Iterator[tuple[str, str, str, Any]]:
    """Stage, file, group and key of every removed key that a stage recorded in its group."""
    for name, stage in stages.items():
        groups = (stage.get("params") or {}).get(PARAMS) or {}
        for group, key in (each.split(".") for each in removed):
            if isinstance(groups.get(group), Mapping) and key in groups[group]:
                yield name, PARAMS, group, key


def _startless(workspace: Workspace, stages: Mapping[str, Any],
               starts: Mapping[str, warm_start.InitialExpert]) -> Iterator[tuple[str, str, str, Any]]:
    """Stage, file, domain and start of every training that recorded none."""
    file = workspace.relative(workspace.projection)
    for name, stage in stages.items():
        step, _, domain = name.partition("@")
        if step == "train" and domain and file not in (stage.get("params") or {file: None}):
            yield name, file, domain, stage_inputs.entry(workspace, starts[domain]) if domain in starts else None


def _uncalibrated(workspace: Workspace, stages: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Any]]:
    """The same of stage `assemble`, where it recorded no calibration that it extends."""
    file = workspace.relative(workspace.calibration)
    if "assemble" in stages and file not in (stages["assemble"].get("params") or {file: None}):
        yield "assemble", file, "extends", None


# prefect.yaml

def edit_prefect(made: Upgrade, config: Config) -> None:
    """Rename flows in prefect.yaml to their present names, and make triggers match the events of a project with an id.

    Updates `made`.
    """
    if PREFECT not in made.old or not any(each in made.old[PREFECT] for each in (OLD_TRIGGER, *ENTRYPOINTS)):
        return
    yaml, content = _editable(made.old[PREFECT], PREFECT)
    resource, retargeted, renamed = Names.of(config).resource("domain", "*"), False, False
    for deployment in _list(content, "deployments"):
        if isinstance(deployment, dict) and deployment.get("entrypoint") in ENTRYPOINTS:
            former = deployment["entrypoint"]
            deployment["entrypoint"], renamed = ENTRYPOINTS[former], True
            made.done.append(f"{PREFECT}: {former} is called {ENTRYPOINTS[former]}")
        if config.project is None:
            continue
        for trigger in _list(deployment, "triggers"):
            match = trigger.get("match") if isinstance(trigger, Mapping) else None
            if isinstance(match, dict) and match.get("prefect.resource.id") == OLD_TRIGGER:
                match["prefect.resource.id"], retargeted = resource, True
    if retargeted:
        made.done.append(f"{PREFECT}: the trigger matches {resource}")
    if retargeted or renamed:
        made.new[PREFECT] = _dumped(yaml, content, made.old[PREFECT])


def _list(content: Any, key: str) -> list[Any]:
    """The list under `key`; empty where there is none."""
    value = content.get(key) if isinstance(content, Mapping) else None
    return value if isinstance(value, list) else []


# Texts

def _read(root: Path) -> Texts:
    """The texts of those of `FILES` that exist. Raises ConfigError."""
    texts = {}
    for name in FILES:
        try:
            texts[name] = (root / name).read_bytes().decode("utf-8")   # line ends stay as they are
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name} cannot be read ({error}).") from None
    return texts


def _editable(text: str, name: str) -> tuple[Any, Any]:
    """A YAML parser that preserves comments and quotes, and the parsed text. Raises ConfigError."""
    yaml: Any = YAML()
    yaml.preserve_quotes, yaml.width, yaml.brace_single_entry_mapping_in_flow_sequence = True, 1 << 20, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml, _parsed(text, name, yaml)


def _parsed(text: str, name: str, yaml: Any = None) -> Any:
    try:
        return (yaml or YAML(typ="safe")).load(text)
    except YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None


def _dumped(yaml: Any, content: Any, old: str) -> str:
    out = StringIO()
    yaml.dump(content, out)
    return out.getvalue().replace("\n", "\r\n") if "\r\n" in old else out.getvalue()


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)
