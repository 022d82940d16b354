"""The workspace's DVC pipeline: reads its graph and stale stages, runs a stage, records stages that ran elsewhere.

The module does not know what a stage does or in which order stages should run, and does not use Prefect; DVC is behind
`moa.workspace.dvc_repository.Dvc`. What was read of the pipeline stays in memory while the workspace's lock is held.
Stages run in child processes, which end with this process.
"""

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moa.core import layout, transaction
from moa.core.errors import PipelineError, UsageError
from moa.core.paths import Workspace
from moa.core.subprocesses import OnLine, execute, steps_forked
from moa.workspace import origins, stage_inputs
from moa.workspace.dvc_repository import Dvc, DvcRepository
from moa.workspace.lock import LockHolder
from moa.workspace.stage_graph import Reason, Snapshot


class Pipeline:
    """The stages of one workspace, read, run and recorded through DVC."""

    def __init__(self, workspace: Workspace, dvc: Dvc | None = None) -> None:
        """`dvc`: how DVC is asked; None = in process. Raises UsageError where the workspace is not set up for DVC."""
        root = workspace.root
        if not (root / ".dvc").is_dir():
            inside_git = any((folder / ".git").exists() for folder in (root, *root.parents))
            command = "dvc init --subdir" if inside_git and not (root / ".git").exists() else "dvc init"
            raise UsageError(f"{root} is not set up for DVC: run `{'' if inside_git else 'git init && '}{command}` "
                             "there first.")
        self.workspace = workspace
        self._dvc: Dvc = dvc or DvcRepository(workspace)

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
                self._dvc.clear_stale_locks()
                transaction.undo(self.workspace)
                origins.mend(self.workspace)
                self._heal()
                self._dvc.keep_open = True
                with steps_forked():
                    yield abandoned
        finally:
            self._dvc.keep_open = False
            self._dvc.close()
            file_lock.release()

    def snapshot(self) -> Snapshot:
        """Read the graph and the directly stale stages anew; takes about half a second. Raises PipelineError."""
        self._dvc.close()   # .dvc files may have changed, which `DvcRepository` does not watch
        dvc = self._prepared()
        with self._kept_open():
            snapshot = Snapshot(dvc.graph(), dvc.stale())
        if self._lock_file.exists():   # DVC could read it, so the copy is intact
            self._known_good.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._lock_file, self._known_good)
        return snapshot

    def stale(self, names: Iterable[str]) -> dict[str, tuple[Reason, ...]]:
        """The stages of `names` that are stale themselves, with reasons; their ancestors are not considered."""
        return self._prepared().stale(names)

    def restorable(self, names: Iterable[str]) -> set[str]:
        """The stages of `names` that DVC can restore from its run cache: they ran before with their present inputs."""
        return self._prepared().restorable(names)

    def inputs(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The present digest of every input of the stages `names`, by stage and path; None for a missing input."""
        return self._prepared().inputs(names)

    def reproduce(self, name: str, on_line: OnLine, *, force: bool = False) -> None:
        """Run the stage `name` and record it in dvc.lock, or restore its outputs from DVC's cache.

        Args:
            on_line: called with each line that the stage prints.
            force: run it even if its outputs can be restored.

        Raises PipelineError naming the stage; dvc.lock is unchanged then.
        """
        run = self._prepared().begin(name, force=force)
        if run is None:
            return
        try:
            execute(self.workspace, name, run.command, on_line, run.environment)
            if run.inputs is not None and self.record([name], {name: run.inputs}):
                raise PipelineError(f"{name}: its inputs changed while it was running; run again.", stage=name)
        except BaseException:
            self._dvc.close()   # its stages describe a run that was not recorded
            raise

    def record(self, names: Sequence[str], before: Mapping[str, Any] | None = None) -> list[str]:
        """Record stages that ran outside DVC in dvc.lock, and store their outputs in DVC's cache.

        Args:
            before: the `inputs` of the stages before they ran; None = they are not compared.

        Returns:
            The stages that were not recorded, because their inputs have changed since `before`.

        Raises PipelineError.
        """
        return self._prepared().record(names, before) if names else []

    def recorded(self) -> dict[str, Any]:
        """The entries of dvc.lock by stage: command, inputs, parameters and outputs of its last recorded run."""
        from ruamel.yaml import YAML

        if not self._lock_file.exists():
            return {}
        return (YAML(typ="safe").load(self._lock_file) or {}).get("stages") or {}

    def _prepared(self) -> Dvc:
        """DVC, after bringing the inputs that are not files up to date."""
        stage_inputs.write_stage_inputs(self.workspace)
        return self._dvc

    @contextlib.contextmanager
    def _kept_open(self) -> Iterator[None]:
        """Read the pipeline once for all uses of DVC in the block."""
        before = self._dvc.keep_open
        self._dvc.keep_open = True
        try:
            yield
        finally:
            self._dvc.keep_open = before
            if not before:
                self._dvc.close()

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
        if self._lock_file.exists() and not self._dvc.lock_file_is_whole():
            if self._known_good.exists():
                shutil.copyfile(self._known_good, self._lock_file)
            else:
                self._lock_file.unlink()
