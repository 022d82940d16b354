"""Small plots as inline SVG: values with intervals, curves, bars, a histogram, a reliability diagram, a graph.

A drawing is `markupsafe.Markup`, which templates show as it is: xml.etree builds it, and escapes every text. It is
empty where there is nothing to draw. Colours are numbers that select the page's CSS classes s0 to s4.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from moa.core.text import shorten
from moa.reports.html import shown

COLOURS = 5   # CSS classes of colours
ROOMY = 20    # longest title of a box, in letters, that is written at full size
NOTHING = Markup("")


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


def colour_class(colour: int) -> str:
    """The CSS class of a colour, which a legend shares with its plot."""
    return f"s{colour % COLOURS}"


class _Shape:
    """An SVG element to which others are added."""

    def __init__(self, element: ElementTree.Element) -> None:
        self._element = element

    def add(self, tag: str, content: str = "", /, **attributes: str | float) -> "_Shape":
        """Add an element with `content` as its text.

        In attributes' names `_` stands for `-`; `style` is the CSS class. Floats are rounded to a tenth.
        """
        named = {"class" if name == "style" else name.replace("_", "-"):
                 f"{value:.1f}" if isinstance(value, float) else str(value) for name, value in attributes.items()}
        element = ElementTree.SubElement(self._element, tag, named)
        element.text = content or None
        return _Shape(element)

    def words(self, x: float, y: float, words: str, anchor: str = "start", **attributes: str) -> None:
        """Add text whose start, middle or end (`anchor`) is at `x`."""
        self.add("text", words, x=x, y=y, text_anchor=anchor, **attributes)

    def line(self, x: float, to: float, y: float, style: str = "grid", **attributes: str | float) -> None:
        """Add a horizontal line."""
        self.add("line", x1=x, x2=to, y1=y, y2=y, style=style, **attributes)


class _Drawing(_Shape):
    """An SVG drawing."""

    def __init__(self, width: float, height: float) -> None:
        super().__init__(ElementTree.Element("svg", {"viewBox": f"0 0 {width:.0f} {height:.0f}", "role": "img"}))

    def markup(self) -> Markup:
        """The drawing's text, with an end tag for each element, as HTML wants."""
        text = ElementTree.tostring(self._element, encoding="unicode", short_empty_elements=False)
        return Markup(text)   # noqa: S704 - what ElementTree wrote is escaped


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis that covers all values with a margin; never an empty range."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.06 or 0.5
    return low - margin, high + margin


def bars(items: Sequence[tuple[str, int | float]], most: float = 0.0) -> Markup:
    """Draw horizontal bars, from (label, value); a bar of `most` has the full width, the largest value by default."""
    if not items:
        return NOTHING
    width, row_height, label_width, value_width = 1000, 24, 340, 70
    most = most or max(value for _, value in items) or 1
    drawing = _Drawing(width, row_height * len(items))
    for index, (label, value) in enumerate(items):
        middle, length = index * row_height + row_height / 2, (width - label_width - value_width) * value / most
        drawing.words(label_width - 10, middle + 4, shorten(label, 48), "end")
        drawing.add("rect", x=label_width, y=middle - 7, width=max(length, 1.0), height=14, rx=2)
        drawing.words(label_width + length + 8, middle + 4, shown(value))
    return drawing.markup()


