"""`moa release ...`, `moa gate`, `moa compare`, `moa export`: each parses its arguments and calls the release steps.

Heavy modules are imported inside the commands.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moa.cli.app import App, AsJson, exit_code, opened, print_json, print_result

release_app = App(name="release", help="Show releases, approve one, roll back; the history of champions.")

# Every command that compares two releases names them alike: VERSION is compared with --against.
Version = Annotated[int, typer.Argument(help="A version of the registered mixture.", metavar="VERSION", min=1)]
Against = Annotated[int | None, typer.Option(help="The release it is compared with; the champion by default.",
                                             metavar="VERSION", min=1)]


def gate(
    version: Version,
    against: Annotated[int | None, typer.Option(help="A release instead of the champion; it then decides nothing.",
                                                metavar="VERSION", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Let the gate compare a release with the champion. Writes nothing.

    Exit code 3 when a domain would get worse, 4 when there is not enough data to tell.
    """
    from flows.steps.release import examine
    from moa.reports import changed_hands
    from moa.reports.releases import gate_text

    workspace, config = opened()
    decision = examine(workspace, config, version, against, record=False)
    moved = changed_hands.of_releases(workspace, config, decision["against"], version)
    text = "\n\n".join(filter(None, [gate_text(decision), changed_hands.text(moved)]))
    print_result({**decision, "changed_hands": moved}, text, as_json)
    if code := exit_code(decision.get("outcome")):
        raise typer.Exit(code)


def compare(version: Version, against: Against = None, as_json: AsJson = False) -> None:
    """Compare two releases on the same test rows, as the gate does."""
    from moa.release.champion import compare_versions, other_version
    from moa.reports import changed_hands
    from moa.reports.text import comparison_text

    workspace, config = opened()
    compared = compare_versions(workspace, config, other_version(workspace, config, version, against), version)
    moved = changed_hands.of_comparison(workspace, compared)
    text = "\n\n".join(filter(None, [comparison_text(compared), changed_hands.text(moved)]))
    print_result({**compared, "changed_hands": moved}, text, as_json)


@release_app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List every release, newest first, with its state: champion, was champion, waiting, or what the gate said."""
    from moa.reports.releases import listed, listed_text

    facts = listed(*opened())
    print_result(facts, listed_text(facts), as_json)


@release_app.command()
def show(version: Version, as_json: AsJson = False) -> None:
    """Show one release: what it pins, what the gate said, when it was champion."""
    from moa.reports.releases import shown, shown_text

    facts = shown(*opened(), version)
    print_result(facts, shown_text(facts), as_json)


@release_app.command()
def promote(
    version: Version,
    force: Annotated[bool, typer.Option(
        "--force", help="Promote it even if the gate refuses it; needs --reason.")] = False,
    reason: Annotated[str | None, typer.Option(help="Why; kept in the history.", metavar="TEXT")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a release champion if it passes the gate. This approves a release that waits."""
    from flows.steps.release import approve

    _print_promotion(approve(*opened(), version, force=force, note=reason), as_json)


@release_app.command()
def rollback(
    to: Annotated[int | None, typer.Option(help="This former champion instead of the last one.", metavar="VERSION",
                                           min=1)] = None,
    reason: Annotated[str | None, typer.Option(help="Why; kept in the history.", metavar="TEXT")] = None,
    as_json: AsJson = False,
) -> None:
    """Make the previous champion the champion again."""
    from flows.steps.release import roll_back

    _print_promotion(roll_back(*opened(), to, reason), as_json)


@release_app.command()
def history(as_json: AsJson = False) -> None:
    """Show every change of champion: when, by which command and why. Entries are never changed."""
    from moa.reports import releases

    facts = releases.history(*opened())
    print_result(facts, releases.history_text(facts), as_json)


@release_app.command()
def diff(version: Version, against: Against = None, as_json: AsJson = False) -> None:
    """Show what differs between two releases: parts, parameters, figures, gates, known prompts that changed hands."""
    from moa.release.champion import other_version
    from moa.reports import releases

    workspace, config = opened()
    facts = releases.diff(workspace, config, other_version(workspace, config, version, against), version)
    print_result(facts, releases.diff_text(facts), as_json)


@release_app.command()
def forgetting(
    version: Annotated[int | None, typer.Argument(help="A version of the registered mixture; the champion by default.",
                                                  metavar="VERSION", min=1, show_default=False)] = None,
    against: Annotated[int | None, typer.Option(help="The release it is compared with; by default the champion before.",
                                                metavar="VERSION", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a release kept of another: experts, their answers word for word, scores, routing.

    Exit code 1 when an expert that did not change answers otherwise.
    """
    from moa.core.errors import ArtifactError
    from moa.release import forgetting as proof

    workspace, config = opened()
    facts = proof.forgetting(workspace, config, *proof.versions_to_compare(workspace, config, against, version))
    print_result(facts, proof.text(facts), as_json)
    if not facts["equal"]:
        raise ArtifactError(proof.complaint(facts))


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
    facts = exporting.export(*opened(), target, form, version)
    if as_json:
        print_json(facts)
        return
    print(exporting.text(facts), file=sys.stderr)
    if facts["command"]:
        print(facts["command"])


def _print_promotion(facts: dict[str, Any], as_json: bool) -> None:
    """Print which release is champion after a promotion or rollback, and instead of which."""
    version, previous = facts["version"], facts["previous"]
    text = (f"version {version} is champion" + (f" instead of version {previous}" if previous else "")
            + f" ({facts['reason'].rstrip('.')}).") if facts["changed"] else f"version {version} is champion already."
    print_result(facts, text, as_json)
