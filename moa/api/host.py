"""What a call of the API leaves alone: the settings of the process that it runs in, and a running event loop.

The packages below, and the libraries that they import, set environment variables, logging levels and warnings filters.
In a process that the command line started these may stay. In a host process each call of the API restores them.
"""

import asyncio
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from typing import TypeVar

from moa.core.progress import logged

T = TypeVar("T")

LOGGER = logging.getLogger("moa.api")
# Environment variables that moa and its libraries set. Others are the host's, and may change during a call.
PREFIXES = ("DVC_", "GIT_PYTHON_", "KMP_", "MLFLOW_", "ONEDNN_", "PREFECT_", "TORCH")
NAMES = ("DO_NOT_TRACK", "NO_PROXY", "no_proxy")
MOAS_LOGGERS = ("mlflow", "alembic")   # loggers that moa silences, also before MLflow has made them
ENDING_SECONDS = 0.2   # between two looks at what an interrupted call has started

_guard = threading.Lock()
_calls = 0   # calls that run now, in all threads: the first one saves the settings, and the last one restores them
_saved = ExitStack()


@contextmanager
def host_kept() -> Iterator[None]:
    """Undo, at the end of the block, changes of moa's environment variables, logging levels and handlers, warnings
    filters and transformers' verbosity. Within the block, lines about progress go to the logger `moa.api`.

    Blocks nest, and run in several threads: the settings are restored when the last one ends.
    """
    global _calls, _saved
    with _guard:
        if _calls == 0:
            _saved = ExitStack()
            for restored in (warnings.catch_warnings(), _environment(), _logging(), _transformers()):
                _saved.enter_context(restored)
        _calls += 1
    try:
        with logged(LOGGER):
            yield
    finally:
        with _guard:
            _calls -= 1
            if _calls == 0:
                _saved.close()


@contextmanager
def _environment() -> Iterator[None]:
    before = _moas_variables()
    try:
        yield
    finally:
        for name in _moas_variables().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _moas_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIXES) or name in NAMES}


@contextmanager
def _logging() -> Iterator[None]:
    def loggers() -> dict[str, logging.Logger]:
        known = logging.root.manager.loggerDict.items()
        return {"": logging.root, **{name: each for name, each in known if isinstance(each, logging.Logger)}}

    before = {name: logger.level for name, logger in loggers().items()}
    handlers = list(logging.root.handlers)
    try:
        yield
    finally:
        for handler in [each for each in logging.root.handlers if each not in handlers]:   # Prefect adds one
            logging.root.removeHandler(handler)
        for name, logger in loggers().items():
            if (name in before or name.startswith(MOAS_LOGGERS)) and logger.level != before.get(name, logging.NOTSET):
                logger.setLevel(before.get(name, logging.NOTSET))


@contextmanager
def _transformers() -> Iterator[None]:
    """Restore transformers' verbosity and progress bars, or its defaults if it is imported within the block."""
    def settings() -> tuple[int, bool] | None:
        if "transformers.utils.logging" not in sys.modules:
            return None
        from transformers.utils import logging as library

        return library.get_verbosity(), library.is_progress_bar_enabled()

    before = settings()
    try:
        yield
    finally:
        if (after := settings()) is not None and after != before:
            from transformers.utils import logging as library

            default = library.log_levels.get(os.environ.get("TRANSFORMERS_VERBOSITY", ""), logging.WARNING)
            level, bars = before or (default, True)
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()


def outside_event_loop(function: Callable[[], T]) -> T:
    """Call `function` in a thread where this one has a running event loop, as in a notebook, else here.

    Ctrl-C ends the processes that the function starts, and raises KeyboardInterrupt once the function has ended.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:   # there is none
        return function()
    from moa.core.supervisor import stop_all

    with ThreadPoolExecutor(1, thread_name_prefix="moa-api") as pool:
        future = pool.submit(copy_context().run, function)
        try:
            return future.result()
        except KeyboardInterrupt:
            while wait([future], timeout=ENDING_SECONDS).not_done:
                stop_all()   # again and again: the function may start further ones
            raise
