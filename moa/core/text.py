"""Text for terminals and messages: tables, shortened values, lists of names and sentences."""

from collections.abc import Sequence

from moa.core.names import escaped, printable

SHORT_DIGEST = 12   # characters of a digest in tables and messages
NAMES_SHOWN = 12    # most names that a sentence lists
NOTHING_RELEASED = "Nothing has been released yet, so there is no champion: run `moa run` first."


def table(rows: Sequence[Sequence[str]], right: Sequence[int] | range = ()) -> str:
    """A plain-text table: one line per row of cells, in aligned columns. `right` lists the right-aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) if column in right else cell.ljust(width)
                               for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
                     for row in rows)


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
