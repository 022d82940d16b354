"""Commands that keep a workspace current and show it: `moa up`, `moa adapt`, `moa status`, `moa doctor` and so on.

Each command parses its arguments and calls the package that does the work. Heavy modules are imported inside the
commands.
"""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from moa.cli.app import AsJson, Revision, Split, Subset, exit_code, opened, place, print_json, print_result
from moa.core.errors import UsageError
from moa.core.paths import Workspace

Local = Annotated[bool, typer.Option("--local", help="Without Prefect: the same steps, no server.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what the steps and Prefect print.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 = a free one, which is printed.")]


def up(
    serve: Annotated[bool, typer.Option("--serve", help="Also `moa serve`, as soon as there is a champion.")] = False,
    serve_port: Port = 8000,
    mlflow: Annotated[bool, typer.Option("--mlflow", help="Also MLflow's pages.")] = False,
    mlflow_port: Port = 5000,
    ui: Annotated[bool, typer.Option("--ui/--no-ui", help="Prefect's pages, if `moa up` starts the server.")] = True,
    verbose: Verbose = False,
) -> None:
    """Keep the workspace current until Ctrl-C: learn what arrives in data/incoming, retrain on schedule, watch for
    drift."""
    from flows.up import ExtraServices
    from flows.up import up as run

    run(place.workspace(), ExtraServices(mlflow_port if mlflow else None, serve_port if serve else None, ui),
        verbose=verbose)


def status(as_json: AsJson = False) -> None:
    """Show the workspace, its champion, running processes, schedules, waiting rows and the last events. Exit code 1
    when a service that `moa up` keeps alive is down, or `moa up` itself was killed."""
    from flows.status import status as facts_of
    from flows.status import text

    facts = facts_of(*opened())
    print_result(facts, text(facts), as_json)
    if facts["troubles"]:
        raise typer.Exit(1)


def doctor(as_json: AsJson = False) -> None:
    """Say what this machine is, what moa uses of it and why, how many experts fit, and what is wrong. Works outside of
    a workspace, too. Exit code 1 when something is wrong."""
    from flows.status import service_problems
    from flows.steps import event_log
    from moa.reports import doctor as examination

    workspace = place.workspace_if_any()
    services, events = ([], []) if workspace is None else (service_problems(workspace),
                                                           event_log.read(workspace, last=1))
    facts = examination.examine(workspace, services, events[-1]["at"] if events else None)
    print_result(facts, examination.text(facts), as_json)
    if facts["problems"]:
        raise typer.Exit(1)


