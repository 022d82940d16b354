"""What a release was made of, as one commit of the workspace's git. Knows nothing of releases."""

import subprocess

from moa.errors import PipelineError
from moa.workspace import Workspace

MADE_OF = ("params.yaml", "dvc.yaml", "dvc.lock", "data/starts.json", "data/raw", "data/parents", "data/.gitignore")


def commit(workspace: Workspace, message: str = "moa: what the next release is made of") -> str | None:
    """Commit the parameters, DVC's files and the starts of now; the commit, or None when there was nothing new.

    Other changes, staged ones included, stay as they are. Raises PipelineError with git's own words.
    """
    there = [name for name in MADE_OF if (workspace.root / name).exists()]
    _git(workspace, "add", "--", *there)
    if not _git(workspace, "diff", "--cached", "--name-only", "--", *there):
        return None
    _git(workspace, "commit", "--quiet", "--message", message, "--", *there)
    return _git(workspace, "rev-parse", "HEAD")


def _git(workspace: Workspace, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=workspace.root, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise PipelineError(f"`git {words[0]}` failed: {said[-1] if said else 'it said nothing'}; mend that, or set "
                            "adapt.commit: false.")
    return done.stdout.strip()
