"""Continuous delivery for a Mixture-of-LoRAs (Feng et al. 2024, arXiv 2403.03432).

    import moa
    mixture = moa.load("my-experts")
    print(mixture.generate(
        "Maria makes 4 kites and sells each for 9 dollars. The material cost 22 dollars. What is her profit?"))

Names are imported when they are first used. What is not in `__all__` is internal.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moa import errors
    from moa.api.mixture import Mixture, load
    from moa.api.registry import Registry
    from moa.api.results import (
        Added,
        ChampionChange,
        Comparison,
        Completion,
        DomainComparison,
        EpochResult,
        ExpertResult,
        Explanation,
        LevelChoice,
        Plan,
        PlanStep,
        Release,
        Routing,
        Rows,
        RunResult,
        Score,
        TrainingResult,
        Usage,
    )
    from moa.api.training import ExpertStack, LoraConfig, TrainingArguments, cotrain
    from moa.api.workspace import Workspace, init, plan, run

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - by subject
    # Answers
    "load", "Mixture", "Completion", "Routing", "Usage", "Explanation", "LevelChoice", "Score",
    # Workspaces
    "init", "Workspace", "plan", "run", "Added", "Plan", "PlanStep", "RunResult",
    # Releases
    "Registry", "Release", "ChampionChange", "Comparison", "DomainComparison",
    # Experts without a workspace
    "ExpertStack", "LoraConfig", "cotrain", "TrainingArguments", "TrainingResult", "ExpertResult", "EpochResult",
    # Common
    "Rows", "errors",
]

_MODULES = {
    "moa.api.mixture": ("load", "Mixture"),
    "moa.api.registry": ("Registry",),
    "moa.api.training": ("ExpertStack", "LoraConfig", "cotrain", "TrainingArguments"),
    "moa.api.workspace": ("init", "Workspace", "plan", "run"),
}

if not TYPE_CHECKING:   # a type checker would take any name for one of moa's
    def __getattr__(name: str) -> object:
        """Import a public name at its first use (PEP 562)."""
        from importlib import import_module

        if name not in __all__:
            raise AttributeError(f"module 'moa' has no attribute {name!r}")
        if name == "errors":
            return import_module("moa.errors")
        module = next((each for each, names in _MODULES.items() if name in names), "moa.api.results")
        found = globals()[name] = getattr(import_module(module), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
