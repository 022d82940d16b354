"""What a training needs, and what it made, as named bytes: for a worker with no disk in common with us.

A payload is a plain dict, path to bytes, which any engine can carry; its header says what it is for, and holds a digest
of everything else. Knows no engine, and not how to train.

    there   parcel.json params.yaml dvc.yaml data/base/manifest.json data/corpora/NAME/ data/starts.json data/parents/
    back    parcel.json data/experts/NAME/
"""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from moa.base import pin, sources
from moa.core import code_version, digests
from moa.core.config import WATCHED, Config
from moa.core.errors import ArtifactError
from moa.core.files import read_json, replace_directory
from moa.core.paths import MANIFEST, Workspace
from moa.experts import warm_start
from moa.experts.train import fingerprint

Files = dict[str, bytes]

HEADER = "parcel.json"
LEARNED_FROM = ("train.parquet", "validation.parquet", MANIFEST)   # of a corpus: test rows stay at home
LARGEST_BASE = 4 << 30   # bytes of a `path:` base that are sent; a larger one must lie on the workers


# There.

def pack(workspace: Workspace, config: Config, domains: Sequence[str], command: str) -> Files:
    """Everything that `command --domain NAME ...` needs but the base, of which only the pin goes along.

    Raises ArtifactError when a parent's files are missing, TrainingError when a corpus is.
    """
    files = {"params.yaml": _params(workspace, config, domains), "dvc.yaml": b"stages: {}\n"}
    _add(files, workspace, [workspace.base_manifest])
    prints = {domain: fingerprint(workspace, config, domain) for domain in domains}
    for domain in domains:
        _add(files, workspace, (workspace.corpus(domain) / name for name in LEARNED_FROM))
    if starts := {domain: start for domain, start in warm_start.read(workspace).items() if domain in domains}:
        files[workspace.relative(workspace.starts)] = json.dumps(
            {domain: asdict(start) for domain, start in starts.items()}).encode()
        for start in starts.values():
            _add(files, workspace, warm_start.folder(workspace, start).iterdir())
    return _sealed(files, {"domains": list(domains), "command": command, "prints": prints,
                           "code": code_version.digest("train"), "base": pin.pin(workspace).digest,
                           "source": _reference(workspace, config), "folder": _on_the_worker(workspace, config)})


def pack_base(workspace: Workspace, config: Config) -> Files | None:
    """The files of a `path:` base, which no worker can fetch; None of other bases, and of one that is too large."""
    paths = _base_files(workspace, config)
    return {path.name: path.read_bytes() for path in paths} if paths and _size(paths) <= LARGEST_BASE else None


def _on_the_worker(workspace: Workspace, config: Config) -> str | None:
    """The folder in which a worker must have a base that is too large to be sent."""
    paths = _base_files(workspace, config)
    return str(paths[0].parent) if paths and _size(paths) > LARGEST_BASE else None


def _base_files(workspace: Workspace, config: Config) -> list[Path]:
    source = sources.parse(config.base.source)
    if source.kind != "path":
        return []
    folder = (workspace.root / source.name).resolve()
    return [path for pattern in (sources.WEIGHTS, *sources.SIDE_FILES) for path in sorted(folder.glob(pattern))]


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _reference(workspace: Workspace, config: Config) -> str:
    """The base's source: the commit that was fetched here, not what a branch means by now; a folder by the name that
    manifests give it."""
    source = sources.parse(config.base.source)
    return pin.pin(workspace).source if source.kind == "hub" else str(source)


def _params(workspace: Workspace, config: Config, domains: Sequence[str]) -> bytes:
    """params.yaml for the worker: as here in what decides about an expert, and without what is this machine's own."""
    from ruamel.yaml import YAML

    params = config.model_dump()
    ours = config.execution.devices
    kept = {**{group: params[group] for group in (*WATCHED, "base")}, "domains": {
        domain: params["domains"][domain] for domain in domains}}
    kept["base"]["source"] = _reference(workspace, config)
    kept["execution"] = {"devices": ["cpu"] if "cpu" in ours else "auto"}   # a GPU's number is its own machine's
    text = io.StringIO()
    YAML(typ="safe").dump(kept, text)
    return text.getvalue().encode()


def _add(files: Files, workspace: Workspace, paths: Iterable[Path]) -> None:
    for path in paths:
        files[workspace.relative(path)] = path.read_bytes()


def _sealed(files: Files, header: dict[str, Any]) -> Files:
    seal = {path: digests.of_bytes(data) for path, data in files.items()}
    return {**files, HEADER: json.dumps({**header, "files": seal}).encode()}


# Opened.

def header(files: Files) -> dict[str, Any]:
    """What a payload says of itself, once everything in it was found to be what was sent. Raises ArtifactError."""
    found: dict[str, Any] = json.loads(files[HEADER])
    rest = {path: digests.of_bytes(data) for path, data in files.items() if path != HEADER}
    if rest != found["files"]:
        raise ArtifactError("A payload arrived otherwise than it was sent: run again.")
    return found


def write(files: Files, root: Path) -> None:
    """Write the files of a payload under `root`. Raises ArtifactError when a name leads out of it."""
    for name, data in files.items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts:
            raise ArtifactError(f"A payload holds a file called {name!r}, which was not written.")
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


# Back.

def pack_answer(workspace: Workspace, domains: Sequence[str], error: str | None, where: str) -> Files:
    """The experts that are complete, and why the others are not."""
    files: Files = {}
    for domain in domains:
        if (workspace.expert(domain) / MANIFEST).is_file():
            _add(files, workspace, workspace.expert(domain).iterdir())
    return _sealed(files, {"domains": list(domains), "error": error, "where": where})


def install_answer(workspace: Workspace, config: Config, files: Files) -> str | None:
    """Put the experts of an answer into their places; why some are missing, or None.

    Raises ArtifactError, before anything is replaced, when one is not what its manifest says, or was trained from other
    inputs than those of now.
    """
    found = header(files)
    for domain in found["domains"]:
        prefix = f"{workspace.relative(workspace.expert(domain))}/"
        parts = {name.removeprefix(prefix): data for name, data in files.items() if name.startswith(prefix)}
        if not parts:
            continue
        with replace_directory(workspace.expert(domain)) as folder:
            write(parts, folder)
            manifest = read_json(folder / MANIFEST)
            if manifest["digest"] != digests.of_expert(folder):
                raise ArtifactError(f"The expert of {domain!r} that {found['where']} sent is not what its manifest "
                                    "says: run again.")
            if manifest["fingerprint"] != fingerprint(workspace, config, domain):
                raise ArtifactError(f"The expert of {domain!r} that {found['where']} sent was trained from other "
                                    "inputs than those of now: run again.")
    error: str | None = found["error"]
    return error
