"""`moa gate` and `moa release ...`: argv to the release flow and to what the registry holds; nothing else. Light to
import, as moa/cli/main.py is."""

from typing import Annotated, Any

import typer

from moa.cli.app import App, AsJson, opened, print_json

release_app = App(name="release", help="Look at releases, approve one, go back: who is champion, when and why.")

Version = Annotated[int, typer.Argument(help="A version of the registered mixture.", metavar="VERSION", min=1)]


def gate(
    challenger: Version,
    against: Annotated[int | None, typer.Option(help="Another release than the champion; it decides nothing then.",
                                                metavar="VERSION", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Let the gate compare a release with the champion. Exit code 0 when it passes, 1 when not."""
    from flows.steps.release import examine
    from moa.reports.releases import gate_text

    decision = examine(*opened(), challenger, against)
    _show(decision, gate_text(decision), as_json)
    if not decision["promote"]:
        raise typer.Exit(1)


@release_app.command("list")
def list_(as_json: AsJson = False) -> None:
    """Every release, newest first: champion, was champion, waiting, refused, or not gated."""
    from moa.reports.releases import listed, listed_text

    facts = listed(*opened())
    _show(facts, listed_text(facts), as_json)


@release_app.command()
def show(version: Version, as_json: AsJson = False) -> None:
    """One release: what it pins, what the gate said, when it was champion."""
    from moa.reports.releases import shown, shown_text

    facts = shown(*opened(), version)
    _show(facts, shown_text(facts), as_json)


@release_app.command()
def promote(
    version: Version,
    force: Annotated[bool, typer.Option("--force", help="Whatever the gate says; needs --reason.")] = False,
    reason: Annotated[str | None, typer.Option(help="Why; kept in the history.", metavar="TEXT")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a release champion once the gate passes it: how a release that waits is approved."""
    from flows.steps.release import approve

    done = approve(*opened(), version, force=force, note=reason)
    _moved(done, as_json)


@release_app.command()
def rollback(
    to: Annotated[int | None, typer.Option(help="This former champion instead of the last one.", metavar="VERSION",
                                           min=1)] = None,
    reason: Annotated[str | None, typer.Option(help="Why; kept in the history.", metavar="TEXT")] = None,
    as_json: AsJson = False,
) -> None:
    """Make the champion before the present one champion again."""
    from flows.steps.release import roll_back

    done = roll_back(*opened(), to, reason)
    _moved(done, as_json)


@release_app.command()
def history(as_json: AsJson = False) -> None:
    """Who was champion when, by whom and why. Entries are only ever added."""
    from moa.reports import releases

    facts = releases.history(*opened())
    _show(facts, releases.history_text(facts), as_json)


@release_app.command()
def diff(
    old: Version,
    new: Version,
    as_json: AsJson = False,
) -> None:
    """What differs between two releases: experts, router, base, corpora, parameters, figures, gates."""
    from moa.reports import releases

    facts = releases.diff(*opened(), old, new)
    _show(facts, releases.diff_text(facts), as_json)


@release_app.command()
def forgetting(
    old: Annotated[int | None, typer.Option(help="The champion before by default.", metavar="VERSION", min=1)] = None,
    new: Annotated[int | None, typer.Option(help="The champion by default.", metavar="VERSION", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a release kept of another: experts, their answers word for word, scores, routing.

    Exit code 1 when an expert that did not change answers otherwise.
    """
    from moa.core.errors import ArtifactError
    from moa.release import forgetting as proof

    workspace, config = opened()
    facts = proof.forgetting(workspace, config, *proof.between(workspace, config, old, new))
    _show(facts, proof.text(facts), as_json)
    if not facts["equal"]:
        raise ArtifactError(proof.complaint(facts))


def _moved(done: dict[str, Any], as_json: bool) -> None:
    version, before = done["version"], done["previous"]
    text = (f"version {version} is champion" + (f" instead of version {before}" if before else "")
            + f" ({done['reason'].rstrip('.')}).") if done["changed"] else f"version {version} is champion already."
    _show(done, text, as_json)


def _show(value: Any, text: str, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        print(text)
