"""The only room that talks to DVC: the graph, what is stale, running one stage, recording a stage run elsewhere.

It does not know what a stage does, in which order stages should run, or that Prefect exists. Graph and status are read
in process; stages run in processes of their own, which end when we do.
"""

import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moa import change, code, starts
from moa.commands import QUIET, OnLine, execute, sentence
from moa.errors import PipelineError, UsageError
from moa.graph import CHANGED, NEW, RESTORE, Graph, Reason, Snapshot, Stage
from moa.owner import Owner
from moa.workspace import Workspace


class Pipeline:
    """The stages of one workspace, through DVC."""

    def __init__(self, workspace: Workspace) -> None:
        root = workspace.root
        if not (root / ".dvc").is_dir():
            inside_git = any((folder / ".git").exists() for folder in (root, *root.parents))
            command = "dvc init --subdir" if inside_git and not (root / ".git").exists() else "dvc init"
            raise UsageError(f"{root} is not set up for DVC: run `{'' if inside_git else 'git init && '}{command}` "
                             "there first.")
        self.workspace = workspace

    @contextlib.contextmanager
    def lock(self, wait: float = 0) -> Iterator[dict[str, Any] | None]:
        """Be the one process that builds in this workspace; `wait` for so many seconds while another one does.

        The lock goes with its process, however that ends. Yields who held it last if that process was killed.
        """
        from filelock import FileLock, Timeout

        path = self.workspace.lock
        path.parent.mkdir(parents=True, exist_ok=True)
        owner = Owner.of(self.workspace)
        guard = FileLock(path, timeout=wait)
        try:
            guard.acquire()
        except Timeout:
            raise PipelineError(f"Another moa run{owner.described()} is working in this workspace; "
                                "wait for it, or end it.") from None
        try:
            abandoned = owner.read()
            with owner.seen():
                self._clear_stale_locks()
                change.undo(self.workspace)
                self._heal()
                yield abandoned
        finally:
            guard.release()

    def snapshot(self) -> Snapshot:
        """Graph and direct staleness as they are now. About half a second."""
        with self._stages() as (repo, nodes):
            stages = [Stage(name, _command(stage), tuple(self._path(out) for out in stage.outs))
                      for name, stage in nodes.items()]
            upstream: dict[str, list[str]] = {}
            for below, above in repo.index.graph.edges:
                upstream.setdefault(self._name(below), []).append(self._name(above))
            snapshot = Snapshot(Graph(stages, upstream), self._stale(nodes))
        if self._lock_file.exists():   # it could be read
            self._known_good.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._lock_file, self._known_good)
        return snapshot

    def stale(self, names: Iterable[str]) -> dict[str, tuple[Reason, ...]]:
        """Which of `names` are stale now, looking at their own inputs and outputs only."""
        with self._stages() as (_, nodes):
            return self._stale({name: nodes[name] for name in names})

    def restorable(self, names: Iterable[str]) -> set[str]:
        """Which of `names` DVC can bring back from its cache: they ran before with the inputs of now."""
        from dvc.exceptions import DvcException

        found = set()
        with self._stages() as (repo, nodes), contextlib.chdir(self.workspace.root):   # its run cache assumes so
            for name in names:
                try:
                    nodes[name].save_deps()
                    # `restore(dry=True)` would answer this in public, but looks at the inputs of the last run.
                    before = repo.stage_cache._load(nodes[name])
                    if before and repo.stage_cache._create_stage(before, wdir=nodes[name].wdir).outs_cached():
                        found.add(name)
                except DvcException:
                    continue   # an input is missing: the stage itself will say so
        return found

    def inputs(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Digest of every input of `names` as it is now, by stage and path."""
        with self._stages() as (_, nodes):
            values: dict[str, dict[str, Any]] = {}
            for name in names:
                nodes[name].save_deps()
                values[name] = {self._path(dep): str(dep.hash_info) for dep in nodes[name].deps}
            return values

    def reproduce(self, name: str, on_line: OnLine, *, force: bool = False) -> None:
        """Run one stage and record it, or bring it back from DVC's cache. Raises PipelineError naming it."""
        self._project()
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *(["--force"] if force else []), "-s", name]
        execute(self.workspace, name, command, on_line)

    def record(self, names: Sequence[str]) -> None:
        """Write stages that ran outside DVC into dvc.lock and the cache, all at once."""
        if names:
            self._project()
            command = [sys.executable, "-m", "dvc", "--wait-for-lock", "commit", "-q", "--force", *names]
            execute(self.workspace, f"record {names[0].split('@')[0]}", command, lambda _: None)

    def recorded(self) -> dict[str, Any]:
        """What dvc.lock says of each stage: command, inputs, parameters, outputs."""
        from ruamel.yaml import YAML

        if not self._lock_file.exists():
            return {}
        return (YAML(typ="safe").load(self._lock_file) or {}).get("stages") or {}

    @contextlib.contextmanager
    def _stages(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """DVC's repository, locked, and its stages by name."""
        os.environ.update({key: value for key, value in QUIET.items() if key.startswith("DVC")})
        from dvc.exceptions import DvcException
        from dvc.repo import Repo, lock_repo

        self._project()
        try:
            with hushed(), Repo(str(self.workspace.root), _wait_for_lock=True) as repo, lock_repo(repo):
                yield repo, {self._name(stage): stage for stage in repo.index.graph.nodes}
        except DvcException as error:
            raise PipelineError(f"DVC cannot read this workspace's pipeline: {sentence(str(error))}") from error

    def _project(self) -> None:
        """Bring what DVC reads from .moa/ up to date."""
        code.write(self.workspace)
        starts.project(self.workspace)

    # DVC names stages and files from the current folder; we name them from the workspace's root.

    def _name(self, stage: Any) -> str:
        file = os.path.relpath(stage.path, self.workspace.root)
        name = getattr(stage, "name", None)
        return file if name is None else name if file == "dvc.yaml" else f"{file}:{name}"

    def _path(self, entry: Any) -> str:
        path = str(entry.fs_path)
        return os.path.relpath(path, self.workspace.root) if Path(path).is_absolute() else str(entry)

    def _stale(self, nodes: Mapping[str, Any]) -> dict[str, tuple[Reason, ...]]:
        """DVC's status in our words, of stages that have a command."""
        stale: dict[str, tuple[Reason, ...]] = {}
        for name, stage in nodes.items():
            changes: list[Any] = next(iter(stage.status().values()), []) if stage.cmd else []
            if changes and not any(entry.hash_info for entry in (*stage.outs, *stage.deps)):
                stale[name] = (Reason(NEW, "never run"),)
            elif changes:
                paths = {str(entry): self._path(entry) for entry in (*stage.outs, *stage.deps)}
                stale[name] = tuple(reason for change in changes for reason in _explain(change, paths))
        return stale

    @property
    def _lock_file(self) -> Path:
        return self.workspace.root / "dvc.lock"

    @property
    def _known_good(self) -> Path:
        return self.workspace.local / "dvc.lock.known-good"

    def _heal(self) -> None:
        """Put back a dvc.lock that was cut off: DVC does not write it in one go.

        What was recorded since the copy is found again in DVC's cache.
        """
        if not self._lock_file.exists():
            return
        from dvc.schema import COMPILED_LOCKFILE_SCHEMA
        from ruamel.yaml import YAML, YAMLError
        from voluptuous import Invalid

        try:
            COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(self._lock_file))
        except (YAMLError, Invalid):
            if self._known_good.exists():
                shutil.copyfile(self._known_good, self._lock_file)
            else:
                self._lock_file.unlink()

    def _clear_stale_locks(self) -> None:
        """Forget path locks of processes that are gone: after a crash their pids may be other programs' by now."""
        rwlock = self.workspace.root / ".dvc" / "tmp" / "rwlock"
        try:
            held = json.loads(rwlock.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except ValueError:
            held = {}   # cut off while it was written
        owners = [info["pid"] for info in held.get("write", {}).values()]
        owners += [info["pid"] for infos in held.get("read", {}).values() for info in infos]
        if not any(_is_dvc(pid) for pid in owners):
            rwlock.unlink(missing_ok=True)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """No warnings: of locks left by killed processes, and of outputs that are not there yet."""
    logger = logging.getLogger("dvc")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _is_dvc(pid: int) -> bool:
    import psutil  # comes with DVC

    try:
        return any("dvc" in Path(part).name for part in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def _command(stage: Any) -> str | None:
    command = stage.cmd
    return "\n".join(command) if isinstance(command, list) else command


def _explain(change: Any, paths: Mapping[str, str]) -> Iterator[Reason]:
    """One entry of DVC's status: a word, or changed inputs or outputs by path."""
    if not isinstance(change, Mapping):
        yield Reason(CHANGED, "its command changed" if change == "changed command" else str(change))
        return
    for path, state in change.get("changed deps", {}).items():
        if isinstance(state, Mapping):
            begins = path.endswith(".moa/starts.json")
            yield from (Reason(CHANGED, "where its training begins changed" if begins else
                               f"parameter {key} {_state(how)}") for key, how in state.items())
        else:
            yield Reason(CHANGED, f"{paths.get(path, path)} {_state(state)}")
    for path, state in change.get("changed outs", {}).items():
        if state == "modified":
            yield Reason(CHANGED, f"its output {paths.get(path, path)} was changed by something else")
        else:
            yield Reason(RESTORE, f"its output {paths.get(path, path)} is "
                                  f"{'missing' if state == 'deleted' else state}")


def _state(state: str) -> str:
    return {"modified": "changed", "deleted": "is missing", "new": "is new"}.get(state, state)
