"""All that moa needs of DVC, and the only module that imports it.

`Dvc` says what that is, in names of stages, paths relative to the workspace's root and plain data. `DvcRepository` does
it in process, with DVC's internals: it holds the repository open between uses, with a lock for threads and with DVC's
output suppressed, because with hundreds of stages DVC takes seconds to read its files, longer than most queries, and
than many steps. `moa.workspace.dvc_commands` does the same with the `dvc` command alone, so that an internal that a new
version of DVC lacks is known by a test, and can be left out.

DVC reads and writes the whole of dvc.lock to record one stage, which takes seconds where there are hundreds of them:
`spliced` replaces one stage's entry in the text instead, and leaves every other byte as it was.

Run as a program, the module is the `dvc` command that reads params.yaml as moa does.
"""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, Protocol, TypeVar

from moa.core import code_version
from moa.core.config import LEFT_OUT
from moa.core.errors import PipelineError
from moa.core.files import write_atomic
from moa.core.names import is_valid_unicode, printable
from moa.core.paths import Workspace
from moa.core.subprocesses import QUIET
from moa.core.text import sentence
from moa.workspace import stage_graph
from moa.workspace.stage_graph import Graph, Reason, Stage

T = TypeVar("T")
READ = ("dvc.yaml", "dvc.lock", "params.yaml")   # files that DVC reads its stages from
HEAD = "schema: '2.0'\nstages:\n"   # beginning of a dvc.lock
ENTRY = re.compile(r"^(?=  \S)", re.MULTILINE)          # an entry begins where a line is indented by two
NAME = re.compile(r"  ([\w@.+/-]+(?::[\w@.+/-]+)*):\n")   # that line, written as DVC writes it
_guard = threading.RLock()   # DVC is not thread-safe, and the current folder belongs to the whole process


@dataclass(frozen=True)
class StageRun:
    """The command that runs a stage, in the workspace's root.

    `inputs` are those of `Dvc.inputs` at its begin, for `Dvc.record`; None = the command records the stage itself.
    """

    command: Sequence[str]
    inputs: Mapping[str, Any] | None
    environment: Mapping[str, str] = field(default_factory=dict)


