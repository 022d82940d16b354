"""The exceptions that moa raises on purpose, for `except moa.errors.ConfigError:` and the like.

Each also inherits a standard exception: wrong input is a `ValueError`, everything else a `RuntimeError`.
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
    TrainingError,
    UsageError,
)

__all__ = ["ArtifactError", "BaseModelError", "ConfigError", "DataError", "MoaError", "NothingReleased",
           "PipelineError", "RegistryError", "TrainingError", "UsageError"]
