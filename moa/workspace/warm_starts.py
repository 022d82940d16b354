"""Sets, restores and deletes the starts in data/starts.json: the parent expert at which a domain's training begins.

`moa.experts.warm_start` reads them for training. data/starts.json is written after the parent's files are in
data/parents and DVC has versioned them. A process that changes starts holds the workspace's lock.
"""

import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from moa.core import digests
from moa.core.errors import ArtifactError
from moa.core.files import read_json, replace_directory, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.experts.warm_start import InitialExpert, read
from moa.workspace.stage_inputs import entry, write_initial_experts

if TYPE_CHECKING:
    from moa.workspace.data_versions import DataVersions

__all__ = ["InitialExpert", "forget", "prune", "read", "restore", "use"]

PARENT_NAME = re.compile(r"([0-9a-f]{16})(\.dvc)?")   # a parent's folder in data/parents, and its .dvc file


def use(versions: "DataVersions", name: str, parent: str) -> InitialExpert:
    """Make the training of domain `name` begin at the present expert of domain `parent`, which may be `name` itself.

    Copies the expert to data/parents, versions it with DVC and returns the start. Raises ArtifactError when there is no
    such expert, or its files do not match its manifest.
    """
    workspace = versions.workspace
    expert = workspace.expert(parent)
    start = InitialExpert(parent, _verified(workspace, parent))
    before = read(workspace)
    target = workspace.parent(start.digest)
    if not ((target / MANIFEST).is_file() and digests.of_expert(target) == start.digest):
        with replace_directory(target) as copy:
            for path in sorted(expert.iterdir(), key=lambda path: path.name == MANIFEST):
                shutil.copyfile(path, copy / path.name)
            if digests.of_expert(copy) != start.digest:
                raise ArtifactError(f"The expert of {parent!r} changed while it was copied: run the command again.")
    versions.add(target)
    _write(workspace, {**before, name: start})
    return start


def _verified(workspace: Workspace, domain: str) -> str:
    """The digest of a domain's expert. Raises ArtifactError unless its files match its manifest."""
    expert = workspace.expert(domain)
    try:
        digest: str = read_json(expert / MANIFEST)["digest"]
    except FileNotFoundError:
        raise ArtifactError(f"Domain {domain!r} has no expert to begin at: run `moa train --domain {domain}` first."
                            ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise ArtifactError(f"The manifest of the expert of {domain!r} cannot be read: run "
                            f"`moa train --domain {domain} --fresh`.") from None
    if digests.of_expert(expert) != digest:
        raise ArtifactError(f"The expert of {domain!r} is not the one its manifest names: run "
                            f"`moa train --domain {domain} --fresh`.")
    return digest


def forget(versions: "DataVersions", names: Iterable[str]) -> list[str]:
    """Delete the starts of the domains `names`, so that their training begins with a new expert.

    Returns the domains that had a start. The files of their parents stay until `prune`.
    """
    before, names = read(versions.workspace), set(names)
    if had := sorted(names & before.keys()):
        _write(versions.workspace, {name: start for name, start in before.items() if name not in names})
    return had


def restore(versions: "DataVersions", before: Mapping[str, InitialExpert]) -> None:
    """Restore the starts `before`, an earlier result of `read`. Raises ArtifactError when a parent has been pruned."""
    workspace = versions.workspace
    for name, start in before.items():
        folder = workspace.parent(start.digest)
        if not (folder.exists() or folder.with_name(f"{folder.name}.dvc").exists()):
            raise ArtifactError(f"The start of {name} cannot be put back: {workspace.relative(folder)} is gone.")
    if before != read(workspace):
        _write(workspace, before)


def prune(versions: "DataVersions") -> list[str]:
    """Delete parents that no start names from data/parents, with their .dvc files and entries in .gitignore.

    DVC's cache keeps their content. Returns the deleted folders, relative to the workspace.
    """
    workspace = versions.workspace
    named = {workspace.parent(start.digest).name for start in read(workspace).values()}
    present = {match[1] for path in (workspace.parents.iterdir() if workspace.parents.is_dir() else ())
               if (match := PARENT_NAME.fullmatch(path.name))}
    gone = [workspace.parents / name for name in sorted(present - named)]
    if gone:
        versions.forget((), gone)   # before the files, so that an interrupted prune finds them again
    for folder in gone:
        folder.with_name(f"{folder.name}.dvc").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        workspace.parents.rmdir()
    return [workspace.relative(folder) for folder in gone]


def _write(workspace: Workspace, starts: Mapping[str, InitialExpert]) -> None:
    """Write data/starts.json, or delete it where there is no start, and update DVC's copy in .moa/."""
    if starts:
        write_json(workspace.starts, {name: entry(workspace, starts[name]) for name in sorted(starts)})
    else:
        workspace.starts.unlink(missing_ok=True)
    write_initial_experts(workspace)
