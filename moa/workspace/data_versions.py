"""Versions of a workspace's data: what DVC keeps without a command, and what a release was made of as a commit of git.

Sets DVC up, adds and forgets data, purges what DVC remembers of stages that are gone.
"""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from moa.core import git
from moa.core.errors import PipelineError
from moa.core.paths import Workspace
from moa.core.subprocesses import QUIET
from moa.core.text import sentence
from moa.workspace.dvc_repository import listening, misnamed, silence_dvc
from moa.workspace.pipeline import Pipeline


def initialise(root: Path) -> bool:
    """Set `root`, in a git repository, up for DVC; whether that was needed. Raises PipelineError if DVC refuses."""
    os.environ.update({key: value for key, value in QUIET.items() if key.startswith("DVC")})
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    folder = root / ".dvc"
    if (folder / "config").exists():
        return False
    if folder.exists() and not (folder / "cache").exists():
        shutil.rmtree(folder)   # DVC was interrupted when it had hardly begun
    try:
        with _silence():
            Repo.init(str(root), subdir=not (root / ".git").exists()).close()
    except DvcException as error:
        raise PipelineError(f"DVC cannot be set up in {root}: {sentence(str(error))}") from error
    return True


class DataVersions(Pipeline):
    """A pipeline whose data may change."""

    def add(self, folder: Path) -> None:
        """Version `folder` as it is now: `folder`.dvc, for git, names its content. Raises PipelineError."""
        from dvc.exceptions import DvcException

        refused: list[OSError] = []
        try:
            with self._repo() as repo, listening(refused):
                repo.add([str(folder)])
        except UnicodeEncodeError as error:
            raise PipelineError(f"DVC cannot version {self.workspace.relative(folder)}: {misnamed(self.workspace.root)}"
                                ) from error
        except DvcException as error:
            if refused:
                raise PipelineError(f"DVC cannot version {self.workspace.relative(folder)}: {refused[0].strerror}."
                                    ) from error
            # `/raw/*` would do for git, but DVC then passes over the whole folder.
            hint = (" Let git keep it: write `/raw/?*/` instead of `/raw/` into data/.gitignore."
                    if "git-ignored" in str(error) else "")
            raise PipelineError(f"DVC cannot version {self.workspace.relative(folder)}: {sentence(str(error))}{hint}"
                                ) from error

    def forget(self, names: Iterable[str], folders: Iterable[Path]) -> None:
        """Take stages out of dvc.lock, and folders out of the .gitignore files that DVC keeps."""
        known = sorted(set(names) & self.recorded().keys())
        with self._repo() as repo:
            from dvc.utils.serialize import modify_yaml

            if known:
                with modify_yaml(str(self._lock_file)) as content:
                    for name in known:
                        del content["stages"][name]
            for folder in folders:
                repo.scm_context.ignore_remove(str(folder))

    def purge(self, paths: Set[str], roots: Iterable[str]) -> dict[str, int]:
        """Delete from DVC's cache what only versions of `paths` hold, and the memory of having made them.

        Versions are `roots`, digests as DVC writes them, and those that stages ever made or read here. What the
        pipeline as it is now uses too stays, and is counted as `kept`.
        """
        with _silence(), self._stages() as (repo, _):
            runs = {path: entry for path in sorted(Path(repo.stage_cache.cache_dir).glob("*/*/*"))
                    if (entry := _read_yaml(path)) and paths & {each["path"] for each in _entries(entry)}}
            roots = {*roots, *(each["md5"] for entry in runs.values() for each in _entries(entry)
                               if each["path"] in paths and "md5" in each)}
            place = repo.cache.local.oid_to_path
            found = {oid for root in roots for oid in _contents(root, place) if Path(place(oid)).exists()}
            used = {oid for objects in repo.used_objs().values() for each in objects
                    for oid in _contents(each.value, place)}
            size = 0
            for oid in sorted(found - used, key=lambda oid: oid.endswith(".dir")):   # lists last, and runs last of all:
                path = Path(place(oid))
                size += path.stat().st_size
                path.unlink()
            for path in runs:                                                        # a second purge finds the rest
                path.unlink()
            return {"objects": len(found - used), "bytes": size, "kept": len(found & used)}

    def cached(self, md5: str) -> dict[str, Path]:
        """Where DVC's cache holds the files of a folder, by name; without those that it lacks."""
        with self._repo() as repo:
            place = repo.cache.local.oid_to_path
            try:
                listed = json.loads(Path(place(md5)).read_bytes())
            except (OSError, ValueError):
                return {}
            found = {each["relpath"]: Path(place(each["md5"])) for each in listed}
        return {name: path for name, path in found.items() if path.is_file()}

    def cache_is_ours(self) -> bool:
        """Whether DVC's cache lies in this workspace, so that no other project uses it."""
        with self._repo() as repo:
            return Path(repo.cache.local.path).resolve().is_relative_to(self.workspace.root)

    @contextlib.contextmanager
    def _repo(self) -> Iterator[Any]:
        """DVC's repository, from the workspace's root and without a word of its own."""
        os.environ.update({key: value for key, value in QUIET.items() if key.startswith("DVC")})
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        with _silence(), contextlib.chdir(self.workspace.root):
            try:
                opened = Repo(_wait_for_lock=True)
            except DvcException as error:   # of git's repository, for one
                raise PipelineError(f"DVC cannot read this workspace: {sentence(str(error))}") from error
            with opened as repo:
                yield repo


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep DVC from printing: the user called moa, not DVC."""
    words = io.StringIO()
    with silence_dvc(), contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
        yield


def _read_yaml(path: Path) -> Any:
    from ruamel.yaml import YAML, YAMLError

    try:
        return YAML(typ="safe").load(path)
    except (OSError, YAMLError):
        return None   # DVC, too, passes over it


def _entries(run: Mapping[str, Any]) -> list[Any]:
    """Inputs and outputs of one remembered run of a stage."""
    return [*run.get("deps", ()), *run.get("outs", ())]


def _contents(oid: str, place: Callable[[str], str]) -> Iterator[str]:
    """An object of DVC's cache, and the files it lists if it is a folder."""
    yield oid
    if oid.endswith(".dir"):
        with contextlib.suppress(OSError, ValueError):
            yield from (each["md5"] for each in json.loads(Path(place(oid)).read_bytes()))


MADE_OF = ("params.yaml", "dvc.yaml", "dvc.lock", "data/starts.json", "data/raw", "data/parents", "data/.gitignore")


def commit(workspace: Workspace, message: str = "moa: what the next release is made of") -> str | None:
    """Commit the parameters, DVC's files and the starts of now; the commit, or None when there was nothing new.

    Other changes, staged ones included, stay as they are. Raises PipelineError with git's own words.
    """
    root, there = workspace.root, [name for name in MADE_OF if (workspace.root / name).exists()]
    try:
        git.run(root, "add", "--", *there)
        if not git.run(root, "diff", "--cached", "--name-only", "--", *there):
            return None
        git.run(root, "commit", "--quiet", "--message", message, "--", *there)
        return git.run(root, "rev-parse", "HEAD").strip()
    except git.GitError as error:
        raise PipelineError(f"{str(error).rstrip('.')}; mend that, or set adapt.commit: false.") from error
