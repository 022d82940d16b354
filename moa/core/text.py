"""Text for terminals and messages: tables, shortened values, lists of names and sentences."""

import sys
from collections.abc import Sequence
from io import StringIO
from textwrap import indent

from moa.core.names import escaped, printable

SHORT_DIGEST = 12   # characters of a digest in tables and messages
NAMES_SHOWN = 12    # most names that a sentence lists
NOTHING_RELEASED = "Nothing has been released yet, so there is no champion: run `moa run` first."


def table(rows: Sequence[Sequence[str]], right: Sequence[int] | range = ()) -> str:
    """A plain-text table: one line per row of cells, in columns that are aligned as a terminal shows them.

    Characters of two columns (Chinese, emoji) count as two. Lines are never cut or wrapped and have no colours,
    whatever the terminal, so that the text is the same in a file.

    Args:
        right: the right-aligned columns.
    """
    # Imported here because it takes 60 ms.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    for column in range(len(rows[0])):
        grid.add_column(justify="right" if column in right else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*(Text(cell.expandtabs()) for cell in row))   # as Text, a cell is no markup
    out = StringIO()
    Console(file=out, width=sys.maxsize, color_system=None, force_jupyter=False).print(grid)
    return "\n".join(line.rstrip() for line in out.getvalue().removesuffix("\n").split("\n"))


def indented_table(rows: Sequence[Sequence[str]], right: Sequence[int] | range = ()) -> str:
    """`table`, two spaces from the left."""
    return indent(table(rows, right), "  ")


def shorten(text: str, width: int) -> str:
    """`text` on one line of at most `width` printable characters; an ellipsis stands for the rest."""
    text = escaped(" ".join(text.split()))   # rows may hold control characters, which a terminal obeys
    return text if len(text) <= width else f"{text[:width - 1]}…"


def name_list(names: Sequence[str]) -> str:
    """The names, escaped and separated by commas; beyond `NAMES_SHOWN` names only their number."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(map(printable, names[:NAMES_SHOWN])) + more


def sentence(text: str) -> str:
    """`text` on one line, with a full stop unless it ends with `.`, `!` or `?`."""
    text = " ".join(text.split())
    return text if text.endswith((".", "!", "?")) else f"{text}."
