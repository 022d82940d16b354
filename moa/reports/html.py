"""HTML pages from the templates of this package, with every text escaped.

Python makes plain data and templates/*.html the markup. Only the drawings of `moa.reports.svg` pass unescaped, as
`markupsafe.Markup`. A page has no script and loads nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from moa.core.errors import UsageError
from moa.core.files import write_atomic

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(loader=PackageLoader("moa.reports"), autoescape=True, undefined=StrictUndefined,
                       trim_blocks=True, lstrip_blocks=True)


def render(template: str, **facts: object) -> str:
    """Render one of templates/*.html. A name that the template uses and `facts` lacks is an error."""
    return _environment().get_template(template).render(facts)


def write(path: Path, page: str) -> None:
    """Write `page` to `path` atomically, so that a reader sees the old page or all of the new one.

    Raises UsageError where it cannot be written.
    """
    try:
        write_atomic(path, page.encode("utf-8", "replace"))
    except OSError as error:
        raise UsageError(f"The report cannot be written to {path}: {error.strerror}; name another file.") from None


@dataclass(frozen=True)
class Table:
    """A table as text, for the macro `table` of templates/parts.html, which shows nothing of one without rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[bool]   # by column: whether it holds nothing but numbers, which are aligned to the right

    def __bool__(self) -> bool:
        return bool(self.rows)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table whose cells are formatted by `shown`."""
    rows = [list(row) for row in rows]
    return Table(head, [[shown(value) for value in row] for row in rows],
                 [all(isinstance(row[column], int | float) for row in rows) for column in range(len(head))])


def with_interval(value: float | None, bounds: Sequence[float] | None, sign: str = "") -> str:
    """A figure and its interval, which does not break across lines; `sign` is that of the format, such as "+"."""
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" + (f"  [{bounds[0]:{sign}.3f},\u00a0{bounds[1]:{sign}.3f}]" if bounds else "")


def shown(value: object) -> str:
    """A cell's text: integers with thousands separators, floats as per cent, everything else by `str`."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.1%}" if isinstance(value, float) else str(value)
