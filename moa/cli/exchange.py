"""`moa export`, `moa expert import`, `moa report`, `moa drift`: argv to the rooms behind them; nothing else. Light to
import."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from moa.cli.app import App, AsJson, opened, place, print_json

expert_app = App(name="expert", help="Bring experts in that were trained elsewhere.")


@expert_app.command("import")
def import_(
    directory: Annotated[Path, typer.Argument(help="A LoRA adapter as PEFT saves it: adapter_config.json and "
                                                   "adapter_model.safetensors.", metavar="DIR")],
    domain: Annotated[str, typer.Option("--domain", help="The domain it answers for.", metavar="NAME")],
    as_json: AsJson = False,
) -> None:
    """Take an adapter that was trained with plain PEFT as a domain's expert. All checks first, then all of it."""
    from moa.workspace import import_expert

    source = directory.absolute()
    done = import_expert.admit(place.workspace(), source, domain)
    if as_json:
        print_json(done)
    else:
        print(import_expert.text(done))


def export(
    directory: Annotated[Path, typer.Argument(help="A new or empty folder.", metavar="DIR")],
    form: Annotated[str, typer.Option("--format", help="peft, or vllm: the same with the command that serves it.",
                                      metavar="peft|vllm")] = "peft",
    version: Annotated[int | None, typer.Option(help="A release instead of the champion.", metavar="N")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a release's experts as plain PEFT directories, with its router. For vllm, print how to serve them."""
    from moa.release import export as exporting

    target = directory.absolute()
    done = exporting.export(*opened(), target, form, version)
    if as_json:
        print_json(done)
        return
    print(exporting.text(done), file=sys.stderr)
    if done["command"]:
        print(done["command"])


def report(
    page: Annotated[Path | None, typer.Option("--html", help="Where the page goes; .moa/report.html by default.",
                                              metavar="FILE", dir_okay=False)] = None,
    as_json: AsJson = False,
) -> None:
    """One HTML page on the workspace: scores, routing, the gate, learning curves, data and what came from what."""
    from moa.reports import facts as report_facts
    from moa.reports import page as report_page

    page = page and page.absolute()
    workspace, config = opened()
    facts = report_facts.gather(workspace, config)
    target = page or workspace.local / "report.html"
    report_page.write(target, facts)
    if as_json:
        print_json(facts)
    else:
        print(target)


def drift(as_json: AsJson = False) -> None:
    """Compare the prompts that `moa serve --keep-prompts MB` kept with what the champion was calibrated on, and look
    for a domain that it lacks. Exit code 3 when something shifted or a domain may be missing, 0 otherwise."""
    from moa.serving import drift as looking

    found = looking.check(*opened())
    if as_json:
        print_json(found)
    else:
        print(looking.text(found))
    if looking.alarming(found):
        raise typer.Exit(looking.FOUND)
