"""Small plots as inline SVG: values with intervals, curves, a reliability diagram, a graph in columns.

Every text is escaped. Colours are numbers that select the page's CSS classes s0 to s4.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from moa.core.text import shorten
from moa.reports.html import COLOURS

ROOMY = 20   # longest title of a box, in letters, that is written at full size


@dataclass(frozen=True)
class Dot:
    """A value with its interval, in a plot of `whiskers`."""

    value: float
    bounds: Sequence[float] | None   # ends of the interval
    colour: int


@dataclass(frozen=True)
class Line:
    """A curve through (x, y) points, in a plot of `curves`."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    broad: bool = False   # wide and pale, so that another line along the same points stays visible


@dataclass(frozen=True)
class Node:
    """A box in a graph of `flow`: a title over a second line."""

    key: str      # by which edges name it
    column: int   # from 0
    title: str
    below: str    # the second line


def _svg(width: float, height: float, shapes: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img">{"".join(shapes)}</svg>'


def _text(x: float, y: float, words: str, anchor: str = "start", style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style and f" class={style}"}>{escape(words)}</text>'


def _rule(x: float, to: float, y: float) -> str:
    return f'<line x1="{x}" x2="{to}" y1="{y:.1f}" y2="{y:.1f}" class="grid"></line>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis that covers all values with a margin; never an empty range."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.06 or 0.5
    return low - margin, high + margin


def whiskers(groups: Sequence[tuple[str, Sequence[Dot]]]) -> str:
    """Draw values as dots with their intervals as bars, on one scale. `groups` are (name, dots)."""
    scale = [value for _, dots in groups for dot in dots for value in (dot.value, *(dot.bounds or ()))]
    if not scale:
        return '<p class="soft">Nothing was measured.</p>'
    low, high = _range(scale)
    width, left, right, step, gap = 480, 96, 52, 16, 12
    y, shapes = 8.0, []

    def at(value: float) -> float:
        return left + (width - left - right) * (value - low) / (high - low)

    for name, dots in groups:
        if not dots:
            continue
        shapes.append(_text(left - 10, y + step * len(dots) / 2 + 3, shorten(name, 14), "end", "head"))
        for dot in dots:
            middle, style = y + step / 2, f"s{dot.colour % COLOURS}"
            first, last = (at(bound) for bound in dot.bounds or (dot.value, dot.value))
            shapes += [_rule(left, width - right, middle),
                       f'<line x1="{first:.1f}" x2="{last:.1f}" y1="{middle:.1f}" y2="{middle:.1f}" class="{style}" '
                       'stroke-width="2"></line>',
                       f'<circle cx="{at(dot.value):.1f}" cy="{middle:.1f}" r="4" class="{style}"></circle>',
                       _text(width - right + 8, middle + 4, f"{dot.value:.3f}")]
            y += step
        y += gap
    return _svg(width, y, shapes)


def curves(lines: Sequence[Line], unit: str = "step", form: str = ".2f", width: int = 320,
           mark: float | None = None) -> str:
    """Draw curves in one plot.

    Args:
        unit: name of the x axis, written at the first and last x.
        form: format of the lowest and highest value at the y axis.
        width: of the view box, in its units.
        mark: x of a dashed vertical line; None = no line.
    """
    points = [point for line in lines for point in line.points]
    if not points:
        return '<p class="soft">Nothing was measured.</p>'
    height, left, foot, top = 150, 46, 20, 8
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    low, high = _range([y for _, y in points])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return left + 6 + (width - left - 14) * across, top + (height - top - foot) * (high - y) / (high - low)

    shapes = []
    for value in dict.fromkeys((max(y for _, y in points), min(y for _, y in points))):
        y = at(x_low, value)[1]
        shapes += [_rule(left, width, y), _text(left - 6, y + 4, f"{value:{form}}", "end")]
    shapes += [_text(at(x, low)[0], height - 4, f"{unit} {x:g}", anchor)
               for x, anchor in {x_low: "start" if x_high > x_low else "middle", x_high: "end" if x_high > x_low
                                 else "middle"}.items()]
    if mark is not None:
        x = at(mark, low)[0]
        shapes.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - foot}" class="mark"></line>')
    for line in lines:
        style, placed = f"s{line.colour % COLOURS}", [at(x, y) for x, y in line.points]
        if len(placed) > 1:
            shapes.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}" '
                          f'class="curve{" broad" if line.broad else ""} {style}" style="fill:none"></polyline>')
        shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="{style}"><title>{escape(line.name)} {value:.4f} '
                   f'at {escape(unit)} {x_value:g}</title></circle>'
                   for (x, y), (x_value, value) in zip(placed, line.points, strict=True)]
    return _svg(width, height, shapes)


