"""DVC's repository, held open between uses, with a lock for threads and with DVC's output suppressed.

With hundreds of stages DVC takes seconds to read its files: longer than most queries, and than many steps. Run as a
program, the module is the `dvc` command that reads params.yaml as moa does.
"""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar

from moa.core.config import LEFT_OUT
from moa.core.errors import PipelineError
from moa.core.names import is_valid_unicode, printable
from moa.core.subprocesses import QUIET
from moa.core.text import sentence

T = TypeVar("T")
READ = ("dvc.yaml", "dvc.lock", "params.yaml")   # files that DVC reads its stages from
_guard = threading.RLock()   # DVC is not thread-safe, and the current folder belongs to the whole process


class DvcRepository:
    """The repository of the workspace at `root`, and its stages by name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.keep_open = False       # whether the repository stays open between two uses
        self._open: Any = None
        self._nodes: dict[str, Any] | None = None
        self._read: dict[str, tuple[int, ...] | None] = {}

    @contextlib.contextmanager
    def stages(self, failure: str = "DVC cannot read this workspace's pipeline"
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
                        self._nodes = {self.name(stage): stage for stage in repo.index.graph.nodes}
                    yield repo, self._nodes
            except DvcException as error:
                self.close()
                reason = next((each.strerror for each in refused if not isinstance(each, FileNotFoundError)), None)
                raise PipelineError(f"{failure}: {sentence(reason or str(error))}") from error
            except UnicodeEncodeError as error:   # from DVC's database of digests
                self.close()
                raise PipelineError(f"{failure}: {misnamed(self.root)}") from error
            except BaseException:
                self.close()
                raise
            finally:
                if not self.keep_open:
                    self.close()

    def close(self) -> None:
        """Close the repository and drop its stages; the next use reads the files again."""
        with _guard:
            if self._open is not None:
                self._open.close()
            self._open = self._nodes = None

    def mark_written(self, name: str) -> None:
        """Note that moa wrote the file `name` and updated the stages, so that the next use need not read it again."""
        self._read[name] = _stamp(self.root / name)

    def name(self, stage: Any) -> str:
        """The stage's name, relative to the workspace's root; DVC's own names are relative to the current folder."""
        file = os.path.relpath(stage.path, self.root)
        name = getattr(stage, "name", None)
        return file if name is None else name if file == "dvc.yaml" else f"{file}:{name}"

    def _opened(self) -> Any:
        """The open repository, opened again if one of the files `READ` has changed."""
        from dvc.repo import Repo

        now = {name: _stamp(self.root / name) for name in READ}
        if self._open is None or self._read != now:
            self.close()
            self._open, self._read = Repo(str(self.root), _wait_for_lock=True), now
        return self._open


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
