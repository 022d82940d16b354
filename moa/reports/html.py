"""Parts of a self-contained HTML page: frame, style, tables and bars, with every text escaped.

A page has no script and loads nothing.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from moa.core.errors import UsageError
from moa.core.files import write_atomic
from moa.core.text import shorten

STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#5b6675;--line:#e3e7ec;--ground:#f6f7f9;--card:#fff;--fill:#3b6ea8;
--warn:#8a4b08;--warnbg:#fff6e8;--warnline:#f0d9b5}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9f0;--soft:#9aa6b5;--line:#2f3844;--ground:#12161c;--card:#1a2029;
--fill:#6b9fd8;--warn:#f0bf7a;--warnbg:#2d2415;--warnline:#5a4524}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:17px;margin:0 0 12px}h3{font-size:14px;margin:16px 0 6px}
p{margin:0 0 10px}svg+p,.wide+p{margin-top:6px}.soft{color:var(--soft)}
section{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:18px 20px;margin-top:16px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:20px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 16px;overflow-wrap:anywhere}
.tile b{display:block;font-size:24px;font-variant-numeric:tabular-nums}.tile small{color:var(--soft);display:block}
.three{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));gap:20px}
.warn{background:var(--warnbg);border-color:var(--warnline);color:var(--warn)}.warn ul{margin:0;padding-left:20px}
.wide{overflow-x:auto;margin-top:10px}table{border-collapse:collapse;width:100%}
td,th{padding:5px 10px 5px 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line);overflow-wrap:anywhere}th{color:var(--soft);font-weight:500;font-size:13px}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums;overflow-wrap:normal}
svg{width:100%;height:auto;display:block;overflow:visible}
svg text{font:11px system-ui,"DejaVu Sans",sans-serif;fill:var(--soft)}
svg rect{fill:var(--fill)}
@media(max-width:600px){main{padding:20px 12px 40px}section{padding:14px 14px}}
"""
COLOURS = 5       # colours of plots: the CSS classes s0 to s4
ICON = "data:,"   # without an icon, a browser requests one from the server


def frame(title: str, heading: str, below: str, body: str, style: str = "") -> str:
    """Make a whole page. `body` is HTML and is not escaped; `style` is CSS that follows the common style."""
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="{ICON}">'
            f'<style>{STYLE}{style}</style></head><body><main><h1>{escape(heading)}</h1>'
            f'<p class="soft">{escape(below)}</p>{body}</main></body></html>\n')


def write(path: Path, page: str) -> None:
    """Write `page` to `path` atomically, so that a reader sees the old page or all of the new one.

    Raises UsageError where it cannot be written.
    """
    try:
        write_atomic(path, page.encode("utf-8", "replace"))
    except OSError as error:
        raise UsageError(f"The report cannot be written to {path}: {error.strerror}; name another file.") from None


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """Large figures side by side, from (name, value, remark)."""
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><small>{escape(name)}</small><b>{escape(value)}</b><small>{escape(remark)}</small></div>'
        for name, value, remark in items) + "</div>"


def section(title: str, *content: str) -> str:
    """A box with a heading; `content` is HTML and is not escaped."""
    return f"<section><h2>{escape(title)}</h2>{''.join(content)}</section>"


def warned(warnings: Sequence[str]) -> str:
    """A section that lists warnings, or says that there are none."""
    if not warnings:
        return section("What deserves a look", '<p class="soft">Nothing stands out.</p>')
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f'<section class="warn"><h2>What deserves a look</h2><ul>{items}</ul></section>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in a box that scrolls where the page is narrower; "" without rows.

    Cells are formatted by `shown` and escaped. Columns of numbers are aligned to the right.
    """
    rows = [list(row) for row in rows]
    if not rows:
        return ""
    numeric = [all(isinstance(row[column], int | float) for row in rows) for column in range(len(head))]

    def cells(tag: str, values: Iterable[object]) -> str:
        return "".join(f"<{tag}{' class=n' if number else ''}>{escape(shown(value))}</{tag}>"
                       for value, number in zip(values, numeric, strict=True))

    return (f'<div class="wide"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>'
            + "".join(f"<tr>{cells('td', row)}</tr>" for row in rows) + "</tbody></table></div>")


def bars(items: Sequence[tuple[str, int | float]], most: float = 0.0) -> str:
    """Horizontal bars as SVG, from (label, value); a bar of `most` has the full width, the largest value by default."""
    width, row_height, label_width, value_width = 1000, 24, 340, 70
    most = most or max((value for _, value in items), default=0) or 1
    shapes = []
    for index, (label, value) in enumerate(items):
        middle, length = index * row_height + row_height / 2, (width - label_width - value_width) * value / most
        shapes.append(
            f'<text x="{label_width - 10}" y="{middle + 4:.0f}" text-anchor="end">{escape(shorten(label, 48))}</text>'
            f'<rect x="{label_width}" y="{middle - 7:.0f}" width="{max(length, 1):.1f}" height="14" rx="2"></rect>'
            f'<text x="{label_width + length + 8:.1f}" y="{middle + 4:.0f}">{escape(shown(value))}</text>')
    return f'<svg viewBox="0 0 {width} {row_height * len(items)}" role="img">{"".join(shapes)}</svg>'


def key(items: Sequence[tuple[int, str]]) -> str:
    """The legend of a plot, from (number of the colour, name)."""
    return '<p class="key">' + "".join(
        f'<span><svg viewBox="0 0 12 12"><circle cx="6" cy="6" r="4.5" class="s{colour % COLOURS}"></circle></svg>'
        f"{escape(name)}</span>" for colour, name in items) + "</p>"


def with_interval(value: float | None, bounds: Sequence[float] | None, sign: str = "") -> str:
    """A figure and its interval, which does not break across lines; `sign` is that of the format, such as "+"."""
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" + (f"  [{bounds[0]:{sign}.3f},\u00a0{bounds[1]:{sign}.3f}]" if bounds else "")


def shown(value: object) -> str:
    """A cell's text: integers with thousands separators, floats as per cent, everything else by `str`."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.1%}" if isinstance(value, float) else str(value)