def reliability(bins: Sequence[Mapping[str, Any]]) -> str:
    """Draw a reliability diagram: the share that is right against the confidence, with intervals, above the counts.

    Args:
        bins: of `moa.evaluation.routing.reliability`. On the dashed diagonal, confidence is what it says.
    """
    if not bins:
        return '<p class="soft">Nothing was measured.</p>'
    width, left, top, side, foot, strip = 320, 46, 8, 240, 20, 36
    bottom, most = top + side, max(each["rows"] for each in bins)
    base = bottom + foot + strip   # of the bars that count rows

    def at(confidence: float, right: float) -> tuple[float, float]:
        return left + (width - left - 14) * confidence, bottom - side * right

    (x_low, y_low), (x_high, y_high) = at(0, 0), at(1, 1)
    shapes = [f'<line x1="{x_low:.1f}" x2="{x_high:.1f}" y1="{y_low:.1f}" y2="{y_high:.1f}" class="mark"></line>']
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        x, y = at(share, share)
        shapes += [_rule(left, width - 14, y), _text(left - 6, y + 4, f"{share:.0%}", "end"),
                   _text(x, bottom + 14, f"{share:.0%}", anchor)]
    for each in bins:
        x, y = at(each["confidence"], each["right"])
        low, high = (at(0, bound)[1] for bound in each["interval"])
        first, last = (at(end, 0)[0] for end in (each["low"], each["high"]))
        tall = max(strip * each["rows"] / most, 1)
        words = (f"confidence {each['confidence']:.1%}, right {each['right']:.1%} ({each['interval'][0]:.1%} to "
                 f"{each['interval'][1]:.1%}), {each['rows']:,} rows")
        shapes += [f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" class="s1" stroke-width="2">'
                   "</line>",
                   f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="s1"><title>{escape(words)}</title></circle>',
                   f'<rect x="{first + 1:.1f}" y="{base - tall:.1f}" width="{last - first - 2:.1f}" '
                   f'height="{tall:.1f}"><title>{escape(words)}</title></rect>']
    shapes.append(_text(left - 6, base, "rows", "end"))
    return _svg(width, base + 4, shapes)


def flow(columns: Sequence[str], nodes: Sequence[Node], edges: Sequence[tuple[str, str, bool]]) -> str:
    """Draw a graph whose nodes are in columns, from left to right.

    Args:
        columns: titles of the columns.
        edges: (key of a node, key of a node, whether it is current); an edge that is not current is dashed.
    """
    box, tall, gap, head = 172, 42, 14, 26
    width = 1000
    by_column: dict[int, list[Node]] = defaultdict(list)
    for node in nodes:
        by_column[node.column].append(node)
    most = max((len(each) for each in by_column.values()), default=1)
    height = head + most * (tall + gap)
    step = (width - box - 2) / (len(columns) - 1)   # one unit at each side leaves room for the outer boxes' strokes
    places: dict[str, tuple[float, float]] = {}
    for column, each in by_column.items():
        start = head + (height - head - len(each) * (tall + gap)) / 2
        for number, node in enumerate(each):
            places[node.key] = 1 + column * step, start + number * (tall + gap)
    shapes = [_text(1 + column * step + box / 2, 12, name, "middle") for column, name in enumerate(columns)]
    for first, last, current in edges:
        x, y = places[first][0] + box, places[first][1] + tall / 2
        to_x, to_y = places[last][0], places[last][1] + tall / 2
        bend = (to_x - x) / 2
        shapes.append(f'<path d="M{x:.1f} {y:.1f} C{x + bend:.1f} {y:.1f} {to_x - bend:.1f} {to_y:.1f} {to_x:.1f} '
                      f'{to_y:.1f}" class="edge{"" if current else " old"}"></path>')
    for node in nodes:
        x, y = places[node.key]
        style = "node now" if node.column >= len(columns) - 2 else "node"
        shapes.append(f'<g class="{style}"><rect x="{x:.1f}" y="{y:.1f}" width="{box}" height="{tall}" rx="6"></rect>'
                      f"<title>{escape(node.title)}</title>"
                      + _text(x + box / 2, y + 18, shorten(node.title, 24), "middle",
                              "head" if len(node.title) <= ROOMY else '"head tight"')
                      + _text(x + box / 2, y + 33, node.below, "middle") + "</g>")
    return _svg(width, height, shapes)
