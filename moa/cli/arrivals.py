"""`moa ingest`, `moa history`: argv to what arrives and to the ledger; nothing else. Light to import."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from moa.cli.app import AsJson, Revision, Split, Subset, place, print_json
from moa.core.errors import UsageError
from moa.core.paths import Workspace


def ingest(
    name: Annotated[str, typer.Argument(help="The rows' domain; one that is unknown is a new one.", metavar="NAME")],
    sources: Annotated[list[str], typer.Argument(
        help="Files (.jsonl, .json, .csv, .tsv, .parquet), folders of these, or hub:OWNER/NAME@REVISION.",
        metavar="SOURCE...")],
    revision: Revision = None,
    split: Split = None,
    subset: Subset = None,
    as_json: AsJson = False,
) -> None:
    """Queue rows in data/incoming/NAME, where they wait until they are learned. Works while something is built, too."""
    from moa.workspace.incoming import queue, queued_text
    from moa.workspace.row_sources import Hub

    here = Path.cwd()
    workspace = place.workspace()
    done = queue(workspace, name, sources, here, Hub(revision, split, subset))
    watched = _watched(workspace)
    if done["files"]:
        with suppress(Exception):   # an event is a nudge, never the record: the file is found without it
            from flows.sensor import nudge

            nudge(workspace, [name])
    if as_json:
        print_json({**done, "watched": watched})
        return
    print(queued_text(done))
    if done["files"] or done["already_waiting"]:
        print("`moa up` runs here and will learn it." if watched else
              "Nobody watches: run `moa up`, or `moa adapt` once, to learn it.")


def _watched(workspace: Workspace) -> bool:
    """Whether `moa up` runs here."""
    from moa.core.files import read_json
    from moa.workspace.row_sources import alive

    with suppress(OSError, ValueError, KeyError, TypeError):
        return alive(str(read_json(workspace.up)["pid"]))
    return False


def history(
    last: Annotated[int | None, typer.Option(min=1, help="Only so many of the newest lines.", metavar="N")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Only lines of this kind, such as gate. Repeatable.",
                                                   metavar="KIND")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the ledger: what arrived, why a run began or did not, what it trained, the verdicts, the releases."""
    from flows.steps import event_log

    workspace = place.workspace()
    if kind and (unknown := set(kind) - event_log.KINDS.keys() - {each["kind"] for each in event_log.read(workspace)}):
        raise UsageError(f"The ledger has no kind {min(unknown)!r}; its kinds are {', '.join(event_log.KINDS)}.")
    entries = event_log.read(workspace, last, kind or None)
    if as_json:
        print_json({"entries": entries})
    else:
        print(event_log.text(entries))
