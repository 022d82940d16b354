"""What a release was made of, as one commit of the workspace's git. Knows nothing of releases."""

from moa.core import git
from moa.core.errors import PipelineError
from moa.core.paths import Workspace

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
