"""A small tree of errors a user can act on.

Each message is one sentence or two: what is wrong, where, what is allowed, what to run next.
The command line prints it without a traceback and exits with `exit_code`.
"""

import errno

# Error numbers of a full disk and of too many open files: the machine is the cause, not the file being read.
OF_MACHINE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE})


class MoaError(Exception):
    """An error that the user can act on; any other exception is a bug and keeps its traceback."""

    exit_code = 1


class UsageError(MoaError):
    """A command's arguments are wrong, or it was run in the wrong folder."""

    exit_code = 2


class ConfigError(MoaError):
    """`params.yaml` has a value or key that is not allowed; the message names the key."""


class DataError(MoaError):
    """A domain's rows cannot be used; the message names the file and the line."""


class BaseModelError(MoaError):
    """The base cannot be fetched, verified or loaded."""


class ArtifactError(MoaError):
    """An expert, router or mixture on disk does not fit what its manifest or the base says."""


class TrainingError(MoaError):
    """An expert could not be trained, for instance because its loss is no longer finite."""


class PipelineError(MoaError):
    """A stage failed, or DVC refused; the message names the stage."""


class RegistryError(MoaError):
    """MLflow cannot be reached, or lacks the version asked for."""


class NothingReleased(RegistryError):
    """There is no champion yet. Its exit code tells `moa up` that `moa serve` only waits for one."""

    exit_code = 4


def of_machine(error: BaseException) -> bool:
    """Whether the cause of `error` is the machine, by its error number, and not the file that was being read."""
    return isinstance(error, OSError) and error.errno in OF_MACHINE


def in_words(error: BaseException) -> str:
    """Another library's error on one line, without paths of this machine, with its class where that adds something."""
    text = (error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split()))[:200]
    if not text:
        return type(error).__name__
    return text if isinstance(error, OSError | MoaError) else f"{type(error).__name__}: {text}"
