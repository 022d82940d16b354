"""Payloads: the inputs of a training, and its experts, as named bytes for a worker that shares no disk with the driver.

A payload is a dict of paths to bytes, which any engine can carry; its header names the task and holds a digest of every
other file. Knows no engine, and not how to train.

    to the worker   parcel.json params.yaml dvc.yaml data/base/manifest.json data/corpora/NAME/ data/starts.json
                    data/parents/
    its answer      parcel.json data/experts/NAME/
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
from moa.core.errors import ArtifactError, ErrorRecord
from moa.core.files import read_json, replace_directory
from moa.core.paths import MANIFEST, Workspace
from moa.experts import warm_start
from moa.experts.train import fingerprint

Files = dict[str, bytes]

HEADER = "parcel.json"
LEARNED_FROM = ("train.parquet", "validation.parquet", MANIFEST)   # files of a corpus; its test rows are not sent
LARGEST_BASE = 4 << 30   # bytes of a `path:` base that are sent; a larger one must lie on the workers


# Packed by the driver.

def pack(workspace: Workspace, config: Config, domains: Sequence[str], command: str) -> Files:
    """The payload of `command --domain NAME ...`: every input but the base, of which it holds only the pin.

    Raises:
        ArtifactError: files of a parent expert are missing.
        TrainingError: a corpus is missing.
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
    """The files of a `path:` base, which no worker can fetch, by name; None for other bases and for too large ones."""
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
    """The base's source: of a hub's the commit that was fetched here, which its branch may have left since; of a folder
    the name that manifests give it."""
    source = sources.parse(config.base.source)
    return pin.pin(workspace).source if source.kind == "hub" else str(source)


def _params(workspace: Workspace, config: Config, domains: Sequence[str]) -> bytes:
    """params.yaml for the worker: the driver's keys that decide about an expert, and no settings of its machine."""
    from ruamel.yaml import YAML

    params = config.model_dump()
    sent = {**{group: params[group] for group in (*WATCHED, "base")}, "domains": {
        domain: params["domains"][domain] for domain in domains}}
    sent["base"]["source"] = _reference(workspace, config)
    on_cpu = "cpu" in config.execution.devices
    sent["execution"] = {"devices": ["cpu"] if on_cpu else "auto"}   # a GPU's number means nothing on another machine
    text = io.StringIO()
    YAML(typ="safe").dump(sent, text)
    return text.getvalue().encode()


def _add(files: Files, workspace: Workspace, paths: Iterable[Path]) -> None:
    for path in paths:
        files[workspace.relative(path)] = path.read_bytes()


def _sealed(files: Files, header: dict[str, Any]) -> Files:
    """`files` with a header that also holds their digests."""
    seal = {path: digests.of_bytes(data) for path, data in files.items()}
    return {**files, HEADER: json.dumps({**header, "files": seal}).encode()}


# Checked and opened at either end.

def header(files: Files) -> dict[str, Any]:
    """The header of a payload, after its digests were checked. Raises ArtifactError when a file differs."""
    contents: dict[str, Any] = json.loads(files[HEADER])
    arrived = {path: digests.of_bytes(data) for path, data in files.items() if path != HEADER}
    if arrived != contents["files"]:
        raise ArtifactError("A payload arrived otherwise than it was sent: run again.")
    return contents


def write(files: Files, root: Path) -> None:
    """Write the files of a payload under `root`. Raises ArtifactError when a name leads out of it."""
    for name, data in files.items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise ArtifactError(f"A payload holds a file called {name!r}, which was not written.")
        path = root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


# The answer.

def pack_answer(workspace: Workspace, domains: Sequence[str], error: ErrorRecord | None, where: str) -> Files:
    """A worker's answer: the experts that are complete, and why others are not.

    Args:
        error: why experts are missing; None when all are complete.
        where: the worker's host, for messages.
    """
    files: Files = {}
    for domain in domains:
        if (workspace.expert(domain) / MANIFEST).is_file():
            _add(files, workspace, workspace.expert(domain).iterdir())
    return _sealed(files, {"domains": list(domains), "error": error.as_dict() if error else None, "where": where})


def install_answer(workspace: Workspace, config: Config, files: Files) -> ErrorRecord | None:
    """Write the experts of an answer to data/experts; the answer's error, or None.

    Raises ArtifactError, before that expert's directory is replaced, when an expert is not what its manifest says, or
    was trained from other inputs than the present ones.
    """
    contents = header(files)
    for domain in contents["domains"]:
        prefix = f"{workspace.relative(workspace.expert(domain))}/"
        expert = {name.removeprefix(prefix): data for name, data in files.items() if name.startswith(prefix)}
        if not expert:
            continue
        with replace_directory(workspace.expert(domain)) as folder:
            write(expert, folder)
            manifest = read_json(folder / MANIFEST)
            if manifest["digest"] != digests.of_expert(folder):
                raise ArtifactError(f"The expert of {domain!r} that {contents['where']} sent is not what its manifest "
                                    "says: run again.")
            if manifest["fingerprint"] != fingerprint(workspace, config, domain):
                raise ArtifactError(f"The expert of {domain!r} that {contents['where']} sent was trained from other "
                                    "inputs than those of now: run again.")
    return ErrorRecord.read(contents["error"]) if contents["error"] else None
