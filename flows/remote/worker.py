"""The worker's end of a training on a cluster: a payload in, experts out. Knows no engine, and shares no disk.

A temporary workspace is made from the payload, the base is fetched by its reference, and the stage's own command runs
there under a supervisor, so that it ends when the worker does. Bases stay in the worker's cache, by digest:
MOA_WORKER_CACHE, or .cache/moa in its home.
"""

import contextlib
import json
import os
import platform
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flows.remote import payload
from flows.remote.payload import Files
from moa.base import sources
from moa.core import code_version
from moa.core.errors import BaseModelError, ErrorRecord, MoaError, PipelineError
from moa.core.files import read_json
from moa.core.paths import Workspace
from moa.core.progress import MARKER
from moa.core.subprocesses import RECORDS, ErrorLines, environment
from moa.core.supervisor import SupervisedProcess

RECORD_SECONDS = 1.0   # between two progress records that are sent to the driver
LOOK_SECONDS = 1.0     # between two checks whether the driver still wants the result
SENT = "sent"          # folder of a cached base with the files of a `path:` base as sent

Say = Callable[[str], object]


def work(files: Files, base: Files | None, say: Say = print, given_up: Callable[[], bool] = lambda: False,
         threads: int | None = None) -> Files:
    """Train the experts that a payload names; the answer holds them, or the error of those that are missing.

    Args:
        files: the payload.
        base: files of a base that no worker can fetch.
        say: gets the lines and progress records of the training.
        given_up: whether the driver no longer wants the result; the training is then ended.
        threads: of the training on a CPU; None = as the environment says.

    Returns:
        A payload for `flows.remote.payload.install_answer`.

    Raises:
        ArtifactError: the payload is damaged.
    """
    header, where = payload.header(files), platform.node()
    with tempfile.TemporaryDirectory(prefix="moa-worker-") as folder:
        source = sources.parse(header["source"])
        root = Path(folder, "w", *["w"] * source.name.count(".."))   # so deep that `path:../..` stays within the folder
        root.mkdir(parents=True)
        workspace, error = Workspace(root), None
        try:
            if code_version.digest("train") != header["code"]:
                raise PipelineError(f"The worker on {where} has another version of moa than the one that sent the "
                                    "work: install the same on both.")
            payload.write({name: data for name, data in files.items() if name != payload.HEADER}, root)
            _link_base(workspace, source, header, base, say)
            command = f"{header['command']} {' '.join(f'--domain {domain}' for domain in header['domains'])}"
            say(f"{where}, in {folder}: {command}")
            _run(root, command, where, say, given_up, {"OMP_NUM_THREADS": str(threads)} if threads else {})
        except MoaError as problem:
            error = ErrorRecord.of(problem)
        return payload.pack_answer(workspace, header["domains"], error, where)


# The base, fetched once into each worker's cache.

def _link_base(workspace: Workspace, source: sources.Source, header: dict[str, Any], base: Files | None,
               say: Say) -> None:
    """Link `workspace` to the cached base, fetched if it is new; training verifies it by the payload's manifest."""
    from filelock import FileLock

    root = cache() / "bases" / header["base"]
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.parent / f".{root.name}.lock"):
        if not root.exists():
            with tempfile.TemporaryDirectory(dir=root.parent, prefix=".") as folder:
                fetched = Workspace(Path(folder) / "base")
                _fetch(workspace, fetched, source, header, base, say)
                fetched.root.replace(root)
    cached = Workspace(root)
    workspace.base.symlink_to(cached.base)
    workspace.local.mkdir()
    cached.cache.mkdir(parents=True, exist_ok=True)
    workspace.cache.symlink_to(cached.cache)   # it holds the digests of large files, which are then not read again
    if source.kind == "path":
        named = workspace.root / source.name
        named.parent.mkdir(parents=True, exist_ok=True)
        named.symlink_to(root / SENT)


def cache() -> Path:
    """The folder of this worker's cache."""
    return Path(os.environ.get("MOA_WORKER_CACHE") or Path.home() / ".cache" / "moa")


def _fetch(workspace: Workspace, target: Workspace, source: sources.Source, header: dict[str, Any],
           base: Files | None, say: Say) -> None:
    """Run stage `base` in `target`, a new workspace. Raises BaseModelError when its digest is not the payload's."""
    from ruamel.yaml import YAML

    target.root.mkdir()
    for path in (workspace.params, workspace.root / "dvc.yaml"):
        shutil.copyfile(path, target.root / path.name)
    if source.kind == "path":
        yaml = YAML(typ="safe")
        params = yaml.load(target.params)
        params["base"]["source"] = f"path:{SENT}"
        yaml.dump(params, target.params)
        if base is not None:
            payload.write(base, target.root / SENT)
        elif Path(header["folder"]).is_dir():
            (target.root / SENT).symlink_to(header["folder"])
        else:
            raise BaseModelError(f"The base's folder {header['folder']} is too large to be sent, and is not on "
                                 f"{platform.node()}: put it there, or use a hub: base.")
    _run(target.root, "moa base", platform.node(), say, lambda: False, {})
    if read_json(target.base_manifest)["digest"] != header["base"]:
        raise BaseModelError(f"The base {source} as fetched on {platform.node()} is not the one that was pinned: its "
                             "content differs.")


# A stage's command.

def _run(root: Path, command: str, where: str, say: Say, given_up: Callable[[], bool],
         extra: Mapping[str, str]) -> None:
    """Run a command in `root` and pass on what it prints. Raises PipelineError with its error."""
    errors = ErrorLines()
    sent_at = 0.0   # when the last progress record was sent

    def pass_on(line: str) -> None:
        nonlocal sent_at
        if errors.take(line):
            return
        _, record, text = line.partition(MARKER)
        if not record:
            say(line)
        elif time.monotonic() - sent_at >= RECORD_SECONDS:
            sent_at = time.monotonic()
            progress = json.loads(text)
            say(f"{MARKER}{json.dumps({**progress, 'label': f'{where}: ' + progress['label']})}")

    process = SupervisedProcess(["/bin/sh", "-c", command], cwd=root,
                                env=environment({**RECORDS, **extra}), step=False)
    # A second thread reads: engines interrupt this thread to cancel the task, and a blocked read cannot be interrupted.
    # `say` is called here, because engines pass on only what this thread prints.
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        process.follow(lines.put)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while not given_up():
            with contextlib.suppress(queue.Empty):
                if (line := lines.get(timeout=LOOK_SECONDS)) is None:
                    break
                pass_on(line)
    finally:
        process.stop()
    status = process.wait()
    if status:
        cause = errors.cause(status)
        raise PipelineError(str(cause), cause=cause)
