"""Fills the figures of Markdown files from the stored results of the benchmarks, so that each is written once.

    .venv/bin/python benchmarks/render.py            fills them
    .venv/bin/python benchmarks/render.py --check    fails if one is out of date

`make figures` runs it over the documents of the repository. What it fills stands between two comments, which rendered
Markdown does not show: a block is the table of a benchmark's goals, or a table of `TABLES`; within a line there may be
one figure.

    <!-- figures: gate -->
    <!-- end figures -->

    <!-- figure: gate.goals["no difference is promoted, of all draws"] .1% -->1.8 %<!-- /figure -->

The name is that of a file in benchmarks/results. After it come the field and its keys, and a format as Python's
`format` reads it; `goals` has values by the names of the goals. Fenced code is left as it is.
"""

import argparse
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
FENCED = re.compile(r"(^```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"<!-- figures: (?P<name>\w+) -->\n(?:(?!<!--).)*<!-- end figures -->", re.DOTALL)
FIGURE = re.compile(r'<!-- figure: (?P<reference>(?P<name>\w+)\.(?P<field>\w+)(?P<keys>(?:\[(?:"[^"\n]*"|\d+)\])*))'
                    r"(?: (?P<format>\S+))? -->(?:(?!<!--).)*<!-- /figure -->")
MARKER = re.compile(r"<!-- (?:figures?:|end figures|/figure)[^\n]*")
HARDWARE = ("cores", "cpu", "cpu flags", "memory", "threads", "device", "dtype")   # of a machine; the rest is versions
WIDTH = 120   # of what is filled


class FigureError(Exception):
    """A marker that cannot be filled."""


class Results:
    """The results stored in `folder`, each read once."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder
        self._read: dict[str, dict[str, Any]] = {}

    def of(self, name: str) -> dict[str, Any]:
        """The stored result of a benchmark; raises FigureError if there is none."""
        path = self.folder / f"{name}.json"
        if name not in self._read:
            if not path.is_file():
                raise FigureError(f"{name} has no stored result: {path.name} is not in benchmarks/results.")
            self._read[name] = json.loads(path.read_text(encoding="utf-8"))
        return self._read[name]

    def value(self, name: str, field: str, *keys: str | int) -> Any:
        """A value of a stored result: `goals` by name of the goal, other fields as they are stored."""
        found: Any = self.of(name) | {"goals": {each["name"]: each["value"] for each in self.of(name)["goals"]}}
        for key in (field, *keys):
            try:
                found = found[key]
            except (LookupError, TypeError):
                known = f"; there are {', '.join(map(str, found))}" if isinstance(found, Mapping) else ""
                raise FigureError(f"{name} has no {key!r} there{known}.") from None
        return found


# Texts.

def number(value: float, beside: float | None = None) -> str:
    """Three digits or all before the point, and as many more as tell the value from `beside`."""
    for digits in range(3, 7):
        text = f"{value:,.{digits - 3}f}" if abs(value) >= 100 else f"{value:.{digits}g}"
        if beside is None or value == beside or text != number(beside):
            break
    return text


def wanted(goal: Mapping[str, Any]) -> str:
    """What a goal asks for. Whether its bound is a lower or an upper one shows in whether the value meets it, or is
    stored."""
    value, bound = goal["value"], goal["goal"]
    if value == bound and "above" not in goal:
        return number(bound)
    return f"{'at least' if goal.get('above', (value > bound) == goal['met']) else 'at most'} {number(bound)}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(line) for line in (head, *([cell.replace("|", "\\|") for cell in row] for row in rows))]
    lines = [f"| {line} |".replace("|  |", "| |") for line in lines]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def goals(result: Mapping[str, Any]) -> str:
    """The goals of a benchmark with what was found, and what the figures depend on."""
    rows = [[goal["name"], number(goal["value"], goal["goal"]), wanted(goal), "met" if goal["met"] else "**missed**"]
            for goal in result["goals"]]
    return f"{table(['goal', 'found', 'wanted', ''], rows)}\n\n{facts(result)}"


def facts(result: Mapping[str, Any]) -> str:
    """Date, commit, hardware, versions and command of a result."""
    commit = result["commit"]
    at = (f"commit {commit[:12]}{' and changes' if result['changed'] else ''}" if commit else
          "transcribed, commit not kept" if result.get("transcribed") else "commit not known")
    machine = result["machine"]
    words = [_word(key, machine[key]) for key in HARDWARE if machine.get(key)]
    versions = [f"{key} {value}" for key, value in machine.items() if key not in HARDWARE]
    about = "; ".join(filter(None, [f"{result['date'][:10]}, {at}", ", ".join(words), ", ".join(versions)]))
    commands = ", then ".join(f"`{_command(call)}`" for call in calls(result))
    return textwrap.fill(f"{about}. {commands}.", WIDTH, break_long_words=False, break_on_hyphens=False)


def calls(result: Mapping[str, Any]) -> list[list[str]]:
    """The calls that gave a result, as words: one where `common.finish` stored it, perhaps several if transcribed."""
    command = result["command"]
    return command if isinstance(command[0], list) else [command]


def _command(words: Sequence[str]) -> str:
    return (".venv/bin/python benchmarks/" if words[0].endswith(".py") else "") + shlex.join(words)


def _word(key: str, value: Any) -> str:
    if key in ("cores", "threads"):
        return f"{value} {key if value != 1 else key[:-1]}"
    return " ".join(value) if isinstance(value, list) else str(value)


def speed(results: Results) -> str:
    """How fast moa is on the default base, each a ratio from one call."""
    def found(name: str, goal: str, form: str) -> str:
        return format(results.value(name, "goals", goal), form)

    def training(other: str, form: str) -> str:
        return found("training", f"tokens/s: ours-4 over {other}", form)

    def decoding(rows: str) -> str:
        return found("decoding", f"{rows}: moa, 16 experts over generate on the base", ".1f")

    many = results.value("many_experts", "goals", "uniform: tokens/s with 1024 experts over 8")
    return table(["what", "ratio"], [
        ["four co-trained experts, tokens/s to the same loss",
         f"{training('trl-4', '.1f')} times TRL's defaults one expert after the other, {training('trl-fast-4', '.1f')} "
         f"times TRL without checkpointing, {training('floor-4', '.2f')} of two forwards of the base"],
        ["decoding over 16 experts", f"{decoding('1 rows')} (one row) and {decoding('16 rows')} (16 rows) times "
         "transformers' `generate` on the base alone"],
        ["1,024 experts, 64 of them in memory, 16 different ones in each batch",
         f"{'no fewer tokens/s than' if many >= 1 else f'{many:.2f} of the tokens/s of'} eight"],
        ["64 clients of `moa serve` at once",
         f"{found('serve', 'throughput over one at a time', '.1f')} times the tokens/s of one at a time"],
        ["`moa run --local` over 64 domains of trivial steps",
         f"{found('orchestration', '64 domains, cold: moa --local over dvc repro', '.2f')} of the time of `dvc repro` "
         "cold; nothing to do: "
         f"{found('orchestration', '64 domains, no-op, moa, released: seconds', '.0f')} s with Prefect and MLflow"],
        ["a new domain from a dropped file to a champion",
         f"{found('demo_adapt', 'seconds to the champion, over a rebuild', '.2f')} of a rebuild"]])


TABLES = {"speed": speed}   # blocks that are of no single benchmark


# Documents.

def render(text: str, results: Results) -> str:
    """A document with its figures filled; raises FigureError for a marker that cannot be."""
    parts = FENCED.split(text)
    return "".join(part if number % 2 else _rendered(part, results) for number, part in enumerate(parts))


def _rendered(text: str, results: Results) -> str:
    if left := MARKER.search(FIGURE.sub("", BLOCK.sub("", text))):
        raise FigureError(f"This is half a marker, or not written as benchmarks/render.py reads it: {left[0]}")
    return FIGURE.sub(lambda match: _figure(match, results), BLOCK.sub(lambda match: _block(match, results), text))


def _block(match: re.Match[str], results: Results) -> str:
    name = match["name"]
    body = TABLES[name](results) if name in TABLES else goals(results.of(name))
    return f"<!-- figures: {name} -->\n\n{body}\n\n<!-- end figures -->"


def _figure(match: re.Match[str], results: Results) -> str:
    if "--" in match["reference"]:
        raise FigureError(f"{match['reference']}: on GitHub a comment within a line ends at `--`; use the block.")
    keys = [int(key) if key.isdigit() else key[1:-1] for key in re.findall(r'\[("[^"]*"|\d+)\]', match["keys"])]
    value = results.value(match["name"], match["field"], *keys)
    shown = match["format"]
    if isinstance(value, str) and not shown:
        text = value[:10] if match["field"] == "date" else value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            text = format(value, shown).replace("%", " %") if shown else number(value)
        except ValueError:
            raise FigureError(f"{match['reference']}: {shown} is no format of a number.") from None
    else:
        raise FigureError(f"{match['reference']} is no single figure.")
    return f"<!-- figure: {match['reference']}{f' {shown}' if shown else ''} -->{text}<!-- /figure -->"


def documents(root: Path = REPOSITORY) -> list[Path]:
    """The Markdown files of a repository that may have figures."""
    return [path for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md") for path in sorted(root.glob(pattern))]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a figure is out of date")
    parser.add_argument("files", nargs="*", type=Path, help="Markdown files (default: all of the repository)")
    args = parser.parse_args()
    results, failed = Results(), False
    for path in args.files or documents():
        try:
            text = path.read_text(encoding="utf-8")
            filled = render(text, results)
        except (FigureError, OSError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = True
            continue
        if filled != text and args.check:
            print(f"{path}: figures are out of date: run `make figures`.", file=sys.stderr)
            failed = True
        elif filled != text:
            path.write_text(filled, encoding="utf-8")
            print(f"{path}: filled")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
