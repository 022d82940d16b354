"""The errors that a user can act on, all derived from `MoaError`.

Each message is one sentence or two: what is wrong, where, what is allowed, what to run next. The command line prints
the message without a traceback and exits with `exit_code`. Each also inherits the standard exception that a program
which knows nothing of moa would catch.

What is done about an error depends on its class and its error number, never on its words. They cross a process boundary
as an `ErrorRecord`: a command that fails prints one as a line of JSON behind `RECORD`, where its parent asks for it.
"""

import errno
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Self

# A full disk or quota, a file size limit, too many open files, no memory, a broken disk: the machine is the cause, not
# the file that is read.
OF_MACHINE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO})
RECORDS_WANTED = "MOA_ERRORS"     # environment variable: `json` makes a command that fails print a record
RECORD = "::moa-error::"          # begins an error's record in a command's output


class MoaError(Exception):
    """An error that the user can act on; any other exception is a bug and keeps its traceback."""

    exit_code = 1

    @property
    def code(self) -> str:
        """The name of the error's class, such as `DataError`."""
        return type(self).__name__

    @property
    def errno(self) -> int | None:
        """The error number of the operating system's error that caused this one (`raise ... from`), if one did."""
        return error_number(self.__cause__) if self.__cause__ is not None else None


class UsageError(MoaError, ValueError):
    """A command's arguments are wrong, or it was run in the wrong folder."""

    exit_code = 2


class ConfigError(MoaError, ValueError):
    """`params.yaml` has a value or key that is not allowed; the message names the key."""


class DataError(MoaError, ValueError):
    """A domain's rows cannot be used; the message names the file and the line."""


class BaseModelError(MoaError, RuntimeError):
    """The base cannot be fetched, verified or loaded."""


class ArtifactError(MoaError, RuntimeError):
    """An expert, router or mixture on disk does not fit what its manifest or the base says."""


class TrainingError(MoaError, RuntimeError):
    """An expert could not be trained, for instance because its loss is no longer finite."""


class PipelineError(MoaError, RuntimeError):
    """A stage failed, or DVC refused; the message names the stage.

    `stage` is its name, or None where several failed; `cause` the error of its process as data, if it had one.
    """

    def __init__(self, *words: object, stage: str | None = None, cause: "ErrorRecord | None" = None) -> None:
        super().__init__(*words)
        self.stage, self.cause = stage, cause

    @property
    def errno(self) -> int | None:
        """The error number of the child process's error, or else as of any `MoaError`."""
        return self.cause.errno if self.cause is not None else super().errno


class StageInterrupted(PipelineError):
    """A stage was ended, or not begun, because the run was interrupted: nothing is wrong with it."""


class RegistryError(MoaError, RuntimeError):
    """MLflow cannot be reached, or lacks the requested version."""


class NothingReleased(RegistryError):
    """There is no champion yet. Its exit code tells `moa up` that `moa serve` only waits for one."""

    exit_code = 4


# Errors as data.

@dataclass(frozen=True)
class ErrorRecord:
    """The error of a process that failed, as its parent gets it. As text it is the message."""

    message: str
    error: str | None = None    # name of the exception's class; None where the process printed no record
    errno: int | None = None    # of the operating system's error that was the cause, if one was
    status: int | None = None   # the process's exit status, 128 and the signal's number where a signal ended it

    def __str__(self) -> str:
        return self.message

    @classmethod
    def of(cls, error: BaseException, message: str | None = None) -> Self:
        """The record of an exception; of a failed child process's, with the class that failed there.

        Args:
            message: instead of the exception's own, `in_words`.
        """
        cause = getattr(error, "cause", None)
        name = cause.error if isinstance(cause, ErrorRecord) else type(error).__name__
        text = str(error) if isinstance(error, MoaError) else in_words(error)
        return cls(text if message is None else message, name, error_number(error))

    @classmethod
    def read(cls, data: Any) -> Self:
        """The record that `as_dict` gave. A plain string, as older versions wrote, becomes its message."""
        if not isinstance(data, dict):
            return cls(str(data))
        number = data.get("errno")
        return cls(str(data["message"]), data.get("error"), number if isinstance(number, int) else None)

    def as_dict(self) -> dict[str, Any]:
        """The record for JSON: error, errno, message."""
        return {key: value for key, value in asdict(self).items() if key != "status"}

    @property
    def blames_rows(self) -> bool:
        """Whether the rows of the domain are at fault: its class says so, and no error number blames the machine."""
        return self.error in (DataError.__name__, TrainingError.__name__) and self.errno not in OF_MACHINE


def blames_rows(error: BaseException) -> bool:
    """Whether the rows of the domain are at fault that the failed stage worked on, and not the machine or moa."""
    return ErrorRecord.of(error).blames_rows


def decisive(records: Iterable[ErrorRecord]) -> ErrorRecord | None:
    """The record that decides what to do, of those of several processes: the last that does not blame the rows, if any.

    Returns the last one where all blame the rows, and None without records.
    """
    last = None
    for record in records:
        if last is None or last.blames_rows or not record.blames_rows:
            last = record
    return last


def report(error: BaseException, message: str | None = None) -> None:
    """Print the record of an error that ends this process, where the parent process asks for it (RECORDS_WANTED).

    The parent reads standard output from a pipe, so that the record also arrives where a full disk is the error.
    `message`: as for `ErrorRecord.of`.
    """
    if os.environ.get(RECORDS_WANTED) == "json":
        with suppress(OSError, ValueError):   # the parent is gone, or has closed the pipe
            print(f"{RECORD}{json.dumps(ErrorRecord.of(error, message).as_dict())}", flush=True)


def reported(line: str) -> ErrorRecord | None:
    """The record in a line of a process's output, if it holds one."""
    _, found, text = line.partition(RECORD)
    if found:
        with suppress(ValueError, KeyError):   # a line that another process wrote into
            return ErrorRecord.read(json.loads(text))
    return None


def error_number(error: BaseException) -> int | None:
    """The error number of an OSError or MoaError, or of SQLite's error about the disk; None without one."""
    import sqlite3  # not at the top, because every start of moa imports this module

    if isinstance(error, sqlite3.Error):   # an extended result code has the result code in its lowest byte
        numbers = {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_IOERR: errno.EIO}
        return numbers.get(getattr(error, "sqlite_errorcode", -1) & 0xFF)
    return error.errno if isinstance(error, OSError | MoaError) else None


def of_machine(error: BaseException) -> bool:
    """Whether the error number says that the machine, and not the file that was being read, caused `error`."""
    return isinstance(error, OSError) and error.errno in OF_MACHINE


def in_words(error: BaseException) -> str:
    """`error` on one line of some 200 characters, with its class unless it is an OSError or a MoaError.

    An OSError gives its reason alone, so that no path of this machine gets into the text.
    """
    text = (error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split()))[:200]
    if not text:
        return type(error).__name__
    return text if isinstance(error, OSError | MoaError) else f"{type(error).__name__}: {text}"