class Dvc(Protocol):
    """What moa needs of DVC in one workspace.

    Any method may raise PipelineError with DVC's reason. Methods that take a failure's `subject` begin the message with
    it.
    """

    keep_open: bool   # whether what was read stays in memory between two uses, as long as no file changes

    def close(self) -> None:
        """Forget what was read of the pipeline; the next use reads the files again."""

    def graph(self) -> Graph:
        """The stages with their commands and outputs, and data that DVC tracks without a command."""
        ...

    def stale(self, names: Iterable[str] | None = None) -> dict[str, tuple[Reason, ...]]:
        """The stages with a command that are stale themselves, with reasons. `names`: only of these; None = of all."""
        ...

    def restorable(self, names: Iterable[str]) -> set[str]:
        """The stages of `names` that DVC can restore from its run cache: they ran before with their present inputs."""
        ...

    def inputs(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The present digest of every input of the stages `names`, by stage and path; None for a missing input.

        Digests are for comparison with those of the same implementation only.
        """
        ...

    def begin(self, name: str, *, force: bool) -> StageRun | None:
        """What runs the stage `name` now; None where its outputs could be restored instead, which are recorded then.

        `force`: run it even if its outputs can be restored.
        """
        ...

    def record(self, names: Sequence[str], before: Mapping[str, Any] | None = None) -> list[str]:
        """Record stages that have run in dvc.lock, and store their outputs in DVC's cache.

        Returns the stages that were not recorded, because their inputs differ from `before`; None = not compared.
        """
        ...

    def lock_file_is_whole(self) -> bool:
        """Whether DVC can read the file dvc.lock, which exists."""
        ...

    def clear_stale_locks(self) -> None:
        """Delete DVC's path locks if none of their processes runs DVC."""

    def add(self, folder: Path) -> None:
        """Store the present content of `folder` in DVC's cache and its digest in `folder`.dvc."""

    def forget(self, names: Iterable[str], folders: Iterable[Path]) -> None:
        """Remove the stages `names` from dvc.lock, and `folders` from the .gitignore files that DVC maintains."""

    def purge(self, paths: Set[str], roots: Iterable[str]) -> dict[str, int]:
        """Delete versions of `paths` from DVC's cache, and the run cache's entries of stages that read or wrote them.

        Args:
            paths: outputs of stages, relative to the workspace.
            roots: DVC's digests of versions that the run cache does not know.

        Returns:
            `objects` and `bytes` that were deleted; `kept`: number of objects that stay because the present pipeline
            uses them, too.
        """
        ...

    def cached(self, md5: str) -> dict[str, Path]:
        """Paths in DVC's cache of the files of a folder, by their names in it.

        `md5` is DVC's digest of the folder, which ends in `.dir`. Files that the cache lacks are left out.
        """
        ...

    def cache(self) -> Path:
        """The folder of DVC's cache."""
        ...


class DvcRepository:
    """`Dvc` in process: the open repository of a workspace, and DVC's stages by name."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.root = workspace, workspace.root
        self.keep_open = False
        self._open: Any = None
        self._nodes: dict[str, Any] | None = None
        self._read: dict[str, tuple[int, ...] | None] = {}

    def close(self) -> None:
        with _guard:
            if self._open is not None:
                self._open.close()
            self._open = self._nodes = None

    def graph(self) -> Graph:
        with self._stages() as (repo, nodes):
            stages = [Stage(name, _command(stage), tuple(self._path(out) for out in stage.outs))
                      for name, stage in nodes.items()]
            upstream: dict[str, list[str]] = {}
            for below, above in repo.index.graph.edges:
                upstream.setdefault(self._name(below), []).append(self._name(above))
            return Graph(stages, upstream)

    def stale(self, names: Iterable[str] | None = None) -> dict[str, tuple[Reason, ...]]:
        stale = {}
        with self._stages() as (_, nodes):
            chosen = nodes if names is None else {name: nodes[name] for name in names}
            for name, stage in release_memory(chosen.items()):
                changes: list[Any] = next(iter(stage.status().values()), []) if stage.cmd else []
                if changes:
                    entries = (*stage.outs, *stage.deps)
                    stale[name] = stage_graph.reasons(changes, {str(entry): self._path(entry) for entry in entries},
                                                      recorded=any(entry.hash_info for entry in entries))
        return stale

    def restorable(self, names: Iterable[str]) -> set[str]:
        from dvc.exceptions import DvcException

        restorable = set()
        with self._stages() as (repo, nodes):
            for name in release_memory(names):
                stage = nodes[name]
                recorded = [(dep, dep.hash_info, dep.meta) for dep in stage.deps]
                try:
                    stage.save_deps()
                    # The public `restore(dry=True)` would look at the inputs of the last run instead.
                    cached_run = repo.stage_cache._load(stage)
                    if cached_run and repo.stage_cache._create_stage(cached_run, wdir=stage.wdir).outs_cached():
                        restorable.add(name)
                except DvcException:
                    continue   # an input is missing: the stage itself will report it
                finally:
                    for dep, hash_info, meta in recorded:
                        dep.hash_info, dep.meta = hash_info, meta
        return restorable

    def inputs(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        with self._stages() as (_, nodes):
            return {name: self._inputs(nodes[name]) for name in release_memory(names)}

    def begin(self, name: str, *, force: bool) -> StageRun | None:
        with self._stages(f"{name} failed") as (repo, nodes):
            stage = nodes[name]
            if not _simple(name, stage):
                words = ["--wait-for-lock", "repro", *(["--force"] if force else []), "-s", name]
                return StageRun([sys.executable, "-P", "-m", __spec__.name, *words], None)
            stage.remove_outs()
            if not force and _restored(repo, stage):
                self._save(repo, [stage])
                return None
            return StageRun(["/bin/sh", "-c", stage.cmd], self._inputs(stage), {"DVC_STAGE": name})

    def record(self, names: Sequence[str], before: Mapping[str, Any] | None = None) -> list[str]:
        others = f" and {len(names) - 1} more" if names[1:] else ""
        with self._stages(f"{names[0]}{others} could not be recorded") as (repo, nodes):
            changed = [name for name in release_memory(names) if before and self._inputs(nodes[name]) != before[name]]
            self._save(repo, [nodes[name] for name in names if name not in changed])
        return changed

    def lock_file_is_whole(self) -> bool:
        from dvc.schema import COMPILED_LOCKFILE_SCHEMA
        from ruamel.yaml import YAML, YAMLError
        from voluptuous import Invalid  # comes with DVC

        try:
            COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(self._lock_file))
        except (YAMLError, Invalid):
            return False
        return True

    def clear_stale_locks(self) -> None:
        clear_stale_locks(self.root)   # after a crash, another program may have the process id of a lock's holder

    def add(self, folder: Path) -> None:
        from dvc.dvcfile import FileIsGitIgnored
        from dvc.exceptions import DvcException

        refused: list[OSError] = []
        failure = f"DVC cannot version {self.workspace.relative(folder)}"
        try:
            with self.repo() as repo, listening(refused):
                repo.add([str(folder)])
        except UnicodeEncodeError as error:
            raise PipelineError(f"{failure}: {misnamed(self.root)}") from error
        except DvcException as error:
            if refused:
                raise PipelineError(f"{failure}: {refused[0].strerror}.") from refused[0]
            # `/raw/*` would suffice for git, but DVC then ignores the whole folder.
            hint = (" Let git keep it: write `/raw/?*/` instead of `/raw/` into data/.gitignore."
                    if isinstance(error, FileIsGitIgnored) else "")
            raise PipelineError(f"{failure}: {sentence(str(error))}{hint}") from error

    def forget(self, names: Iterable[str], folders: Iterable[Path]) -> None:
        with self.repo() as repo:
            from dvc.utils.serialize import modify_yaml

            if names := list(names):
                with modify_yaml(str(self._lock_file)) as content:
                    for name in names:
                        del content["stages"][name]
            for folder in folders:
                repo.scm_context.ignore_remove(str(folder))

    def purge(self, paths: Set[str], roots: Iterable[str]) -> dict[str, int]:
        with _discarded(), self._stages() as (repo, _):
            used = [each.value for objects in repo.used_objs().values() for each in objects]
            return purge(Path(repo.stage_cache.cache_dir), repo.cache.local.oid_to_path, used, paths, roots)

    def cached(self, md5: str) -> dict[str, Path]:
        with self.repo() as repo:
            return cached(md5, repo.cache.local.oid_to_path)

    def cache(self) -> Path:
        with self.repo() as repo:
            return Path(repo.cache.local_cache_dir)

    @contextlib.contextmanager
    def repo(self) -> Iterator[Any]:
        """DVC's repository, opened anew in the workspace's root with DVC's output suppressed. Raises PipelineError."""
        os.environ.update({key: value for key, value in QUIET.items() if key.startswith("DVC")})
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        with _discarded(), contextlib.chdir(self.root), complete_params(self.root):
            try:
                opened = Repo(_wait_for_lock=True)
            except DvcException as error:   # for instance where git refuses the repository
                raise PipelineError(f"DVC cannot read this workspace: {sentence(str(error))}") from error
            with opened as repo:
                yield repo

    @contextlib.contextmanager
    def _stages(self, failure: str = "DVC cannot read this workspace's pipeline"
                ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield DVC's locked repository and its stages by name, with the workspace as the current folder.

        A caller that changes one of these stages without recording it must call `close`. Raises PipelineError with
        a message that begins with `failure`.
        """
        os.environ.update({key: value for key, value in QUIET.items() if key.startswith("DVC")})
        from dvc.exceptions import DvcException
        from dvc.repo import lock_repo

        refused: list[OSError] = []
        with (_guard, silence_dvc(), listening(refused), contextlib.chdir(self.root), complete_params(self.root),
              _parsed_once()):
            try:
                repo = self._opened()
                with lock_repo(repo):
                    if self._nodes is None:
                        self._nodes = {self._name(stage): stage for stage in repo.index.graph.nodes}
                    yield repo, self._nodes
            except DvcException as error:
                self.close()
                cause = next((each for each in refused if not isinstance(each, FileNotFoundError)), None)
                reason = cause.strerror if cause is not None else None
                raise PipelineError(f"{failure}: {sentence(reason or str(error))}") from cause or error
            except UnicodeEncodeError as error:   # from DVC's database of digests
                self.close()
                raise PipelineError(f"{failure}: {misnamed(self.root)}") from error
            except BaseException:
                self.close()
                raise
            finally:
                if not self.keep_open:
                    self.close()

    def _opened(self) -> Any:
        """The open repository, opened again if one of the files `READ` has changed."""
        from dvc.repo import Repo

        now = {name: _stamp(self.root / name) for name in READ}
        if self._open is None or self._read != now:
            self.close()
            self._open, self._read = Repo(str(self.root), _wait_for_lock=True), now
        return self._open

    def _save(self, repo: Any, stages: Sequence[Any]) -> None:
        """Record `stages` as `dvc commit --force` does, with one write of dvc.lock.

        A stage with an output that is not cached gets no entry in the run cache.
        """
        from dvc.stage.serialize import to_lockfile

        entries = {}
        with repo.scm_context(quiet=True):
            for stage in release_memory(stages):
                stage.save(run_cache=all(out.use_cache or out.metric or out.plot for out in stage.outs))
                stage.commit()
                stage.cmd_changed = False
                entries[stage.name] = dumps_yaml({"stages": to_lockfile(stage)}).partition("\n")[2]
            before = self._lock_file.read_text(encoding="utf-8") if self._lock_file.exists() else ""
            if (text := spliced(before, entries)) is not None:
                write_atomic(self._lock_file, text.encode())
                repo.scm_context.track_file(self._lock_file.name)
            else:
                for stage in stages:
                    stage.dump(update_pipeline=False)
        # The stages are as the file says: the next use need not read it again.
        self._read[self._lock_file.name] = _stamp(self._lock_file)

    def _name(self, stage: Any) -> str:
        """The stage's name, relative to the workspace's root; DVC's own names are relative to the current folder."""
        file = os.path.relpath(stage.path, self.root)
        name = getattr(stage, "name", None)
        return file if name is None else name if file == "dvc.yaml" else f"{file}:{name}"

    def _path(self, entry: Any) -> str:
        """The entry's path relative to the workspace's root; DVC's own paths are relative to the current folder."""
        path = str(entry.fs_path)
        return os.path.relpath(path, self.root) if Path(path).is_absolute() else str(entry)

    def _inputs(self, stage: Any) -> dict[str, Any]:
        """The present digest of each input of the stage, by path."""
        return {self._path(dep): str(dep.get_hash()) if dep.exists else None for dep in stage.deps}

    @property
    def _lock_file(self) -> Path:
        return self.root / "dvc.lock"


def initialise(root: Path) -> bool:
    """Set up DVC in `root`, a folder of a git repository. Returns whether that was needed.

    Raises PipelineError if DVC refuses.
    """
    os.environ.update({key: value for key, value in QUIET.items() if key.startswith("DVC")})
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    folder = root / ".dvc"
    if (folder / "config").exists():
        return False
    if folder.exists() and not (folder / "cache").exists():
        shutil.rmtree(folder)   # left by an interrupted `dvc init`
    try:
        with _discarded():
            Repo.init(str(root), subdir=not (root / ".git").exists()).close()
    except DvcException as error:
        raise PipelineError(f"DVC cannot be set up in {root}: {sentence(str(error))}") from error
    return True


# dvc.lock as text.

def spliced(text: str, entries: Mapping[str, str]) -> str | None:
    """Replace entries in the text of a dvc.lock, and append those of new stages.

    Args:
        text: the present dvc.lock, or "".
        entries: by stage, the lines that DVC would write for it, with the line of its name.

    Returns:
        The new text; None where `text` is not formatted as DVC writes it, so that DVC must write it.
    """
    if not (text or HEAD).startswith(HEAD):
        return None
    before, *rest = ENTRY.split((text or HEAD)[len(HEAD):])
    blocks: dict[str, str] = {}
    for block in rest:
        match = NAME.match(block)
        if not match or match[1] in blocks or not block.endswith("\n") or re.search(r"^\S", block, re.MULTILINE):
            return None   # a name in quotes, a comment, or another group after the stages
        blocks[match[1]] = block
    if before or any(not (match := NAME.match(block)) or match[1] != name for name, block in entries.items()):
        return None
    return HEAD + "".join({**blocks, **entries}.values())


def dumps_yaml(content: Any) -> str:
    """`content` as DVC writes it into its files."""
    from dvc.utils.serialize import dumps_yaml as dumps

    return str(dumps(content))


def parse_for_update(text: str, path: str) -> Any:
    """The content of one of DVC's YAML files, so that `dumps_yaml` keeps its comments. `path` is for error messages."""
    from dvc.utils.serialize import parse_yaml_for_update

    return parse_yaml_for_update(text, path)


# What is found by DVC's documented files alone, whatever implements `Dvc`.

def clear_stale_locks(root: Path) -> None:
    """Delete DVC's path locks in the repository at `root` if none of their processes runs DVC."""
    rwlock = root / ".dvc" / "tmp" / "rwlock"
    try:
        held = json.loads(rwlock.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError:
        held = {}   # the file was truncated by a crash
    pids = [info["pid"] for info in held.get("write", {}).values()]
    pids += [info["pid"] for infos in held.get("read", {}).values() for info in infos]
    if not any(_is_dvc(pid) for pid in pids):
        rwlock.unlink(missing_ok=True)


def purge(runs_folder: Path, path_of: Callable[[str], str], used_roots: Iterable[str], paths: Set[str],
          roots: Iterable[str]) -> dict[str, int]:
    """As `Dvc.purge`.

    Args:
        runs_folder: folder of the run cache.
        path_of: maps an object's digest to its path in the cache.
        used_roots: digests of the files and folders that the present pipeline uses.
    """
    runs = {path: entry for path in sorted(runs_folder.glob("*/*/*"))
            if (entry := _read_yaml(path)) and paths & {each["path"] for each in _entries(entry)}}
    roots = {*roots, *(each["md5"] for entry in runs.values() for each in _entries(entry)
                       if each["path"] in paths and "md5" in each)}
    stored = {oid for root in roots for oid in _contents(root, path_of) if Path(path_of(oid)).exists()}
    used = {oid for root in used_roots for oid in _contents(root, path_of)}
    size = 0
    # Folders' lists are deleted after their files, and runs last, so that a second purge finds what is left.
    for oid in sorted(stored - used, key=lambda oid: oid.endswith(".dir")):
        path = Path(path_of(oid))
        size += path.stat().st_size
        path.unlink()
    for path in runs:
        path.unlink()
        with contextlib.suppress(OSError):   # another run of the same stage is in it
            path.parent.rmdir()   # DVC cannot read the run cache of a stage whose folder is empty
    return {"objects": len(stored - used), "bytes": size, "kept": len(stored & used)}


def cached(md5: str, path_of: Callable[[str], str]) -> dict[str, Path]:
    """As `Dvc.cached`. `path_of` maps an object's digest to its path in the cache."""
    try:
        listed = json.loads(Path(path_of(md5)).read_bytes())
    except (OSError, ValueError):
        return {}
    found = {file["relpath"]: Path(path_of(file["md5"])) for file in listed}
    return {name: path for name, path in found.items() if path.is_file()}


def _read_yaml(path: Path) -> Any:
    from ruamel.yaml import YAML, YAMLError

    try:
        return YAML(typ="safe").load(path)
    except (OSError, YAMLError):
        return None   # DVC ignores such an entry, too


def _entries(run: Mapping[str, Any]) -> list[Any]:
    """Inputs and outputs of an entry of DVC's run cache."""
    return [*run.get("deps", ()), *run.get("outs", ())]


def _contents(oid: str, path_of: Callable[[str], str]) -> Iterator[str]:
    """The object `oid` of DVC's cache and, if it is a folder, the objects in it. `path_of` maps an id to its path."""
    yield oid
    if oid.endswith(".dir"):
        with contextlib.suppress(OSError, ValueError):
            yield from (each["md5"] for each in json.loads(Path(path_of(oid)).read_bytes()))


def _is_dvc(pid: int) -> bool:
    """Whether a process of this id runs DVC."""
    import psutil  # comes with DVC

    try:
        return any("dvc" in Path(part).name for part in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def _simple(name: str, stage: Any) -> bool:
    """Whether `dvc repro` would do no more than run the stage's command: true of moa's own stages, unless edited."""
    return (name.split("@")[0] in code_version.STAGES and isinstance(stage.cmd, str) and "\n" not in stage.cmd
            and not stage.frozen and Path(stage.wdir) == Path(stage.path).parent)


def _restored(repo: Any, stage: Any) -> bool:
    """Restore the stage's outputs from DVC's run cache. Returns whether it had them."""
    from dvc.stage.cache import RunCacheNotFoundError

    try:
        repo.stage_cache.restore(stage)
    except RunCacheNotFoundError:
        return False
    return True


def _command(stage: Any) -> str | None:
    command = stage.cmd
    return "\n".join(command) if isinstance(command, list) else command


# DVC's internals, changed within a block.

def misnamed(root: Path) -> str:
    """The end of an error message: which file has a name that is not UTF-8, which DVC cannot store."""
    odd = next((path for path in (root / "data").rglob("*") if not is_valid_unicode(path.name)), root)
    return f"the name of {printable(os.path.relpath(odd, root) if odd != root else root)} is no UTF-8; rename it."


def _stamp(path: Path) -> tuple[int, ...] | None:
    """The file's time, size and inode, which change when it is written; None without a file."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


@contextlib.contextmanager
def silence_dvc() -> Iterator[None]:
    """Suppress DVC's warnings and progress bars within the block.

    The warnings are about locks of killed processes, and outputs that do not exist yet. A bar is not drawn where the
    level of its module's logger is above ERROR.
    """
    loggers = [logging.getLogger(name) for name in ("dvc", "dvc_data.callbacks")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _discarded() -> Iterator[None]:
    """Suppress all that DVC prints: the user called moa, not DVC."""
    discarded = io.StringIO()
    with silence_dvc(), contextlib.redirect_stdout(discarded), contextlib.redirect_stderr(discarded):
        yield


def release_memory(items: Iterable[T]) -> Iterator[T]:
    """Yield `items`; what DVC stored in memory while one was handled is deleted before the next.

    DVC's in-memory file system keeps every file list that DVC makes, and DVC scans all of them at each use: over
    hundreds of stages the time would grow with the square.
    """
    import fsspec  # comes with DVC

    store = fsspec.filesystem("memory").store
    before = set(store)
    for item in items:
        yield item
        for name in store.keys() - before:
            del store[name]


@contextlib.contextmanager
def listening(errors: list[OSError]) -> Iterator[None]:
    """Append to `errors` each OSError that DVC logs within the block.

    DVC raises an error without the cause afterwards, such as a full disk.
    """
    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and isinstance(record.exc_info[1], OSError):
                errors.append(record.exc_info[1])

    loggers = [logging.getLogger(name) for name in ("dvc_data", "dvc_objects")]
    before = [logger.handlers for logger in loggers]
    for logger in loggers:
        logger.handlers = [Listener()]
    try:
        yield
    finally:
        for logger, handlers in zip(loggers, before, strict=True):
            logger.handlers = handlers


@contextlib.contextmanager
def complete_params(root: Path) -> Iterator[None]:
    """Within the block DVC reads the params.yaml of `root` as if it wrote out the keys of `LEFT_OUT` that it lacks.

    A group that is left out is then the same as an empty one: it changes as soon as one of its keys is set. DVC itself
    cannot read a stage that depends on a missing group.
    """
    from dvc.dependency import param
    from dvc.utils import serialize

    load, params = serialize.load_path, root.resolve() / "params.yaml"

    def load_complete(path: str, *words: Any, **options: Any) -> Any:
        content = load(path, *words, **options)
        ours = isinstance(content, Mapping) and Path(path).resolve() == params
        return {**LEFT_OUT, **content} if ours else content

    serialize.load_path = param.load_path = load_complete   # DVC has no public hook for this
    try:
        yield
    finally:
        serialize.load_path = param.load_path = load


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Make DVC parse each parameter file once within the block, and look parameters up by name.

    DVC itself parses the file again for each stage, and searches the whole file for each parameter.
    """
    from dvc.dependency import param

    read, parsed = param.read_param_file, {}

    def read_once(fs: Any, path: str, keys: list[str] | None = None, flatten: bool = False, **options: Any) -> Any:
        if path not in parsed:
            parsed[path] = param.load_path(path, fs, **options)
        try:
            if keys and flatten:
                return {key: reduce(getitem, key.split("."), parsed[path]) for key in keys}
        except (KeyError, TypeError):
            pass   # a key is missing, lies in a list, or is a pattern: DVC's function handles these
        return read(fs, path, keys, flatten, **options)

    param.read_param_file = read_once   # DVC has no public hook for this
    try:
        yield
    finally:
        param.read_param_file = read


def main(words: Sequence[str]) -> int:
    """Run `dvc WORDS` in the current folder, with `complete_params`. Returns DVC's exit code."""
    from dvc.cli import main as dvc

    with complete_params(Path.cwd()):
        return int(dvc(list(words)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
