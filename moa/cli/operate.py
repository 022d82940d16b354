"""`moa up`, `moa status`, `moa adapt`, `moa retrain`: argv to the flows; nothing else. Light to import."""

import sys
from typing import Annotated, Any

import typer

from moa.cli.app import AsJson, opened, place, print_json

Local = Annotated[bool, typer.Option("--local", help="Without Prefect: the same steps, no server.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what the steps and Prefect print.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 = a free one, which is printed.")]


def up(
    serve: Annotated[bool, typer.Option("--serve", help="Also `moa serve`, as soon as there is a champion.")] = False,
    serve_port: Port = 8000,
    mlflow: Annotated[bool, typer.Option("--mlflow", help="Also MLflow's pages.")] = False,
    mlflow_port: Port = 5000,
    ui: Annotated[bool, typer.Option("--ui/--no-ui", help="Prefect's pages, if the server is our own.")] = True,
    verbose: Verbose = False,
) -> None:
    """Keep the workspace current until Ctrl-C: learn what arrives in data/incoming, retrain on schedule, watch for
    drift."""
    from flows.up import Also
    from flows.up import up as run

    run(place.workspace(), Also(mlflow_port if mlflow else None, serve_port if serve else None, ui), verbose=verbose)


def status(as_json: AsJson = False) -> None:
    """Show the workspace and its champion, who is at work, what is scheduled, what waits and what happened last. Exit
    code 1 when something that `moa up` keeps alive is down, or `moa up` itself was killed."""
    from flows.status import status as facts_of
    from flows.status import text

    facts = facts_of(*opened())
    if as_json:
        print_json(facts)
    else:
        print(text(facts))
    if facts["troubles"]:
        raise typer.Exit(1)


def adapt(local: Local = False, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Learn what waits in data/incoming now, whatever `adapt` in params.yaml says of when. Exit code 1 when the gate
    refuses it."""
    from flows.launch import learn

    _said(learn(place.workspace(), "adapt", local=local, verbose=verbose, now=True), as_json)


def retrain(
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Every expert begins afresh instead of where it "
                                                                      "was; the gate compares.")] = False,
    local: Local = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Train again what is stale by data, parameters, code or base, and release it if the gate lets it. Exit code 1 when
    the gate refuses it."""
    from flows.launch import learn

    how = {"from_scratch": True} if from_scratch else {}
    _said(learn(place.workspace(), "retrain", local=local, verbose=verbose, **how), as_json)


SENTENCES = {
    "released": "Version {version} is champion now: {reason}",
    "waiting": "Version {version} passed the gate and waits for `moa release promote {version}`: {reason}",
    "kept": "Version {version} was not promoted: {reason} What arrived stays, and is learned with what comes next.",
    "refused": "Nothing was released: the gate refused it. See `moa history`; its files lie in data/incoming/.rejected",
    "skipped": "Nothing was done: {reason}",
}


def _said(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
    else:
        print(SENTENCES[facts["state"]].format_map({"reason": "", **facts}))
        for name, files in facts.get("undone", {}).items():
            print(f"moa: {name} is as it was before; {', '.join(files)} did not get in.", file=sys.stderr)
    if facts["state"] == "refused":
        raise typer.Exit(1)
