"""Why DVC finds a stage stale, in our words. Knows DVC's words, and nothing else of it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moa.workspace.stage_graph import CHANGED, NEW, RESTORE, Reason


def reasons(changes: Sequence[Any], paths: Mapping[str, str], *, recorded: bool) -> tuple[Reason, ...]:
    """`changes`: what DVC's status says of one stage. `paths`: our names of the files that it names.

    `recorded`: whether the stage ever ran.
    """
    if not recorded:
        return (Reason(NEW, "never run"),)
    return tuple(reason for change in changes for reason in _explain(change, paths))


def _explain(change: Any, paths: Mapping[str, str]) -> Iterator[Reason]:
    """One entry of DVC's status: a word, or changed inputs or outputs by path."""
    if not isinstance(change, Mapping):
        yield Reason(CHANGED, "its command changed" if change == "changed command" else str(change))
        return
    for path, state in change.get("changed deps", {}).items():
        if isinstance(state, Mapping):
            begins = path.endswith(".moa/starts.json")
            yield from (Reason(CHANGED, "where its training begins changed" if begins else
                               f"parameter {key} {_state(how)}") for key, how in state.items())
        else:
            yield Reason(CHANGED, f"{paths.get(path, path)} {_state(state)}")
    for path, state in change.get("changed outs", {}).items():
        if state == "modified":
            yield Reason(CHANGED, f"its output {paths.get(path, path)} was changed by something else")
        else:
            yield Reason(RESTORE, f"its output {paths.get(path, path)} is "
                                  f"{'missing' if state == 'deleted' else state}")


def _state(state: str) -> str:
    return {"modified": "changed", "deleted": "is missing", "new": "is new"}.get(state, state)
