"""The workspace's DVC pipeline: reads its graph and stale stages, runs a stage, records stages that ran elsewhere.

The module does not know what a stage does or in which order stages should run, and does not use Prefect. DVC is called
in process, and its repository stays open while the workspace's lock is held. Stages run in child processes, which end
with this process.

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
from moa.workspace import dvc_repository, origins, stage_graph, stage_inputs
from moa.workspace.dvc_repository import DvcRepository, release_memory
from moa.workspace.lock import LockHolder
from moa.workspace.stage_graph import Graph, Reason, Snapshot, Stage

HEAD = "schema: '2.0'\nstages:\n"   # beginning of a dvc.lock
ENTRY = re.compile(r"^(?=  \S)", re.MULTILINE)          # an entry begins where a line is indented by two
NAME = re.compile(r"  ([\w@.+/-]+(?::[\w@.+/-]+)*):\n")   # that line, written as DVC writes it


def spliced(text: str, entries: Mapping[str, str]) -> str | None:
    """Replace entries in the text of a dvc.lock, and append those of new stages.

    Args:
        text: the present dvc.lock, or "".
        entries: by stage, the lines that DVC would write for it, with the line of its name.

    Returns:
        The new text; None where `text` is not formatted as DVC writes it, so that DVC must write it.
    """
    if not (text or HEAD).startswith(HEAD):
        return None
    before, *rest = ENTRY.split((text or HEAD)[len(HEAD):])
    blocks: dict[str, str] = {}
    for block in rest:
        match = NAME.match(block)
        if not match or match[1] in blocks or not block.endswith("\n") or re.search(r"^\S", block, re.MULTILINE):
            return None   # a name in quotes, a comment, or another group after the stages
        blocks[match[1]] = block
    if before or any(not (match := NAME.match(block)) or match[1] != name for name, block in entries.items()):
        return None
    return HEAD + "".join({**blocks, **entries}.values())


class Pipeline:
    """The stages of one workspace, read, run and recorded through DVC.

    The constructor raises UsageError where the workspace is not set up for DVC.
    """

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
        """Hold the workspace's lock within the block, so that no other process builds in the workspace.

        The operating system releases the lock when the process ends, after a crash too. What a crash left unfinished is
        undone or repaired first.

        Args:
            wait: seconds to wait while another process holds the lock.

        Yields:
            The record of the last lock holder (`LockHolder.read`) if that process was killed, else None.

        Raises PipelineError when another process goes on holding the lock.
        """
        from filelock import FileLock, Timeout

        path = self.workspace.lock
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = LockHolder.of(self.workspace)
        file_lock = FileLock(path, timeout=wait)
        try:
            file_lock.acquire()
        except Timeout:
            raise PipelineError(f"Another moa run{holder.described()} is working in this workspace; "
                                "wait for it, or end it.") from None
        try:
            abandoned = holder.read()
            with holder.seen():
                layout.write_local_layout(self.workspace.root)
                self._clear_stale_locks()
                transaction.undo(self.workspace)
                origins.mend(self.workspace)
                self._heal()
                self._repository.keep_open = True
                with steps_forked():
                    yield abandoned
        finally:
            self._repository.keep_open = False
            self._repository.close()
            file_lock.release()

    def snapshot(self) -> Snapshot:
        """Read the graph and the directly stale stages anew; takes about half a second. Raises PipelineError."""
        self._repository.close()   # .dvc files may have changed, which `DvcRepository` does not watch
        with self._stages() as (repo, nodes):
            stages = [Stage(name, _command(stage), tuple(self._path(out) for out in stage.outs))
                      for name, stage in nodes.items()]
            upstream: dict[str, list[str]] = {}
            for below, above in repo.index.graph.edges:
                upstream.setdefault(self._repository.name(below), []).append(self._repository.name(above))
            snapshot = Snapshot(Graph(stages, upstream), self._stale(nodes))
        if self._lock_file.exists():   # DVC could read it, so the copy is intact
            self._known_good.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._lock_file, self._known_good)
        return snapshot

    def stale(self, names: Iterable[str]) -> dict[str, tuple[Reason, ...]]:
        """The stages of `names` that are stale themselves, with reasons; their ancestors are not considered."""
        with self._stages() as (_, nodes):
            return self._stale({name: nodes[name] for name in names})

    def restorable(self, names: Iterable[str]) -> set[str]:
        """The stages of `names` that DVC can restore from its run cache: they ran before with their present inputs."""
        from dvc.exceptions import DvcException

        restorable = set()
        with self._stages() as (repo, nodes):
            for name in release_memory(names):
                stage = nodes[name]
                recorded = [(dep, dep.hash_info, dep.meta) for dep in stage.deps]
                try:
                    stage.save_deps()
                    # The public `restore(dry=True)` would look at the inputs of the last run instead.
                    cached_run = repo.stage_cache._load(stage)
                    if cached_run and repo.stage_cache._create_stage(cached_run, wdir=stage.wdir).outs_cached():
                        restorable.add(name)
                except DvcException:
                    continue   # an input is missing: the stage itself will report it
                finally:
                    for dep, hash_info, meta in recorded:
                        dep.hash_info, dep.meta = hash_info, meta
        return restorable

    def inputs(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The present digest of every input of the stages `names`, by stage and path; None for a missing input."""
        with self._stages() as (_, nodes):
            return {name: self._inputs(nodes[name]) for name in release_memory(names)}

    def reproduce(self, name: str, on_line: OnLine, *, force: bool = False) -> None:
        """Run the stage `name` and record it in dvc.lock, or restore its outputs from DVC's cache.

        Args:
            on_line: called with each line that the stage prints.
            force: run it even if its outputs can be restored.

        Raises PipelineError naming the stage; dvc.lock is unchanged then.
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
                execute(self.workspace, name, [sys.executable, "-P", "-m", dvc_repository.__name__, *words], on_line)
                return
            execute(self.workspace, name, ["/bin/sh", "-c", stage.cmd], on_line, {"DVC_STAGE": name})
            if self.record([name], before):
                raise PipelineError(f"{name}: its inputs changed while it was running; run again.")
        except BaseException:
            self._repository.close()   # its stages describe a run that was not recorded
            raise

    def record(self, names: Sequence[str], before: Mapping[str, Any] | None = None) -> list[str]:
        """Record stages that ran outside DVC in dvc.lock, with one write, and store their outputs in DVC's cache.

        Args:
            before: the `inputs` of the stages before they ran; None = they are not compared.

        Returns:
            The stages that were not recorded, because their inputs have changed since `before`.

        Raises PipelineError.
        """
        if not names:
            return []
        others = f" and {len(names) - 1} more" if names[1:] else ""
        with self._stages(f"{names[0]}{others} could not be recorded") as (repo, nodes):
            changed = [name for name in release_memory(names) if before and self._inputs(nodes[name]) != before[name]]
            self._save(repo, [nodes[name] for name in names if name not in changed])
        return changed

    def recorded(self) -> dict[str, Any]:
        """The entries of dvc.lock by stage: command, inputs, parameters and outputs of its last recorded run."""
        from ruamel.yaml import YAML

        if not self._lock_file.exists():
            return {}
        return (YAML(typ="safe").load(self._lock_file) or {}).get("stages") or {}

    @contextlib.contextmanager
    def _stages(self, *failure: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        """`DvcRepository.stages`, after bringing the inputs that are not files up to date."""
        stage_inputs.write_stage_inputs(self.workspace)
        with self._repository.stages(*failure) as (repo, nodes):
            yield repo, nodes

    def _save(self, repo: Any, stages: Sequence[Any]) -> None:
        """Record `stages` as `dvc commit --force` does, with one write of dvc.lock.

        A stage with an output that is not cached gets no entry in the run cache.
        """
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
        """The entry's path relative to the workspace's root; DVC's own paths are relative to the current folder."""
        path = str(entry.fs_path)
        return os.path.relpath(path, self.workspace.root) if Path(path).is_absolute() else str(entry)

    def _inputs(self, stage: Any) -> dict[str, Any]:
        """The present digest of each input of the stage, by path."""
        return {self._path(dep): str(dep.get_hash()) if dep.exists else None for dep in stage.deps}

    def _stale(self, nodes: Mapping[str, Any]) -> dict[str, tuple[Reason, ...]]:
        """The reasons of each stage that is stale and has a command."""
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
        """Replace a truncated dvc.lock with the last good copy: DVC does not write it atomically.

        Stages that were recorded after the copy are restored from DVC's run cache.
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
        """Delete DVC's path locks if none of their processes runs DVC.

        After a crash, another program may have the process id of the one that held a lock.
        """
        rwlock = self.workspace.root / ".dvc" / "tmp" / "rwlock"
        try:
            held = json.loads(rwlock.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except ValueError:
            held = {}   # the file was truncated by a crash
        pids = [info["pid"] for info in held.get("write", {}).values()]
        pids += [info["pid"] for infos in held.get("read", {}).values() for info in infos]
        if not any(_is_dvc(pid) for pid in pids):
            rwlock.unlink(missing_ok=True)


def _is_dvc(pid: int) -> bool:
    """Whether a process of this id runs DVC."""
    import psutil  # comes with DVC

    try:
        return any("dvc" in Path(part).name for part in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def _simple(name: str, stage: Any) -> bool:
    """Whether `dvc repro` would do no more than run the stage's command: true of moa's own stages, unless edited."""
    return (name.split("@")[0] in code_version.STAGES and isinstance(stage.cmd, str) and "\n" not in stage.cmd
            and not stage.frozen and Path(stage.wdir) == Path(stage.path).parent)


def _restored(repo: Any, stage: Any) -> bool:
    """Restore the stage's outputs from DVC's run cache. Returns whether it had them."""
    from dvc.stage.cache import RunCacheNotFoundError

    try:
        repo.stage_cache.restore(stage)
    except RunCacheNotFoundError:
        return False
    return True


def _command(stage: Any) -> str | None:
    command = stage.cmd
    return "\n".join(command) if isinstance(command, list) else command
