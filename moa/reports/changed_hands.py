"""Known prompts that changed hands: the test rows of two evaluations that another expert, or the base, answers now.

The comparison is `moa.evaluation.routing.changed_hands`. Facts are JSON values:

    before, now    names of the two mixtures
    rows           as the comparison returns them, each with its `question`; "" where the present corpus lacks the row
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moa.core.config import Config
from moa.core.errors import ArtifactError, RegistryError
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.core.text import shorten, table
from moa.data import corpus
from moa.evaluation import routing
from moa.evaluation.evaluate import read_rows
from moa.mixture import incumbent
from moa.reports import html

NONE = "No known prompt changed hands."
IN_TEXT, IN_PAGE = 10, 100   # most rows that are listed
ID = 8                       # characters of a row's id in text, enough for `moa domain which`
QUESTION = 200               # characters of a question in the facts
Facts = Mapping[str, Any]


# Facts.

def since_champion(workspace: Workspace) -> dict[str, Any] | None:
    """The evaluation in data/reports against the champion's in data/champion.

    Returns:
        The facts, or None where one of them is missing or the champion is the workspace's own mixture.
    """
    champion, here = (_manifest(folder) for folder in (workspace.champion, workspace.mixture))
    if champion.get("digest") == here.get("digest") or not _same_base(champion, here):
        return None
    # `read_rows` takes a release's mixture folder, which has its reports beside it, as data/mixture has.
    return _facts(workspace, "the champion", incumbent.rows(workspace), "this workspace", read_rows(workspace.mixture))


def of_releases(workspace: Workspace, config: Config, before: int | None, now: int) -> dict[str, Any] | None:
    """The evaluations that two releases were registered with.

    Returns:
        The facts, or None where `before` is None or `now` itself, or one of the releases recorded no rows or cannot be
        read.
    """
    from moa.release.registry import Registry

    registry = Registry(workspace, config)
    if before is None or before == now or not registry.exists():
        return None
    try:
        folders = [registry.download(version) for version in (before, now)]
    except (RegistryError, ArtifactError):
        return None
    if not _same_base(*map(_manifest, folders)):
        return None
    return _facts(workspace, f"version {before}", read_rows(folders[0]), f"version {now}", read_rows(folders[1]))


def of_comparison(workspace: Workspace, compared: Facts) -> dict[str, Any] | None:
    """The rows of `moa.release.champion.compare_versions`, all of which both releases have answered now."""
    sides = [[{"domain": row["domain"], "row": row["row"], "system": "routed", "answered_by": row[f"{name}_by"],
               "loss": row[f"{name}_loss"]} for row in compared["rows"] if f"{name}_by" in row]
             for name in ("incumbent", "challenger")]
    before, now = (f"version {compared[name]}" for name in ("incumbent", "challenger"))
    return _facts(workspace, before, sides[0], now, sides[1])


def _facts(workspace: Workspace, before: str, old: Sequence[routing.Row], now: str,
           new: Sequence[routing.Row]) -> dict[str, Any] | None:
    if not old or not new:
        return None
    rows = routing.changed_hands(old, new)
    questions = _questions(workspace, {row["domain"] for row in rows})
    return {"before": before, "now": now,
            "rows": [{**row, "question": questions.get((row["domain"], row["row"]), "")} for row in rows]}


def _questions(workspace: Workspace, domains: Iterable[str]) -> dict[tuple[str, str], str]:
    """The questions of the present test rows, by domain and id."""
    found: dict[tuple[str, str], str] = {}
    for domain in domains:
        with suppress(ArtifactError):   # the domain was removed, or is not prepared in this clone
            found |= {(domain, row.id): shorten(row.question, QUESTION)
                      for row in corpus.read(workspace.corpus(domain), "test")}
    return found


def _same_base(before: Facts, now: Facts) -> bool:
    """Whether losses under both mixtures can be compared."""
    old, new = before.get("base") or {}, now.get("base") or {}
    return all(old.get(part) == new.get(part) for part in ("weights", "tokenizer", "template"))


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a folder; empty without a readable one."""
    with suppress(OSError, ValueError):
        content = read_json(folder / MANIFEST)
        if isinstance(content, dict):
            return content
    return {}


# Text, and data for the page.

def text(facts: Facts | None) -> str:
    """The facts as text for a terminal; empty for None."""
    if facts is None:
        return ""
    rows = facts["rows"]
    if not rows:
        return NONE
    lines = [("domain", "row", "before -> now", "loss", "rise", "question"), *(
        (row["domain"], row["row"][:ID], f"{row['before']} -> {row['after']}",
         f"{row['loss_before']:.3f} -> {row['loss_after']:.3f}", f"{row['rise']:+.3f}", shorten(row["question"], 50))
        for row in rows[:IN_TEXT])]
    return f"{_title(facts)}:\n{table(lines, right=[4])}{_more(rows, IN_TEXT)}"


def section(facts: Facts | None) -> dict[str, Any] | None:
    """What templates/report.html shows of the facts; None for None. Without rows, `title` says so and is all."""
    if facts is None:
        return None
    rows = facts["rows"]
    listed = html.table(("domain", "question", "before", "now", "loss before", "loss now", "rise", "row"), (
        (row["domain"], shorten(row["question"], 100) or "(not in the present corpus)", row["before"], row["after"],
         f"{row['loss_before']:.3f}", f"{row['loss_after']:.3f}", f"{row['rise']:+.3f}", row["row"][:ID])
        for row in rows[:IN_PAGE]))
    return {"title": f"{_title(facts)}." if rows else NONE, "table": listed, "more": _more(rows, IN_PAGE).strip()}


def _title(facts: Facts) -> str:
    count = len(facts["rows"])
    return (f"{count:,} known prompt{'' if count == 1 else 's'} changed hands from {facts['before']} to "
            f"{facts['now']}, the worst rise of loss first")


def _more(rows: Sequence[Facts], shown: int) -> str:
    """How many rows are not listed; empty for none."""
    return f"\n... and {len(rows) - shown:,} more." if len(rows) > shown else ""
