"""Writes docs/reference.md from the signatures and docstrings of what `import moa` offers.

    python docs/generate_reference.py            writes the file
    python docs/generate_reference.py --check    fails if the file is out of date

The headings are the comments in `moa.__all__`.
"""

import argparse
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_overloads

import moa

TARGET = Path(__file__).parent / "reference.md"
SECTIONS = ("Args", "Raises", "Returns", "Yields")
WIDTH = 100   # of a signature on one line
# Types that signatures name and that Python would show in full, in the order of their replacement.
ALIASES = {"Sequence[Mapping[str, str]]": "Messages",
           "list[str] | tuple[str, ...] | Sequence[Messages] | list[str | Messages]": "Prompts"}
HEADER = """# Reference

What `import moa` offers. Everything else is internal and may change. Arguments that peft and transformers have too bear
the same names and mean the same. Results are frozen dataclasses; those that list something have `to_frame()`.
`Messages` is a conversation: a list of dictionaries with `role` and `content`. `Prompts` is a list of texts or
conversations. Made from the docstrings by `docs/generate_reference.py`.
"""


def reference() -> str:
    """The text of docs/reference.md."""
    parts = [HEADER]
    for heading, names in headings():
        parts.append(f"## {heading}\n")
        for name in names:
            parts += _errors() if name == "errors" else _described(name)
    return "\n".join(parts).rstrip() + "\n"


def headings() -> Iterator[tuple[str, list[str]]]:
    """The headings in the source of `moa.__all__`, each with the names below it."""
    source = inspect.getsource(moa).partition("__all__ = [")[2].partition("\n]")[0]
    for block in re.split(r"^    # ", source, flags=re.MULTILINE)[1:]:
        heading, _, names = block.partition("\n")
        yield heading, re.findall(r'"(\w+)"', names)


def _described(name: str) -> Iterator[str]:
    found = getattr(moa, name)
    yield f"### moa.{name}\n"
    if inspect.isclass(found):
        if name != "Mixture":   # which is not made by hand
            yield _code(_signature(name, found.__init__ if not dataclasses.is_dataclass(found) else found))
        yield _text(found)
        if dataclasses.is_dataclass(found):
            yield _fields(found)
        for member, value in vars(found).items():
            if not member.startswith("_"):
                yield from _member(name, member, value)
    else:
        yield _code(_signature(f"moa.{name}", found))
        yield _text(found)


def _member(owner: str, name: str, value: Any) -> Iterator[str]:
    if isinstance(value, property) and value.fget is not None:
        yield f"#### {owner}.{name}\n"
        yield _code(f"{name}: {_type(inspect.signature(value.fget).return_annotation)}")
        yield _text(value)
    elif inspect.isfunction(function := getattr(value, "__func__", value)):
        yield f"#### {owner}.{name}\n"
        shown = get_overloads(function) or [function]
        yield _code(re.sub(r"\bSelf\b", owner, "\n".join(_signature(name, each) for each in shown)))
        yield _text(function)


def _signature(name: str, function: Any) -> str:
    signature = inspect.signature(function)
    listed: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in listed:
            listed.append("*")
        listed.append(_parameter(parameter))
    returns = _type(signature.return_annotation)
    end = f" -> {returns}" if returns else ""
    line = f"{name}({', '.join(listed)}){end}"
    return line if len(line) <= WIDTH else f"{name}(\n" + "".join(f"    {each},\n" for each in listed) + f"){end}"


def _parameter(parameter: inspect.Parameter) -> str:
    kind = _type(parameter.annotation)
    text = f"{parameter.name}: {kind}" if kind else parameter.name
    if parameter.default is parameter.empty:
        return text
    return f"{text} = {parameter.default!r}"


def _type(annotation: Any) -> str:
    """An annotation as one would write it, without the names of modules; empty where there is none."""
    if annotation is inspect.Signature.empty or annotation is None:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"ForwardRef\('(.*?)'\)", r"\1", text)
    text = re.sub(r"\b(?:moa\.api\.\w+|moa|collections\.abc|pathlib|typing)\.", "", text)
    for expanded, alias in ALIASES.items():
        text = text.replace(expanded, alias)
    return text


def _fields(found: Any) -> str:
    """A table of a dataclass's fields, with the comments behind them."""
    comments = dict(re.findall(r"^    (\w+): [^#\n]*#[ ]?(.*)$", inspect.getsource(found), flags=re.MULTILINE))
    rows = [f"| `{field.name}` | `{_type(field.type).replace('|', chr(92) + '|')}` | {comments.get(field.name, '')} |"
            for field in dataclasses.fields(found)]
    return "\n".join(["| field | type | |", "|---|---|---|", *rows, ""])


def _text(found: Any) -> str:
    """A docstring as Markdown: arguments and errors as lists, examples as code."""
    lines: list[str] = []
    blocks = re.split(r"\n{2,}", inspect.getdoc(found) or "")
    for block in blocks:
        first, _, rest = block.partition("\n")
        if block.startswith(">>>"):
            lines.append(f"```python\n{block}\n```")
        elif first.rstrip(":") in SECTIONS and first.endswith(":"):
            lines.append(f"**{first}**\n\n{_list(rest) if first != 'Returns:' else textwrap.dedent(rest)}")
        else:
            lines.append(block)
    return "\n\n".join(lines) + "\n"


def _list(text: str) -> str:
    items = re.split(r"\n(?=\S)", textwrap.dedent(text))
    return "\n".join(re.sub(r"^(\w+): ", r"* `\1`: ", " ".join(item.split())) for item in items)


def _errors() -> Iterator[str]:
    yield "### moa.errors\n"
    yield _text(moa.errors)
    rows = [f"| `{name}` | `{_standard(getattr(moa.errors, name))}` | {inspect.getdoc(getattr(moa.errors, name))} |"
            for name in moa.errors.__all__]
    yield "\n".join(["| error | also a | |", "|---|---|---|", *(" ".join(row.split()) for row in rows), ""])


def _standard(error: type[Exception]) -> str:
    return next(each.__name__ for each in error.__mro__ if each.__module__ == "builtins")


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/reference.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is out of date")
    wanted = reference()
    if parser.parse_args().check:
        fresh = TARGET.is_file() and TARGET.read_text(encoding="utf-8") == wanted
        if not fresh:
            print("docs/reference.md is out of date: run `python docs/generate_reference.py`.", file=sys.stderr)
        return 0 if fresh else 1
    TARGET.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
