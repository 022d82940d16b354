"""README and docs name only what there is: commands with their options, make targets, files."""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from moa.cli import main
from tests.tiny import REPOSITORY

DOCUMENTS = [*(REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
             *sorted((REPOSITORY / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
SHELLS = {"sh", "bash", "shell", "console"}
ROOTS = {"moa", "flows", "tests", "docs", "benchmarks"}   # of paths that a checkout must have
OPERATORS = {"&&", "||", ";", "|", ">", ">>", "<", "&"}


def code(document: Path) -> tuple[list[str], list[str]]:
    """Lines of the shell blocks, and the code spans outside of all blocks."""
    text = document.read_text(encoding="utf-8")
    lines = [line.removeprefix("$ ") for language, block in FENCE.findall(text) if language in SHELLS
             for line in block.replace("\\\n", " ").splitlines()]
    return lines, SPAN.findall(FENCE.sub("", text))


def commands(line: str) -> list[list[str]]:
    """The simple commands of a line of shell, without the environment set for them. `[--x Y]` means `--x Y`."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if word in OPERATORS:
            found.append([])
        elif found[-1] or not re.fullmatch(r"\w+=.*", word):
            found[-1].append(word)
    return [words for words in found if words]


def named(program: str) -> list[tuple[str, list[str]]]:
    """(document, words) of every use of `program`, in a shell block or a code span."""
    found = []
    for document in DOCUMENTS:
        lines, spans = code(document)
        for line in [*lines, *(span for span in spans if span.startswith(f"{program} "))]:
            found += [(document.name, words[1:]) for words in commands(line)
                      if words[0].rsplit("/", 1)[-1] == program]
    return found


def check(words: list[str]) -> None:
    """Parse as the program itself would, running nothing."""
    root: Any = typer.main.get_command(main.app)
    words = [word.strip("[]") for word in words]
    if "--workspace" in words:
        words[words.index("--workspace") + 1] = str(REPOSITORY)   # it must exist
    try:
        context = root.make_context("moa", words)
        name, command, rest = root.resolve_command(context, [*context._protected_args, *context.args])
        command.make_context(name, rest, parent=context)
    except typer.Exit:
        pass   # --help or --version
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        pytest.fail(f"moa {shlex.join(words)}: {error.format_message()}")


@pytest.mark.parametrize(("document", "words"), [
    pytest.param(*use, id=f"{use[0]}: moa {shlex.join(use[1])}") for use in named("moa")])
def test_command_is_one_that_exists(document: str, words: list[str]) -> None:
    check(words)


def test_a_wrong_command_or_option_would_be_found() -> None:
    check(["train", "--domain", "math", "--fresh"])
    for words in (["trian"], ["plan", "--jsno"], ["prepare"], ["ask", "a", "b"]):
        with pytest.raises(pytest.fail.Exception):
            check(words)


def test_the_readme_shows_how_to_begin() -> None:
    assert named("moa") and named("make")


def test_every_make_target_exists() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.MULTILINE))
    for document, words in named("make"):
        asked = {word for word in words if not word.startswith("-") and "=" not in word}
        assert asked <= targets, f"{document}: make {shlex.join(words)}; the Makefile has {', '.join(sorted(targets))}"


@cache
def files(document: Path) -> list[str]:
    """Paths of this checkout that a document names, in code or as link; artifacts and placeholders are left out."""
    spans = [span for span in code(document)[1] if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", span)]
    found = [span for span in spans if ("/" in span and span.split("/")[0] in ROOTS and not re.search("[A-Z]{2}", span))
             or ("/" not in span and (REPOSITORY / span).suffix in {".toml", ".yaml", ".md"})]
    links = [link for link in LINK.findall(document.read_text(encoding="utf-8")) if "://" not in link]
    return found + [str((document.parent / link).relative_to(REPOSITORY)) if not link.startswith("..") else
                    str((document.parent / link).resolve().relative_to(REPOSITORY)) for link in links]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_named_exists(document: Path) -> None:
    missing = [path for path in files(document) if not (REPOSITORY / path).exists()]
    assert not missing
