"""The exceptions that moa raises on purpose, for `except moa.errors.ConfigError:` and the like.

Each also inherits a standard exception: wrong input is a `ValueError`, everything else a `RuntimeError`. Each has
`code`, the name of its class, and `errno`, the number of the operating system's error that caused it, or None. The
`PipelineError` of a failed stage has its name as `stage`, and as `cause` the error of the stage's process as data, with
`error` (the name of its class), `errno`, `message` and `status`. A program decides by these, and shows the message.
"""

from moa.core.errors import (
    ArtifactError,
    BaseModelError,
    ConfigError,
    DataError,
    MoaError,
    NothingReleased,
    PipelineError,
    RegistryError,
    StageInterrupted,
    TrainingError,
    UsageError,
)

__all__ = ["ArtifactError", "BaseModelError", "ConfigError", "DataError", "MoaError", "NothingReleased",
           "PipelineError", "RegistryError", "StageInterrupted", "TrainingError", "UsageError"]
