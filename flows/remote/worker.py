"""The far end of a training that is sent away: a payload in, experts out. Knows no engine, and needs no disk of ours.

A temporary workspace is made of the payload, the base is fetched by its own reference, and the stage's own command runs
there, supervised, so that it ends when the worker does. Bases stay in a folder of the worker, by digest:
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
from moa.core.errors import BaseModelError, MoaError, PipelineError
from moa.core.files import read_json
from moa.core.paths import Workspace
from moa.core.progress import MARKER
from moa.core.subprocesses import environment, last_error
from moa.core.supervisor import SupervisedProcess

RECORD_SECONDS = 1.0   # between two progress records that are sent home
LOOK_SECONDS = 1.0     # between two checks whether the driver still wants the result
SENT = "sent"          # where the files of a `path:` base lie, in its folder of the cache

Say = Callable[[str], object]


def work(files: Files, base: Files | None, say: Say = print, given_up: Callable[[], bool] = lambda: False,
         threads: int | None = None) -> Files:
    """Train what a payload asks for; its answer holds the experts, or a sentence that says why there are none.

    `base`: files of a base that no worker can fetch. `given_up` says that the driver wants the result no more.
    `threads` of the training on a CPU; None = as the environment says.
    """
    header, where = payload.header(files), platform.node()
    with tempfile.TemporaryDirectory(prefix="moa-worker-") as folder:
        source = sources.parse(header["source"])
        root = Path(folder, "w", *["w"] * source.name.count(".."))   # as deep as `path:../..` reaches up
        root.mkdir(parents=True)
        workspace, error = Workspace(root), None
        try:
            if code_version.digest("train") != header["code"]:
                raise PipelineError(f"The worker on {where} has another version of moa than the one that sent the "
                                    "work: install the same on both.")
            payload.write({name: data for name, data in files.items() if name != payload.HEADER}, root)
            _bring_base(workspace, source, header, base, say)
            command = f"{header['command']} {' '.join(f'--domain {domain}' for domain in header['domains'])}"
            say(f"{where}, in {folder}: {command}")
            _run(root, command, where, say, given_up, {"OMP_NUM_THREADS": str(threads)} if threads else {})
        except MoaError as problem:
            error = str(problem)
        return payload.pack_answer(workspace, header["domains"], error, where)


# The base, fetched once for each worker's cache.

def _bring_base(workspace: Workspace, source: sources.Source, header: dict[str, Any], base: Files | None,
                say: Say) -> None:
    """Put the base into `workspace`, in which its manifest lies already; training holds it against that."""
    from filelock import FileLock

    place = cache() / "bases" / header["base"]
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.parent / f".{place.name}.lock"):
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=".") as folder:
                made = Workspace(Path(folder) / "base")
                _fetch(workspace, made, source, header, base, say)
                made.root.replace(place)
    kept = Workspace(place)
    workspace.base.symlink_to(kept.base)
    workspace.local.mkdir()
    kept.cache.mkdir(parents=True, exist_ok=True)
    workspace.cache.symlink_to(kept.cache)   # with the digests of large files, which are not read twice
    if source.kind == "path":
        named = workspace.root / source.name
        named.parent.mkdir(parents=True, exist_ok=True)
        named.symlink_to(place / SENT)


def cache() -> Path:
    """This worker's own folder."""
    return Path(os.environ.get("MOA_WORKER_CACHE") or Path.home() / ".cache" / "moa")


def _fetch(workspace: Workspace, made: Workspace, source: sources.Source, header: dict[str, Any],
           base: Files | None, say: Say) -> None:
    """Stage `base` in a workspace of its own. Raises BaseModelError unless it is the very base of the payload."""
    from ruamel.yaml import YAML

    made.root.mkdir()
    for path in (workspace.params, workspace.root / "dvc.yaml"):
        shutil.copyfile(path, made.root / path.name)
    if source.kind == "path":
        yaml = YAML(typ="safe")
        params = yaml.load(made.params)
        params["base"]["source"] = f"path:{SENT}"
        yaml.dump(params, made.params)
        if base is not None:
            payload.write(base, made.root / SENT)
        elif Path(header["folder"]).is_dir():
            (made.root / SENT).symlink_to(header["folder"])
        else:
            raise BaseModelError(f"The base's folder {header['folder']} is too large to be sent, and is not on "
                                 f"{platform.node()}: put it there, or use a hub: base.")
    _run(made.root, "moa base", platform.node(), say, lambda: False, {})
    if read_json(made.base_manifest)["digest"] != header["base"]:
        raise BaseModelError(f"The base {source} as fetched on {platform.node()} is not the one that was pinned: its "
                             "content differs.")


# A command of the stage.

def _run(root: Path, command: str, where: str, say: Say, given_up: Callable[[], bool],
         extra: Mapping[str, str]) -> None:
    """Run a command in `root` and pass on what it says. Raises PipelineError with the reason that it gives."""
    tail: list[str] = []
    told = 0.0

    def keep(line: str) -> None:
        nonlocal told
        _, record, text = line.partition(MARKER)
        if not record:
            tail.append(line)
            del tail[:-200]
            say(line)
        elif time.monotonic() - told >= RECORD_SECONDS:
            told = time.monotonic()
            said = json.loads(text)
            say(f"{MARKER}{json.dumps({**said, 'label': f'{where}: ' + said['label']})}")

    process = SupervisedProcess(["/bin/sh", "-c", command], cwd=root,
                                env=environment({"MOA_PROGRESS": "json", **extra}), step=False)
    # Engines interrupt this thread, and nothing interrupts one that waits for a line; but they hear this one alone.
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
                keep(line)
    finally:
        process.stop()
    status = process.wait()
    if status:
        raise PipelineError(last_error(tail, status))
