"""`moa.workspace.dvc_repository.Dvc` with DVC's public interface alone: the `dvc` command and its documented files.

Slow, because each question is a process or more, and simple. tests/integration/workspace/test_dvc_commands.py holds
`DvcRepository`, which uses DVC's internals, against it: after an upgrade of DVC that test says what the internals no
longer do, and `Pipeline(workspace, DvcCommands(workspace))` goes on with the commands.

Files: https://dvc.org/doc/user-guide/project-structure (dvc.yaml, dvc.lock, .dvc files, the cache and its run cache).
It knows the part of dvc.yaml that moa's pipelines use: one file in the workspace's root, `foreach` with `do`, and
`${key}`, `${item}` and values of params.yaml. params.yaml must write out every group that a stage depends on.
"""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from moa.core.errors import PipelineError
from moa.core.paths import Workspace
from moa.core.subprocesses import environment, last_words
from moa.workspace import dvc_repository, stage_graph
from moa.workspace.dvc_repository import StageRun, dumps_yaml
from moa.workspace.stage_graph import Graph, Reason, Stage

PLACE = re.compile(r"\$\{([^}]+)\}")
EDGE = re.compile(r'^\s*"(?P<above>.+)" -> "(?P<below>.+)";?$', re.MULTILINE)   # of `dvc dag --dot`


