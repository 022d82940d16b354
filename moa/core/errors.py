"""The errors that a user can act on, all derived from `MoaError`.

Each message is one sentence or two: what is wrong, where, what is allowed, what to run next. The command line prints
the message without a traceback and exits with `exit_code`. Each also inherits the standard exception that a program
which knows nothing of moa would catch.
"""

import errno

# A full disk or quota, a file size limit, too many open files: the machine is the cause, not the file that is read.
OF_MACHINE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE})


class MoaError(Exception):
    """An error that the user can act on; any other exception is a bug and keeps its traceback."""

    exit_code = 1


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
    """A stage failed, or DVC refused; the message names the stage."""


class RegistryError(MoaError, RuntimeError):
    """MLflow cannot be reached, or lacks the requested version."""


class NothingReleased(RegistryError):
    """There is no champion yet. Its exit code tells `moa up` that `moa serve` only waits for one."""

    exit_code = 4


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
