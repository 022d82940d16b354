"""The workspace's DVC pipeline: the graph, what is stale, running one stage, recording a stage run elsewhere.

It does not know what a stage does, in which order stages should run, or that Prefect exists. DVC is asked and told in
process, and stays open while the workspace's lock is held; stages run in processes of their own, which end when we do.

DVC reads and writes the whole of dvc.lock to record one stage, which takes seconds where there are hundreds of them:
`spliced` replaces one stage's entry in the text instead, and leaves every other byte as it was.
"""

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moa.core import code_version, layout, transaction
from moa.core.errors import PipelineError, UsageError
from moa.core.files import write_atomic
from moa.core.paths import Workspace
from moa.core.subprocesses import OnLine, execute, steps_forked
from moa.workspace import origins, stage_graph, stage_inputs
from moa.workspace.dvc_repository import DvcRepository, release_memory
from moa.workspace.lock import LockHolder
from moa.workspace.stage_graph import Graph, Reason, Snapshot, Stage

HEAD = "schema: '2.0'\nstages:\n"
ENTRY = re.compile(r"^(?=  \S)", re.MULTILINE)          # an entry begins where a line is indented by two
NAME = re.compile(r"  ([\w@.+/-]+(?::[\w@.+/-]+)*):\n")   # that line, written as DVC writes it