class DvcCommands:
    """The commands, run in the workspace's root. Nothing is kept between two uses."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.root = workspace, workspace.root
        self.keep_open = False

    def close(self) -> None:
        pass

    def graph(self) -> Graph:
        stages = [Stage(name, _command(entry), tuple(map(_path, entry.get("outs", ()))))
                  for name, entry in self._stages().items()]
        for name in self._tracked():
            outs = _yaml(self.root / name)["outs"]
            stages.append(Stage(name, None, tuple(str(Path(name).parent / out["path"]) for out in outs)))
        upstream: dict[str, list[str]] = {}
        for match in EDGE.finditer(self._dvc("dag", "--dot")):
            upstream.setdefault(match["below"], []).append(match["above"])
        return Graph(stages, upstream)

    def stale(self, names: Iterable[str] | None = None) -> dict[str, tuple[Reason, ...]]:
        known, recorded = self._stages(), self._recorded()
        chosen = list(known if names is None else names)
        status = json.loads(self._dvc("status", "--json"))
        return {name: stage_graph.reasons(status[name], {}, recorded=name in recorded)
                for name in chosen if name in status and name in known}

    def restorable(self, names: Iterable[str]) -> set[str]:
        return {name for name in names if self._cached_run(self._stages()[name]) is not None}

    def inputs(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        stages = self._stages()
        return {name: {**{_path(dep): self._digest(_path(dep)) for dep in stages[name].get("deps", ())},
                       **self._params(stages[name])} for name in names}

    def begin(self, name: str, *, force: bool) -> StageRun | None:
        return StageRun([sys.executable, "-P", "-m", "dvc", "repro", "--single-item", *(["--force"] if force else []),
                         name], None)

    def record(self, names: Sequence[str], before: Mapping[str, Any] | None = None) -> list[str]:
        now = self.inputs(names) if before else {}
        changed = [name for name in names if before and now[name] != before[name]]
        if fresh := [name for name in names if name not in changed]:
            others = f" and {len(names) - 1} more" if names[1:] else ""
            self._dvc("commit", "--force", *fresh, failure=f"{names[0]}{others} could not be recorded")
        return changed

    def lock_file_is_whole(self) -> bool:
        try:
            self._dvc("status", "--json")
        except PipelineError:
            return False
        return True

    def clear_stale_locks(self) -> None:
        dvc_repository.clear_stale_locks(self.root)

    def add(self, folder: Path) -> None:
        path = self.workspace.relative(folder)
        self._dvc("add", path, failure=f"DVC cannot version {path}")

    def forget(self, names: Iterable[str], folders: Iterable[Path]) -> None:
        lock = self.root / "dvc.lock"
        if names := list(names):
            content = _yaml(lock)
            for name in names:
                del content["stages"][name]
            lock.write_text(dumps_yaml(content), encoding="utf-8")
        for folder in folders:
            ignore = folder.parent / ".gitignore"
            if ignore.exists():
                lines = [line for line in ignore.read_text(encoding="utf-8").splitlines() if line != f"/{folder.name}"]
                if lines:
                    ignore.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
                else:
                    ignore.unlink()

    def purge(self, paths: Set[str], roots: Iterable[str]) -> dict[str, int]:
        used = [out["md5"] for name in self._tracked() for out in _yaml(self.root / name)["outs"] if "md5" in out]
        used += [out["md5"] for name, entry in self._recorded().items() if name in self._stages()
                 for out in entry.get("outs", ()) if "md5" in out]
        return dvc_repository.purge(self.cache() / "runs", self._object, used, paths, roots)

    def cached(self, md5: str) -> dict[str, Path]:
        return dvc_repository.cached(md5, self._object)

    def cache(self) -> Path:
        return Path(self._dvc("cache", "dir").strip())

    def _dvc(self, *words: str, failure: str = "DVC cannot read this workspace") -> str:
        """What a command prints on standard output. Raises PipelineError that begins with `failure`."""
        done = subprocess.run([sys.executable, "-P", "-m", "dvc", *words], cwd=self.root, env=environment(),
                              capture_output=True, text=True, check=False)
        if done.returncode:
            raise PipelineError(f"{failure}: {last_words(done.stderr.splitlines(), done.returncode)}")
        return done.stdout

    def _stages(self) -> dict[str, dict[str, Any]]:
        """The entries of dvc.yaml by stage, with `foreach` written out and places filled in."""
        if not (self.root / "dvc.yaml").exists():
            return {}
        params = self._param_file("params.yaml")
        stages: dict[str, dict[str, Any]] = {}
        for name, entry in (_yaml(self.root / "dvc.yaml").get("stages") or {}).items():
            if "foreach" not in entry:
                stages[name] = _filled(entry, params)
                continue
            each = _filled(entry["foreach"], params)
            for key, item in each.items() if isinstance(each, dict) else ((item, item) for item in each or ()):
                stages[f"{name}@{key}"] = _filled(entry["do"], {**params, "key": key, "item": item})
        return stages

    def _tracked(self) -> list[str]:
        """The .dvc files, but for those that DVC does not look at."""
        files = (path.relative_to(self.root) for path in self.root.rglob("*.dvc") if path.is_file())
        return sorted(str(path) for path in files if not {".dvc", ".git", ".moa"} & set(path.parts))

    def _recorded(self) -> dict[str, Any]:
        lock = self.root / "dvc.lock"
        return (_yaml(lock).get("stages") or {}) if lock.exists() else {}

    def _param_file(self, name: str) -> dict[str, Any]:
        path = self.root / name
        if not path.exists():
            return {}
        return dict(json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else _yaml(path) or {})

    def _params(self, entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The present values of a stage's parameters, by file and key."""
        found: dict[str, dict[str, Any]] = {}
        for each in entry.get("params", ()):
            for file, keys in (each if isinstance(each, dict) else {"params.yaml": [each]}).items():
                content = self._param_file(file)
                found.setdefault(file, {}).update({key: _value(content, key) for key in keys})
        return found

    def _digest(self, path: str) -> str | None:
        """DVC's digest of a file or folder: the MD5 of a file's bytes, or of a folder's list of files."""
        place = self.root / path
        if place.is_file():
            return _md5(place.read_bytes())
        if not place.is_dir():
            return None
        files = [{"md5": _md5(each.read_bytes()), "relpath": each.relative_to(place).as_posix()}
                 for each in place.rglob("*") if each.is_file()]
        listed = sorted(files, key=lambda each: tuple(each["relpath"].split("/")))
        return f"{_md5(json.dumps(listed, sort_keys=True).encode())}.dir"

    def _cached_run(self, entry: Mapping[str, Any]) -> Any:
        """The entry of the run cache of a run with the present inputs, whose outputs are in the cache; else None."""
        deps = {_path(dep): self._digest(_path(dep)) for dep in entry.get("deps", ())}
        params = self._params(entry)
        for run in map(_yaml, sorted((self.cache() / "runs").glob("*/*/*"))):
            if (run["cmd"] == entry["cmd"] and {dep["path"]: dep["md5"] for dep in run.get("deps", ())} == deps
                    and run.get("params", {}) == params
                    and {out["path"] for out in run["outs"]} == set(map(_path, entry["outs"]))
                    and all(self._in_cache(out["md5"]) for out in run["outs"])):
                return run
        return None

    def _in_cache(self, md5: str) -> bool:
        path = Path(self._object(md5))
        return path.exists() and (not md5.endswith(".dir") or all(
            Path(self._object(each["md5"])).exists() for each in json.loads(path.read_bytes())))

    def _object(self, md5: str) -> str:
        return str(self.cache() / "files" / "md5" / md5[:2] / md5[2:])


def _yaml(path: Path) -> Any:
    from ruamel.yaml import YAML

    return YAML(typ="safe").load(path)


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _path(entry: Any) -> str:
    """The path of an entry of `deps` or `outs`, which may have options."""
    return str(next(iter(entry)) if isinstance(entry, dict) else entry)


def _command(entry: Mapping[str, Any]) -> str | None:
    command = entry.get("cmd")
    return "\n".join(command) if isinstance(command, list) else command


def _value(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _filled(entry: Any, values: Mapping[str, Any]) -> Any:
    """An entry of dvc.yaml with its places filled in; one that is nothing but a place becomes the value itself."""
    if isinstance(entry, dict):
        return {_filled(key, values): _filled(each, values) for key, each in entry.items()}
    if isinstance(entry, list):
        return [_filled(each, values) for each in entry]
    if not isinstance(entry, str):
        return entry
    if whole := PLACE.fullmatch(entry):
        return _value(values, whole[1])
    return PLACE.sub(lambda match: str(_value(values, match[1])), entry)