def histogram(bins: Sequence[tuple[str, int]]) -> Markup:
    """Draw a column for each (label, count), with its label below where there is room."""
    if not bins:
        return NOTHING
    width, height, foot = 320, 150, 18
    most, step = max(max(count for _, count in bins), 1), width / len(bins)
    every = -(-len(bins) * 52 // width)   # bins for each label, which takes 52 units
    drawing = _Drawing(width, height)
    for index, (label, count) in enumerate(bins):
        tall = max((height - foot - 14) * count / most, 1.0 if count else 0.0)
        column = drawing.add("rect", x=index * step + 1, y=height - foot - tall, width=max(step - 2, 1.0), height=tall,
                             rx=2)
        column.add("title", f"{label}: {count:,}")
        if index % every == 0:
            drawing.words((index + 0.5) * step, height - 4, label, "middle")
    return drawing.markup()


def whiskers(groups: Sequence[tuple[str, Sequence[Dot]]]) -> Markup:
    """Draw values as dots with their intervals as bars, on one scale. `groups` are (name, dots)."""
    scale = [value for _, dots in groups for dot in dots for value in (dot.value, *(dot.bounds or ()))]
    if not scale:
        return NOTHING
    low, high = _range(scale)
    width, left, right, step, gap, top = 480, 96, 52, 16, 12, 8
    drawn = [(name, dots) for name, dots in groups if dots]
    drawing = _Drawing(width, top + sum(step * len(dots) + gap for _, dots in drawn))

    def at(value: float) -> float:
        return left + (width - left - right) * (value - low) / (high - low)

    y = float(top)
    for name, dots in drawn:
        drawing.words(left - 10, y + step * len(dots) / 2 + 3, shorten(name, 14), "end", style="head")
        for dot in dots:
            middle, style = y + step / 2, colour_class(dot.colour)
            first, last = (at(bound) for bound in dot.bounds or (dot.value, dot.value))
            drawing.line(left, width - right, middle)
            drawing.line(first, last, middle, style, stroke_width=2)
            drawing.add("circle", cx=at(dot.value), cy=middle, r=4, style=style)
            drawing.words(width - right + 8, middle + 4, f"{dot.value:.3f}")
            y += step
        y += gap
    return drawing.markup()


def curves(lines: Sequence[Line], unit: str = "step", form: str = ".2f", width: int = 320,
           mark: float | None = None) -> Markup:
    """Draw curves in one plot.

    Args:
        unit: name of the x axis, written at the first and last x.
        form: format of the lowest and highest value at the y axis.
        width: of the view box, in its units.
        mark: x of a dashed vertical line; None = no line.
    """
    points = [point for line in lines for point in line.points]
    if not points:
        return NOTHING
    height, left, foot, top = 150, 46, 20, 8
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    low, high = _range([y for _, y in points])
    drawing = _Drawing(width, height)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return left + 6 + (width - left - 14) * across, top + (height - top - foot) * (high - y) / (high - low)

    for value in dict.fromkeys((max(y for _, y in points), min(y for _, y in points))):
        y = at(x_low, value)[1]
        drawing.line(left, width, y)
        drawing.words(left - 6, y + 4, f"{value:{form}}", "end")
    ends = {x_low: "start", x_high: "end"} if x_high > x_low else {x_low: "middle"}
    for x, anchor in ends.items():
        drawing.words(at(x, low)[0], height - 4, f"{unit} {x:g}", anchor)
    if mark is not None:
        x = at(mark, low)[0]
        drawing.add("line", x1=x, x2=x, y1=top, y2=height - foot, style="mark")
    for line in lines:
        style, placed = colour_class(line.colour), [at(x, y) for x, y in line.points]
        if len(placed) > 1:
            drawing.add("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in placed),
                        style=f"curve broad {style}" if line.broad else f"curve {style}")
        for (x, y), (x_value, value) in zip(placed, line.points, strict=True):
            dot = drawing.add("circle", cx=x, cy=y, r=3, style=style)
            dot.add("title", f"{line.name} {value:.4f} at {unit} {x_value:g}")
    return drawing.markup()


def reliability(bins: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw a reliability diagram: the share that is right against the confidence, with intervals, above the counts.

    Args:
        bins: of `moa.evaluation.routing.reliability`. On the dashed diagonal, confidence is what it says.
    """
    if not bins:
        return NOTHING
    width, left, top, side, foot, strip = 320, 46, 8, 240, 20, 36
    bottom, most = top + side, max(each["rows"] for each in bins)
    base = bottom + foot + strip   # of the bars that count rows
    drawing = _Drawing(width, base + 4)

    def at(confidence: float, right: float) -> tuple[float, float]:
        return left + (width - left - 14) * float(confidence), bottom - side * float(right)

    (x_low, y_low), (x_high, y_high) = at(0, 0), at(1, 1)
    drawing.add("line", x1=x_low, x2=x_high, y1=y_low, y2=y_high, style="mark")
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        x, y = at(share, share)
        drawing.line(left, width - 14, y)
        drawing.words(left - 6, y + 4, f"{share:.0%}", "end")
        drawing.words(x, bottom + 14, f"{share:.0%}", anchor)
    for each in bins:
        x, y = at(each["confidence"], each["right"])
        low, high = (at(0, bound)[1] for bound in each["interval"])
        first, last = (at(end, 0)[0] for end in (each["low"], each["high"]))
        tall = max(strip * each["rows"] / most, 1.0)
        words = (f"confidence {each['confidence']:.1%}, right {each['right']:.1%} ({each['interval'][0]:.1%} to "
                 f"{each['interval'][1]:.1%}), {each['rows']:,} rows")
        drawing.add("line", x1=x, x2=x, y1=low, y2=high, style="s1", stroke_width=2)
        drawing.add("circle", cx=x, cy=y, r=4, style="s1").add("title", words)
        bar = drawing.add("rect", x=first + 1, y=base - tall, width=last - first - 2, height=tall)
        bar.add("title", words)
    drawing.words(left - 6, base, "rows", "end")
    return drawing.markup()


def flow(columns: Sequence[str], nodes: Sequence[Node], edges: Sequence[tuple[str, str, bool]]) -> Markup:
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
    drawing = _Drawing(width, height)
    for column, name in enumerate(columns):
        drawing.words(1 + column * step + box / 2, 12, name, "middle")
    for first, last, current in edges:
        x, y = places[first][0] + box, places[first][1] + tall / 2
        to_x, to_y = places[last][0], places[last][1] + tall / 2
        bend = (to_x - x) / 2
        drawing.add("path", d=f"M{x:.1f} {y:.1f} C{x + bend:.1f} {y:.1f} {to_x - bend:.1f} {to_y:.1f} {to_x:.1f} "
                              f"{to_y:.1f}", style="edge" if current else "edge old")
    for node in nodes:
        x, y = places[node.key]
        group = drawing.add("g", style="node now" if node.column >= len(columns) - 2 else "node")
        group.add("rect", x=x, y=y, width=box, height=tall, rx=6)
        group.add("title", node.title)
        group.words(x + box / 2, y + 18, shorten(node.title, 24), "middle",
                    style="head" if len(node.title) <= ROOMY else "head tight")
        group.words(x + box / 2, y + 33, node.below, "middle")
    return drawing.markup()