def spliced(text: str, entries: Mapping[str, str]) -> str | None:
    """`text` with `entries`: by stage, the lines of its own that DVC would write, the name included.

    New stages come last. None where `text` is not as DVC writes it, and so must be left to DVC.
    """
    if not (text or HEAD).startswith(HEAD):
        return None
    before, *rest = ENTRY.split((text or HEAD)[len(HEAD):])
    blocks: dict[str, str] = {}
    for block in rest:
        found = NAME.match(block)
        if not found or found[1] in blocks or not block.endswith("\n") or re.search(r"^\S", block, re.MULTILINE):
            return None   # a name in quotes, a comment, another group behind the stages
        blocks[found[1]] = block
    if before or any(not (found := NAME.match(block)) or found[1] != name for name, block in entries.items()):
        return None
    return HEAD + "".join({**blocks, **entries}.values())


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
        self._repository = DvcRepository(root)

    @contextlib.contextmanager
    def lock(self, wait: float = 0) -> Iterator[dict[str, Any] | None]:
        """Be the one process that builds in this workspace; `wait` for so many seconds while another one does.

        The lock goes with its process, however that ends. Yields who held it last if that process was killed.
        """
        from filelock import FileLock, Timeout

        path = self.workspace.lock
        path.parent.mkdir(parents=True, exist_ok=True)
        owner = LockHolder.of(self.workspace)
        guard = FileLock(path, timeout=wait)
        try:
            guard.acquire()
        except Timeout:
            raise PipelineError(f"Another moa run{owner.described()} is working in this workspace; "
                                "wait for it, or end it.") from None
        try:
            abandoned = owner.read()
            with owner.seen():
                layout.write_local_layout(self.workspace.root)
                self._clear_stale_locks()
                transaction.undo(self.workspace)
                origins.mend(self.workspace)
                self._heal()
                self._repository.kept = True
                with steps_forked():
                    yield abandoned
        finally:
            self._repository.kept = False
            self._repository.close()
            guard.release()

    def snapshot(self) -> Snapshot:
        """Graph and direct staleness as they are now. About half a second."""
        self._repository.close()   # there may be other data without a command
        with self._stages() as (repo, nodes):
            stages = [Stage(name, _command(stage), tuple(self._path(out) for out in stage.outs))
                      for name, stage in nodes.items()]
            upstream: dict[str, list[str]] = {}
            for below, above in repo.index.graph.edges:
                upstream.setdefault(self._repository.name(below), []).append(self._repository.name(above))
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
        with self._stages() as (repo, nodes):
            for name in release_memory(names):
                stage = nodes[name]
                recorded = [(dep, dep.hash_info, dep.meta) for dep in stage.deps]
                try:
                    stage.save_deps()
                    # `restore(dry=True)` would answer this in public, but looks at the inputs of the last run.
                    before = repo.stage_cache._load(stage)
                    if before and repo.stage_cache._create_stage(before, wdir=stage.wdir).outs_cached():
                        found.add(name)
                except DvcException:
                    continue   # an input is missing: the stage itself will say so
                finally:
                    for dep, hash_info, meta in recorded:
                        dep.hash_info, dep.meta = hash_info, meta
        return found

    def inputs(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Digest of every input of `names` as it is now, by stage and path."""
        with self._stages() as (_, nodes):
            return {name: self._inputs(nodes[name]) for name in release_memory(names)}

    def reproduce(self, name: str, on_line: OnLine, *, force: bool = False) -> None:
        """Run one stage and record it, or bring it back from DVC's cache. Raises PipelineError naming it.

        A failure leaves dvc.lock as it was.
        """
        with self._stages(f"{name} failed") as (repo, nodes):
            stage = nodes[name]
            if simple := _simple(name, stage):
                stage.remove_outs()
                if not force and _restored(repo, stage):
                    self._save(repo, [stage])
                    return
                before = {name: self._inputs(stage)}
        try:
            if not simple:
                words = ["--wait-for-lock", "repro", *(["--force"] if force else []), "-s", name]
                execute(self.workspace, name, [sys.executable, "-m", "dvc", *words], on_line)
                return
            execute(self.workspace, name, ["/bin/sh", "-c", stage.cmd], on_line, {"DVC_STAGE": name})
            if self.record([name], before):
                raise PipelineError(f"{name}: its inputs changed while it was running; run again.")
        except BaseException:
            self._repository.close()   # it remembers what has not come true
            raise

    def record(self, names: Sequence[str], before: Mapping[str, Any] | None = None) -> list[str]:
        """Write stages that ran outside DVC into dvc.lock and the cache, all at once.

        Those whose `inputs` are not what they were `before` are left out, and returned.
        """
        if not names:
            return []
        more = f" and {len(names) - 1} more" if names[1:] else ""
        with self._stages(f"{names[0]}{more} could not be recorded") as (repo, nodes):
            changed = [name for name in release_memory(names) if before and self._inputs(nodes[name]) != before[name]]
            self._save(repo, [nodes[name] for name in names if name not in changed])
        return changed

    def recorded(self) -> dict[str, Any]:
        """What dvc.lock says of each stage: command, inputs, parameters, outputs."""
        from ruamel.yaml import YAML

        if not self._lock_file.exists():
            return {}
        return (YAML(typ="safe").load(self._lock_file) or {}).get("stages") or {}

    @contextlib.contextmanager
    def _stages(self, *what: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        """DVC's repository, locked, and its stages by name; `what` begins the sentence that says it failed."""
        stage_inputs.write_stage_inputs(self.workspace)
        with self._repository.stages(*what) as (repo, nodes):
            yield repo, nodes

    def _save(self, repo: Any, stages: Sequence[Any]) -> None:
        """As `dvc commit --force`, with one write of dvc.lock; no remembered run where an output is not cached."""
        from dvc.stage.serialize import to_lockfile
        from dvc.utils.serialize import dumps_yaml

        entries = {}
        with repo.scm_context(quiet=True):
            for stage in release_memory(stages):
                stage.save(run_cache=all(out.use_cache or out.metric or out.plot for out in stage.outs))
                stage.commit()
                stage.cmd_changed = False
                entries[stage.name] = dumps_yaml({"stages": to_lockfile(stage)}).partition("\n")[2]
            before = self._lock_file.read_text(encoding="utf-8") if self._lock_file.exists() else ""
            if (text := spliced(before, entries)) is not None:
                write_atomic(self._lock_file, text.encode())
                repo.scm_context.track_file(self._lock_file.name)
            else:
                for stage in stages:
                    stage.dump(update_pipeline=False)
        self._repository.mark_written(self._lock_file.name)

    def _path(self, entry: Any) -> str:
        """DVC names files from the current folder; we name them from the workspace's root."""
        path = str(entry.fs_path)
        return os.path.relpath(path, self.workspace.root) if Path(path).is_absolute() else str(entry)

    def _inputs(self, stage: Any) -> dict[str, Any]:
        return {self._path(dep): str(dep.get_hash()) if dep.exists else None for dep in stage.deps}

    def _stale(self, nodes: Mapping[str, Any]) -> dict[str, tuple[Reason, ...]]:
        """Why each is stale, of those that are and have a command."""
        stale = {}
        for name, stage in release_memory(nodes.items()):
            changes: list[Any] = next(iter(stage.status().values()), []) if stage.cmd else []
            if changes:
                entries = (*stage.outs, *stage.deps)
                stale[name] = stage_graph.reasons(changes, {str(entry): self._path(entry) for entry in entries},
                                                  recorded=any(entry.hash_info for entry in entries))
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


def _is_dvc(pid: int) -> bool:
    import psutil  # comes with DVC

    try:
        return any("dvc" in Path(part).name for part in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def _simple(name: str, stage: Any) -> bool:
    """Whether running its command here is all that `dvc repro` would do: so of moa's own stages, left as they are."""
    return (name.split("@")[0] in code_version.STAGES and isinstance(stage.cmd, str) and "\n" not in stage.cmd
            and not stage.frozen and Path(stage.wdir) == Path(stage.path).parent)


def _restored(repo: Any, stage: Any) -> bool:
    from dvc.stage.cache import RunCacheNotFoundError

    try:
        repo.stage_cache.restore(stage)
    except RunCacheNotFoundError:
        return False
    return True


def _command(stage: Any) -> str | None:
    command = stage.cmd
    return "\n".join(command) if isinstance(command, list) else command
