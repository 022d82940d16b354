"""Versions of a workspace's data: sets DVC up, adds, forgets and purges data, and commits a release's inputs to git.

The data are those that DVC tracks without a command, such as data/raw/NAME.
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
from moa.workspace.dvc_repository import complete_params, listening, misnamed, silence_dvc
from moa.workspace.pipeline import Pipeline


def initialise(root: Path) -> bool:
    """Set up DVC in `root`, a folder of a git repository. Returns whether that was needed.

    Raises PipelineError if DVC refuses.
    """
    os.environ.update({key: value for key, value in QUIET.items() if key.startswith("DVC")})
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    folder = root / ".dvc"
    if (folder / "config").exists():
        return False
    if folder.exists() and not (folder / "cache").exists():
        shutil.rmtree(folder)   # left by an interrupted `dvc init`
    try:
        with _silence():
            Repo.init(str(root), subdir=not (root / ".git").exists()).close()
    except DvcException as error:
        raise PipelineError(f"DVC cannot be set up in {root}: {sentence(str(error))}") from error
    return True


class DataVersions(Pipeline):
    """A pipeline with operations on its data: versions in DVC's cache, and entries of dvc.lock and .gitignore."""

    def add(self, folder: Path) -> None:
        """Store the present content of `folder` in DVC's cache and its digest in `folder`.dvc. Raises PipelineError."""
        from dvc.dvcfile import FileIsGitIgnored
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
            # `/raw/*` would suffice for git, but DVC then ignores the whole folder.
            hint = (" Let git keep it: write `/raw/?*/` instead of `/raw/` into data/.gitignore."
                    if isinstance(error, FileIsGitIgnored) else "")
            raise PipelineError(f"DVC cannot version {self.workspace.relative(folder)}: {sentence(str(error))}{hint}"
                                ) from error

    def forget(self, names: Iterable[str], folders: Iterable[Path]) -> None:
        """Remove the stages `names` from dvc.lock, and `folders` from the .gitignore files that DVC maintains."""
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
        """Delete versions of `paths` from DVC's cache, and the run cache's entries of stages that read or wrote them.

        Args:
            paths: outputs of stages, relative to the workspace.
            roots: DVC's digests of versions that the run cache does not know.

        Returns:
            `objects` and `bytes` that were deleted; `kept`: number of objects that stay because the present pipeline
            uses them, too.
        """
        with _silence(), self._stages() as (repo, _):
            runs = {path: entry for path in sorted(Path(repo.stage_cache.cache_dir).glob("*/*/*"))
                    if (entry := _read_yaml(path)) and paths & {each["path"] for each in _entries(entry)}}
            roots = {*roots, *(each["md5"] for entry in runs.values() for each in _entries(entry)
                               if each["path"] in paths and "md5" in each)}
            path_of = repo.cache.local.oid_to_path
            stored = {oid for root in roots for oid in _contents(root, path_of) if Path(path_of(oid)).exists()}
            used = {oid for objects in repo.used_objs().values() for each in objects
                    for oid in _contents(each.value, path_of)}
            size = 0
            # Folders' lists are deleted after their files, and runs last, so that a second purge finds what is left.
            for oid in sorted(stored - used, key=lambda oid: oid.endswith(".dir")):
                path = Path(path_of(oid))
                size += path.stat().st_size
                path.unlink()
            for path in runs:
                path.unlink()
            return {"objects": len(stored - used), "bytes": size, "kept": len(stored & used)}

    def cached(self, md5: str) -> dict[str, Path]:
        """Paths in DVC's cache of the files of a folder, by their names in it.

        `md5` is DVC's digest of the folder, which ends in `.dir`. Files that the cache lacks are left out.
        """
        with self._repo() as repo:
            path_of = repo.cache.local.oid_to_path
            try:
                listed = json.loads(Path(path_of(md5)).read_bytes())
            except (OSError, ValueError):
                return {}
            cached = {file["relpath"]: Path(path_of(file["md5"])) for file in listed}
        return {name: path for name, path in cached.items() if path.is_file()}

    def cache_is_ours(self) -> bool:
        """Whether DVC's cache lies in this workspace, so that no other project uses it."""
        with self._repo() as repo:
            return Path(repo.cache.local.path).resolve().is_relative_to(self.workspace.root)

    @contextlib.contextmanager
    def _repo(self) -> Iterator[Any]:
        """DVC's repository, opened in the workspace's root with DVC's output suppressed. Raises PipelineError."""
        os.environ.update({key: value for key, value in QUIET.items() if key.startswith("DVC")})
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        with _silence(), contextlib.chdir(self.workspace.root), complete_params(self.workspace.root):
            try:
                opened = Repo(_wait_for_lock=True)
            except DvcException as error:   # for instance where git refuses the repository
                raise PipelineError(f"DVC cannot read this workspace: {sentence(str(error))}") from error
            with opened as repo:
                yield repo


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress what DVC prints: the user called moa, not DVC."""
    discarded = io.StringIO()
    with silence_dvc(), contextlib.redirect_stdout(discarded), contextlib.redirect_stderr(discarded):
        yield


def _read_yaml(path: Path) -> Any:
    from ruamel.yaml import YAML, YAMLError

    try:
        return YAML(typ="safe").load(path)
    except (OSError, YAMLError):
        return None   # DVC ignores such an entry, too


def _entries(run: Mapping[str, Any]) -> list[Any]:
    """Inputs and outputs of an entry of DVC's run cache."""
    return [*run.get("deps", ()), *run.get("outs", ())]


def _contents(oid: str, path_of: Callable[[str], str]) -> Iterator[str]:
    """The object `oid` of DVC's cache and, if it is a folder, the objects in it. `path_of` maps an id to its path."""
    yield oid
    if oid.endswith(".dir"):
        with contextlib.suppress(OSError, ValueError):
            yield from (each["md5"] for each in json.loads(Path(path_of(oid)).read_bytes()))


# What a release is made of: parameters, DVC's files, where training begins, and the champion that it succeeds.
MADE_OF = ("params.yaml", "dvc.yaml", "dvc.lock", "data/starts.json", "data/raw", "data/parents", "data/champion.dvc",
           "data/.gitignore")


def commit(workspace: Workspace, message: str = "moa: what the next release is made of") -> str | None:
    """Commit the files of `MADE_OF` that changed. Returns the commit's hash, or None when nothing changed.

    Other changes, staged ones included, stay as they are. Raises PipelineError with git's message.
    """
    root, existing = workspace.root, [name for name in MADE_OF if (workspace.root / name).exists()]
    try:
        git.run(root, "add", "--", *existing)
        if not git.run(root, "diff", "--cached", "--name-only", "--", *existing):
            return None
        git.run(root, "commit", "--quiet", "--message", message, "--", *existing)
        return git.run(root, "rev-parse", "HEAD").strip()
    except git.GitError as error:
        raise PipelineError(f"{str(error).rstrip('.')}; mend that, or set adapt.commit: false.") from error
