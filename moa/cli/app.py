"""What all commands share: the workspace of the invocation, printing, shared options, --workspace.

This module imports nothing heavy, because `moa --help` loads it.
"""

import inspect
import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from moa.core.errors import MoaError, UsageError
from moa.core.paths import Workspace

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, all else on standard error.")]
Folder = Annotated[Path | None, typer.Option(
    "--workspace", help="Folder with params.yaml and dvc.yaml; the nearest one from here upwards by default.",
    metavar="DIR", exists=True, file_okay=False)]

# Options of a hub's data set among the sources of rows.
Revision = Annotated[str | None, typer.Option(help="Of a hub's data set: branch, tag or commit.", metavar="REV")]
Split = Annotated[str | None, typer.Option(help="Of a hub's data set; train by default.", metavar="NAME")]
Subset = Annotated[str | None, typer.Option(help="Of a hub's data set that has several.", metavar="NAME")]


# Exit codes of run, adapt, retrain, gate and promote beside 0 (promoted, nothing to do, or no better) and 1 (an error).
REFUSED = 3   # the gate found that a domain would get worse
WAITING = 4   # passed and waits for approval, or there is not enough data to tell


def exit_code(outcome: str | None, waiting: bool = False) -> int:
    """The exit code for the gate's outcome; `waiting`: the release passed, and waits for `moa release promote`."""
    if outcome == "worse":
        return REFUSED
    return WAITING if waiting or outcome == "not enough data" else 0


class Interrupted(MoaError):
    """Ctrl-C, with the exit code that shells use for it."""

    exit_code = 130


class Place:
    """Where this invocation works: the folder of --workspace, or the current one. There is one instance, `place`."""

    directory: Path | None = None   # absolute path of --workspace; None = the current folder or a parent of it

    def workspace(self) -> Workspace:
        """Find the workspace, and undo changes that a killed process left half done. Raises MoaError without one.

        With --workspace its folder becomes the current one, so commands make paths of their arguments absolute before.
        """
        from moa.core import transaction
        from moa.workspace import origins

        if self.directory is not None:
            os.chdir(self.directory)   # for relative paths in params.yaml and in DVC's messages
        workspace = Workspace.find()
        for line in [*transaction.recover(workspace), *origins.recover(workspace)]:
            print(f"moa: {line}", file=sys.stderr)
        return workspace

    def workspace_if_any(self) -> Workspace | None:
        """As `workspace`, but None where --workspace was not given and there is no workspace here."""
        try:
            return self.workspace()
        except UsageError:
            if self.directory is not None:
                raise
            return None


place = Place()


def opened() -> tuple[Workspace, Any]:
    """The workspace of this invocation and its params.yaml, a `moa.core.config.Config`."""
    from moa.core import config

    workspace = place.workspace()
    return workspace, config.load(workspace.params)


def print_json(value: Any) -> None:
    """Print `value` as JSON on standard output."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def print_result(value: Any, text: str, as_json: bool) -> None:
    """Print a command's result on standard output: `value` as JSON, or `text`."""
    if as_json:
        print_json(value)
    else:
        print(text)


class Group(typer.core.TyperGroup):
    """A group of commands that turns Ctrl-C into `Interrupted`; Typer would print "Aborted!" and exit with 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command of `ctx`."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; what had finished is recorded, and the same command continues.") from None


def _with_workspace(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command so that it takes the option --workspace, which sets `place.directory`."""
    @wraps(function)
    def command(*words: Any, workspace: Path | None = None, **named: Any) -> Any:
        if workspace is not None:
            place.directory = workspace.absolute()
        return function(*words, **named)

    signature = inspect.signature(function)
    option = inspect.Parameter("workspace", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Folder)
    command.__signature__ = signature.replace(   # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), option])
    command.__annotations__ = {**function.__annotations__, "workspace": Folder}
    return command


class App(typer.Typer):
    """A Typer application whose commands take --workspace, before their name and after it."""

    def __init__(self, *, name: str, help: str, callback: Callable[..., Any] = lambda: None) -> None:
        """`callback` runs before every command; its parameters are options before the command's name."""
        super().__init__(name=name, cls=Group, help=help, callback=_with_workspace(callback), no_args_is_help=True,
                         rich_markup_mode="rich", pretty_exceptions_enable=False,
                         context_settings={"help_option_names": ["-h", "--help"]})

    def command(self, name: str | None = None, **named: Any) -> Callable[[Any], Any]:
        """Register a command, with --workspace added; `named` goes to Typer."""
        register = super().command(name, **named)

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            register(_with_workspace(function))
            return function
        return decorate

    def command_without_workspace(self, name: str | None = None, **named: Any) -> Callable[[Any], Any]:
        """Register a command without --workspace: `moa init`, which makes a workspace."""
        return super().command(name, **named)
