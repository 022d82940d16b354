"""Text for terminals and messages: tables, shortened values, and sentences that several commands print."""

from collections.abc import Sequence

from moa.core.names import printable

SHORT_DIGEST = 12   # characters of a digest that a person is shown
NAMES_SHOWN = 12    # names in a sentence
NOTHING_RELEASED = "Nothing has been released yet: run `moa run`."


def table(rows: Sequence[Sequence[str]], right: Sequence[int] | range = ()) -> str:
    """`rows` of cells as columns of equal width, one line each; the columns numbered in `right` end at the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) if column in right else cell.ljust(width)
                               for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
                     for row in rows)


def shorten(text: str, width: int) -> str:
    """`text` on one line of at most `width` characters; an ellipsis stands for the rest."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[:width - 1]}…"


def name_list(names: Sequence[str]) -> str:
    """The names with commas between them; of more than `NAMES_SHOWN` the first ones, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(map(printable, names[:NAMES_SHOWN])) + more


def sentence(text: str) -> str:
    """`text` on one line, with a full stop."""
    text = " ".join(text.split())
    return text if text.endswith((".", "!", "?")) else f"{text}."
