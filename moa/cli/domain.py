"""`moa domain ...` and `moa expert ...`: each command parses its arguments and calls `moa.workspace` and `moa.reports`.

Heavy modules are imported inside the commands.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from moa.cli.app import App, AsJson, Revision, Split, Subset, opened, place, print_result
from moa.core.errors import UsageError

domain_app = App(name="domain", help="Add, show and remove domains: sets of rows, each of which gets an expert.")
expert_app = App(name="expert", help="Import experts that were trained elsewhere.")

Name = Annotated[str, typer.Argument(help="The domain's name, which is also its routing label.", metavar="NAME")]


@domain_app.command()
def add(
    name: Name,
    sources: Annotated[list[str] | None, typer.Argument(
        help="Files (.jsonl, .json, .csv, .tsv, .parquet), folders of these, or hub:OWNER/NAME@REVISION; none = the "
             "files that are in data/raw/NAME already.", metavar="SOURCE...", show_default=False)] = None,
    metric: Annotated[str | None, typer.Option(
        help="How answers are scored: a name of moa/evaluation/metrics.py, or module:function. rouge_l by default.",
        metavar="NAME")] = None,
    map_: Annotated[str | None, typer.Option(
        "--map", help="Columns that have other names than their keys, such as instruction=question,output=answer.",
        metavar="KEY=COLUMN,...")] = None,
    template: Annotated[str | None, typer.Option(
        help="The instruction, made of columns: \"{question} Context: {context}\".", metavar="TEXT")] = None,
    group_by: Annotated[str | None, typer.Option(
        help="Rows of one value of this column share a split; none = each row stands alone.", metavar="COLUMN")] = None,
    revision: Revision = None,
    split: Split = None,
    subset: Subset = None,
    as_json: AsJson = False,
) -> None:
    """Copy rows into the workspace, version them, and make the domain if it is new. It does all of this or nothing."""
    from moa.reports.domains import added_text
    from moa.workspace.domains import add as add_rows
    from moa.workspace.row_sources import HubDataset

    here = Path.cwd()
    reading = {"metric": metric, "map": _mapping(map_), "template": template, "group_by": group_by}
    facts = add_rows(place.workspace(), name, sources or [], here,
                     {key: value for key, value in reading.items() if value is not None},
                     HubDataset(revision, split, subset))
    print_result(facts, added_text(facts), as_json)


@domain_app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List every domain with its rows, its expert, and whether both are up to date."""
    from moa.reports.domains import listed, listed_text

    domains = listed(*opened())
    print_result(domains, listed_text(domains), as_json)


@domain_app.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Show one domain: its files and where they came from, how they are read, its corpus, expert and release."""
    from moa.reports.domains import shown, shown_text

    facts = shown(*opened(), name)
    print_result(facts, shown_text(facts), as_json)


@domain_app.command()
def remove(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    purge: Annotated[bool, typer.Option(
        "--purge", help="Also delete from DVC's cache what only this domain used: older commits of it can then no "
                        "longer be checked out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a domain with its rows, corpus and expert, and show that the other domains are unchanged."""
    from moa.reports.domains import removed_text
    from moa.workspace.domains import remove as remove_domain

    workspace = place.workspace()
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"Removing a domain asks first, and there is no terminal: run `moa domain remove {name} "
                             "--yes`.")
        if not typer.confirm(f"Remove {name} with its rows, corpus and expert?", err=True):
            raise UsageError("Nothing was removed.")
    facts = remove_domain(workspace, name, purge=purge)
    print_result(facts, removed_text(facts), as_json)


@domain_app.command()
def check(
    name: Name,
    page: Annotated[Path | None, typer.Option("--html", help="Also write the report, with plots, as one HTML file.",
                                              metavar="FILE", dir_okay=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Report on the quality of a domain's rows before any training: which are lost, repeated, or look misplaced."""
    from moa.reports import quality
    from moa.workspace.domains import check as check_domain

    page = page and page.absolute()
    report = check_domain(*opened(), name, lambda stage: print(f"{stage} ...", file=sys.stderr))
    if page:
        quality.write(page, report)
    print_result(report, quality.text(report), as_json)


@domain_app.command()
def which(
    row: Annotated[str, typer.Argument(help="A row's id or its first 8 digits or more, or a text that it contains.",
                                       metavar="ROW")],
    as_json: AsJson = False,
) -> None:
    """Find a row: its domain, file, split, and the releases that learned from it. Exit code 1 when it is not found."""
    from moa.reports import row_lookup

    facts = row_lookup.which(*opened(), row)
    print_result(facts, row_lookup.text(facts), as_json)
    if not facts["found"]:
        raise typer.Exit(1)


@expert_app.command("import")
def import_(
    directory: Annotated[Path, typer.Argument(help="A LoRA adapter as PEFT saves it: adapter_config.json and "
                                                   "adapter_model.safetensors.", metavar="DIR")],
    domain: Annotated[str, typer.Option("--domain", help="The domain that the adapter answers for.", metavar="NAME")],
    as_json: AsJson = False,
) -> None:
    """Use an adapter that was trained with plain PEFT as a domain's expert. Nothing changes unless all checks pass."""
    from moa.workspace import import_expert

    source = directory.absolute()
    facts = import_expert.import_adapter(place.workspace(), source, domain)
    print_result(facts, import_expert.text(facts), as_json)


def _mapping(text: str | None) -> dict[str, str] | None:
    """The value of --map, such as `instruction=question,output=answer`, as a dict. Raises UsageError if malformed."""
    if text is None:
        return None
    columns: dict[str, str] = {}
    for part in text.split(","):
        key, equals, column = (piece.strip() for piece in part.partition("="))
        if not (key and equals and column):
            raise UsageError(f"--map {text} is not understood; write KEY=COLUMN,..., such as "
                             "instruction=question,output=answer.")
        if key in columns:
            raise UsageError(f"--map names {key} twice; a key has one column.")
        columns[key] = column
    return columns
