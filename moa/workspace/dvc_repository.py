"""DVC's repository: opened once, asked by one thread at a time, without a word of its own.

With hundreds of stages DVC takes seconds to read its files, which is more than most questions and many steps take.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar

from moa.core.errors import PipelineError
from moa.core.names import is_valid_unicode, printable
from moa.core.subprocesses import QUIET
from moa.core.text import sentence

T = TypeVar("T")
READ = ("dvc.yaml", "dvc.lock", "params.yaml")   # what DVC makes its stages from
_guard = threading.RLock()   # DVC is not made for threads, and the folder where we stand is the process's


class DvcRepository:
    """The repository of the workspace at `root`, and its stages by name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.kept = False            # whether it stays open between two uses
        self._open: Any = None
        self._nodes: dict[str, Any] | None = None
        self._read: dict[str, tuple[int, ...] | None] = {}

    @contextlib.contextmanager
    def stages(self, what: str = "DVC cannot read this workspace's pipeline") -> Iterator[tuple[Any, dict[str, Any]]]:
        """DVC's repository, locked, and its stages, in the workspace's folder.

        A caller that changes one of these stages without recording it must call `close`.
        Raises PipelineError, which begins with `what`.
        """
        os.environ.update({key: value for key, value in QUIET.items() if key.startswith("DVC")})
        from dvc.exceptions import DvcException
        from dvc.repo import lock_repo

        refused: list[OSError] = []
        with _guard, silence_dvc(), listening(refused), contextlib.chdir(self.root), _parsed_once():
            try:
                repo = self._opened()
                with lock_repo(repo):
                    if self._nodes is None:
                        self._nodes = {self.name(stage): stage for stage in repo.index.graph.nodes}
                    yield repo, self._nodes
            except DvcException as error:
                self.close()
                reason = next((each.strerror for each in refused if not isinstance(each, FileNotFoundError)), None)
                raise PipelineError(f"{what}: {sentence(reason or str(error))}") from error
            except UnicodeEncodeError as error:   # in its database of digests
                self.close()
                raise PipelineError(f"{what}: {misnamed(self.root)}") from error
            except BaseException:
                self.close()
                raise
            finally:
                if not self.kept:
                    self.close()

    def close(self) -> None:
        """Forget what was read; the next use reads it again."""
        with _guard:
            if self._open is not None:
                self._open.close()
            self._open = self._nodes = None

    def mark_written(self, name: str) -> None:
        """The file `name` has been written by us, and the stages know what it says."""
        self._read[name] = _stamp(self.root / name)

    def name(self, stage: Any) -> str:
        """DVC names stages from the current folder; we name them from the workspace's root."""
        file = os.path.relpath(stage.path, self.root)
        name = getattr(stage, "name", None)
        return file if name is None else name if file == "dvc.yaml" else f"{file}:{name}"

    def _opened(self) -> Any:
        from dvc.repo import Repo

        now = {name: _stamp(self.root / name) for name in READ}
        if self._open is None or self._read != now:
            self.close()
            self._open, self._read = Repo(str(self.root), _wait_for_lock=True), now
        return self._open


def misnamed(root: Path) -> str:
    """Which file DVC cannot keep because its name is no UTF-8, and what to do."""
    odd = next((path for path in (root / "data").rglob("*") if not is_valid_unicode(path.name)), root)
    return f"the name of {printable(os.path.relpath(odd, root) if odd != root else root)} is no UTF-8; rename it."


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Differs once the file was written."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


@contextlib.contextmanager
def silence_dvc() -> Iterator[None]:
    """No warnings: of locks left by killed processes, and of outputs that are not there yet."""
    logger = logging.getLogger("dvc")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def release_memory(items: Iterable[T]) -> Iterator[T]:
    """The same; what DVC left in memory over one is gone before the next.

    It keeps every list of files that it ever made, and looks through all of them for each.
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
    """Collect what the disk refused: DVC only logs it, and then fails with words about something else."""
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
def _parsed_once() -> Iterator[None]:
    """Let DVC parse a file of parameters once in the block, and find a parameter in it by its name.

    By itself it parses the file again for each stage, and searches all of it for each parameter.
    """
    from dvc.dependency import param

    read, parsed = param.read_param_file, {}

    def found(fs: Any, path: str, keys: list[str] | None = None, flatten: bool = False, **how: Any) -> Any:
        if path not in parsed:
            parsed[path] = param.load_path(path, fs, **how)
        try:
            if keys and flatten:
                return {key: reduce(getitem, key.split("."), parsed[path]) for key in keys}
        except (KeyError, TypeError):
            pass   # one is missing, or stands in a list, or is a pattern
        return read(fs, path, keys, flatten, **how)

    param.read_param_file = found   # DVC offers no other way
    try:
        yield
    finally:
        param.read_param_file = read
