"""`moa domain check`: a domain's corpus brought up to date, and all that can be said of it before training.

Knows no figures of its own: `moa.data.quality` describes the corpus, `moa.data.overlap` how it lies to the others.
"""

from collections.abc import Callable
from typing import Any

from moa.core.config import Config
from moa.core.files import read_json
from moa.core.paths import Workspace
from moa.data import overlap
from moa.workspace.pipeline import Pipeline


def check(workspace: Workspace, config: Config, domain: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """The report on `domain`. `tell` hears which stages run first.

    Raises PipelineError when the corpus cannot be prepared.
    """
    pipeline = Pipeline(workspace)
    with pipeline.lock():
        _bring_up_to_date(pipeline, f"prepare@{config.require_domain(domain)}", tell)
        report: dict[str, Any] = read_json(workspace.corpus(domain) / "quality.json")
        compared = overlap.across(workspace, config, domain)
    return {**report, "across": compared, "warnings": [*report["warnings"], *compared.pop("warnings")]}


def _bring_up_to_date(pipeline: Pipeline, target: str, tell: Callable[[str], None]) -> None:
    """Run what is stale of `target` and of what it reads from, and nothing else."""
    graph = pipeline.snapshot().graph
    graph.matching(target)   # or it is no stage
    needed, new = set(), {target}
    while new:
        needed |= new
        new = {above for name in new for above in graph.upstream(name)} - needed
    for name in (name for generation in graph.generations() for name in generation if name in needed):
        if graph.stages[name].command and name in pipeline.stale([name]):
            tell(name)
            pipeline.reproduce(name, lambda _: None)
