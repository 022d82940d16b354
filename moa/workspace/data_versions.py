"""Versions of a workspace's data: adds, forgets and purges data, and commits a release's inputs to git.

The data are those that DVC tracks without a command, such as data/raw/NAME.
"""

from collections.abc import Iterable, Set
from pathlib import Path, PurePosixPath

from moa.core import git
from moa.core.errors import PipelineError
from moa.core.paths import Workspace
from moa.workspace.pipeline import Pipeline


class DataVersions(Pipeline):
    """A pipeline with operations on its data: versions in DVC's cache, and entries of dvc.lock and .gitignore."""

    def add(self, folder: Path) -> None:
        """Store the present content of `folder` in DVC's cache and its digest in `folder`.dvc. Raises PipelineError."""
        self._dvc.add(folder)

    def forget(self, names: Iterable[str], folders: Iterable[Path]) -> None:
        """Remove the stages `names` from dvc.lock, and `folders` from the .gitignore files that DVC maintains."""
        self._dvc.forget(sorted(set(names) & self.recorded().keys()), folders)

    def purge(self, paths: Set[str], roots: Iterable[str]) -> dict[str, int]:
        """Delete versions of `paths` from DVC's cache; arguments and result as of `Dvc.purge`."""
        return self._prepared().purge(paths, roots)

    def cached(self, md5: str) -> dict[str, Path]:
        """Paths in DVC's cache of the files of a folder, by their names in it.

        `md5` is DVC's digest of the folder, which ends in `.dir`. Files that the cache lacks are left out.
        """
        return self._dvc.cached(md5)

    def cache_is_ours(self) -> bool:
        """Whether DVC's cache lies in this workspace, so that no other project uses it."""
        return self._dvc.cache().resolve().is_relative_to(self.workspace.root)


# What a release is made of: parameters, DVC's files, where training begins, and the champion that it succeeds.
MADE_OF = ("params.yaml", "dvc.yaml", "dvc.lock", "data/starts.json", "data/raw", "data/parents", "data/champion.dvc",
           "data/.gitignore")


def uncommitted(workspace: Workspace) -> list[str]:
    """Those of `MADE_OF` that hold changes which git has not committed; none where git cannot say."""
    root, existing = workspace.root, [name for name in MADE_OF if (workspace.root / name).exists()]
    try:
        if not existing or git.repository(root) is None:
            return []
        printed = git.run(root, "-c", "status.relativePaths=true", "status", "--short", "--untracked-files=all", "--",
                          *existing)
    except git.GitError:
        return []
    changed = [PurePosixPath(line[3:]) for line in printed.splitlines()]   # after two letters and a space
    return [name for name in existing if any(path.is_relative_to(name) for path in changed)]


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