def adapt(
    accept: Annotated[str | None, typer.Option(
        help="Take back in what was refused of this domain, and release it although the gate objects; needs --reason.",
        metavar="NAME")] = None,
    reason: Annotated[str, typer.Option(help="Why --accept overrules the gate; kept in the history.",
                                        metavar="TEXT", show_default=False)] = "",
    local: Local = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Learn now what waits in data/incoming, without the delays of `adapt` in params.yaml.

    Exit code 3 when a domain would get worse, 4 when the release waits for approval or data are too few to tell.
    """
    from flows.launch import learn
    from flows.steps.learning import check_acceptance

    workspace = place.workspace()
    reason = check_acceptance(workspace, accept, reason)   # before a server is started
    options = {"accept": accept, "reason": reason} if accept is not None else {}
    _print_outcome(learn(workspace, "adapt", local=local, verbose=verbose, now=True, **options), as_json)


def retrain(
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Train every expert anew instead of from "
                                                                      "its last ones; the gate compares.")] = False,
    local: Local = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Train again what is stale by data, parameters, code or base, and release it if the gate lets it.

    Exit code 3 when a domain would get worse, 4 when the release waits for approval or data are too few to tell.
    """
    from flows.launch import learn

    options = {"from_scratch": True} if from_scratch else {}   # without it params.yaml decides
    _print_outcome(learn(place.workspace(), "retrain", local=local, verbose=verbose, **options), as_json)


SENTENCES = {   # by `state` of an adaptation or retraining
    "released": "Version {version} is champion now: {reason}",
    "waiting": "Version {version} passed the gate and waits for `moa release promote {version}`: {reason}",
    "kept": "Version {version} was not promoted: {reason} New rows stay, and are learned with the next ones.",
    "refused": "REFUSED, and the champion stays: {reason}",
    "deferred": "Nothing was released, and the champion stays: {reason}. The rows wait in data/incoming.",
    "skipped": "Nothing was done: {reason}",
}


def _print_outcome(facts: dict[str, Any], as_json: bool) -> None:
    """Print the facts of an adaptation or retraining. Raises typer.Exit with the code of the gate's outcome."""
    if as_json:
        print_json(facts)
    else:
        print(SENTENCES[facts["state"]].format_map({"reason": "", **facts}))
        for name, files in facts.get("undone", {}).items():
            print(f"moa: {name} was restored as it was before, without {', '.join(files)}: they lie in "
                  f"data/incoming/.rejected/{name}, each with its reason.", file=sys.stderr)
        for said in facts.get("deferred", {}).values() if facts["state"] != "deferred" else ():
            print(f"moa: {said}.", file=sys.stderr)
    if code := exit_code("worse" if facts["state"] == "refused" else facts.get("outcome"), facts["state"] == "waiting"):
        raise typer.Exit(code)


def ingest(
    name: Annotated[str, typer.Argument(help="The rows' domain; an unknown one becomes a new domain.", metavar="NAME")],
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
    from moa.workspace.row_sources import HubDataset

    here = Path.cwd()
    workspace = place.workspace()
    facts = queue(workspace, name, sources, here, HubDataset(revision, split, subset))
    watched = _watched(workspace)
    if facts["files"]:
        with suppress(Exception):   # the event only starts a run sooner: `moa up` finds the files without it
            from flows.sensor import send_arrival_event

            send_arrival_event(workspace, [name])
    if as_json:
        print_json({**facts, "watched": watched})
        return
    print(queued_text(facts))
    if facts["files"] or facts["already_waiting"]:
        print("`moa up` runs here and will learn it." if watched else
              "`moa up` does not run: run `moa up`, or `moa adapt` once, to learn it.")


def _watched(workspace: Workspace) -> bool:
    """Whether `moa up` runs in this workspace."""
    from moa.core.files import read_json
    from moa.workspace.row_sources import process_is_alive

    with suppress(OSError, ValueError, KeyError, TypeError):
        return process_is_alive(str(read_json(workspace.up)["pid"]))
    return False


def log(
    last: Annotated[int | None, typer.Option(min=1, help="Only the newest N lines.", metavar="N")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Only lines of this kind, such as gate. Repeatable.",
                                                   metavar="KIND")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the event log: what arrived, why a run began or did not, what it trained, the verdicts, the releases."""
    from flows.steps import event_log

    workspace = place.workspace()
    if kind and (unknown := set(kind) - event_log.KINDS.keys() - {each["kind"] for each in event_log.read(workspace)}):
        raise UsageError(f"The event log has no kind {min(unknown)!r}; its kinds are {', '.join(event_log.KINDS)}.")
    entries = event_log.read(workspace, last, kind or None)
    if as_json:
        print_json({"entries": entries})
    else:
        print(event_log.text(entries))


def report(
    page: Annotated[Path | None, typer.Option("--html", help="Where the page goes; .moa/report.html by default.",
                                              metavar="FILE", dir_okay=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page on the workspace: scores, routing, the gate, learning curves, data and lineage."""
    from moa.reports import facts as report_facts
    from moa.reports import page as report_page

    page = page and page.absolute()
    workspace, config = opened()
    facts = report_facts.gather(workspace, config)
    target = page or workspace.local / "report.html"
    report_page.write(target, facts)
    print_result(facts, str(target), as_json)


def drift(as_json: AsJson = False) -> None:
    """Compare the prompts that `moa serve --keep-prompts MB` kept with what the champion was calibrated on, and look
    for a domain that it lacks. Exit code 3 when something shifted or a domain may be missing, 0 otherwise."""
    from moa.serving import drift as drift_report

    facts = drift_report.check(*opened())
    print_result(facts, drift_report.drift_text(facts), as_json)
    if drift_report.alarming(facts):
        raise typer.Exit(drift_report.FOUND)
