"""Which domains' training begins at which parent: set, taken back, and shown to DVC. Training reads it (`warm_start`).

data/starts.json is written last, when the parent's files lie in data/parents and DVC knows them. A process that
changes starts holds the workspace's lock.
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

KEPT = re.compile(r"([0-9a-f]{16})(\.dvc)?")


def use(versions: "DataVersions", name: str, parent: str) -> InitialExpert:
    """Let the training of `name` begin at the expert that `parent` has now; `name` itself may be the parent.

    Raises ArtifactError when there is no such expert, or it is not the one its manifest names.
    """
    workspace = versions.workspace
    expert = workspace.expert(parent)
    start = InitialExpert(parent, _verified(workspace, parent))
    before = read(workspace)
    kept = workspace.parent(start.digest)
    if not ((kept / MANIFEST).is_file() and digests.of_expert(kept) == start.digest):
        with replace_directory(kept) as folder:
            for path in sorted(expert.iterdir(), key=lambda path: path.name == MANIFEST):
                shutil.copyfile(path, folder / path.name)
            if digests.of_expert(folder) != start.digest:
                raise ArtifactError(f"The expert of {parent!r} changed while it was copied: run the command again.")
    versions.add(kept)
    _write(workspace, {**before, name: start})
    return start


def _verified(workspace: Workspace, domain: str) -> str:
    expert = workspace.expert(domain)
    try:
        named: str = read_json(expert / MANIFEST)["digest"]
    except FileNotFoundError:
        raise ArtifactError(f"Domain {domain!r} has no expert to begin at: run `moa train --domain {domain}` first."
                            ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise ArtifactError(f"The manifest of the expert of {domain!r} cannot be read: run "
                            f"`moa train --domain {domain} --fresh`.") from None
    if digests.of_expert(expert) != named:
        raise ArtifactError(f"The expert of {domain!r} is not the one its manifest names: run "
                            f"`moa train --domain {domain} --fresh`.")
    return named


def forget(versions: "DataVersions", names: Iterable[str]) -> list[str]:
    """Let the training of `names` begin afresh; those that had a start. Their parents' files stay until `prune`."""
    before, names = read(versions.workspace), set(names)
    if had := sorted(names & before.keys()):
        _write(versions.workspace, {name: start for name, start in before.items() if name not in names})
    return had


def restore(versions: "DataVersions", before: Mapping[str, InitialExpert]) -> None:
    """Put back what `read` gave earlier. Raises ArtifactError when a parent's files have been pruned meanwhile."""
    workspace = versions.workspace
    for name, start in before.items():
        place = workspace.parent(start.digest)
        if not (place.exists() or place.with_name(f"{place.name}.dvc").exists()):
            raise ArtifactError(f"The start of {name} cannot be put back: {workspace.relative(place)} is gone.")
    if before != read(workspace):
        _write(workspace, before)


def prune(versions: "DataVersions") -> list[str]:
    """Delete the parents that no start names any more, and what git knows of them; DVC's cache keeps their bytes."""
    workspace = versions.workspace
    named = {workspace.parent(start.digest).name for start in read(workspace).values()}
    there = {found[1] for path in (workspace.parents.iterdir() if workspace.parents.is_dir() else ())
             if (found := KEPT.fullmatch(path.name))}
    gone = [workspace.parents / name for name in sorted(there - named)]
    if gone:
        versions.forget((), gone)   # first: while a file is left, a prune that was cut off is begun again
    for place in gone:
        place.with_name(f"{place.name}.dvc").unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)
    with suppress(OSError):
        workspace.parents.rmdir()
    return [workspace.relative(place) for place in gone]


def _write(workspace: Workspace, starts: Mapping[str, InitialExpert]) -> None:
    if starts:
        write_json(workspace.starts, {name: entry(workspace, starts[name]) for name in sorted(starts)})
    else:
        workspace.starts.unlink(missing_ok=True)
    write_initial_experts(workspace)
