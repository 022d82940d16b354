"""Text for terminals."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.core.text import shorten, table

WIDE = [("name", "rows", "is"), ("[bold]専門家[/]", "12", ":smile: 👩‍👩‍👧"), ("", "", ""),
        ("x" * 300, "1,000", "e\u0301t\u00e9")]


@given(st.text(max_size=300), st.integers(2, 120))
def test_what_is_shortened_is_one_printable_line(text: str, width: int) -> None:
    shown = shorten(text, width)
    assert len(shown) <= width and shown.isprintable()


def test_a_terminals_control_characters_are_escaped() -> None:
    assert shorten("a \x1b[31mred\x1b[0m \n row", 80) == r"a \x1b[31mred\x1b[0m row"
    assert shorten("short enough", 12) == "short enough" and shorten("too long by one", 14) == "too long by o…"


@given(st.integers(1, 4).flatmap(lambda columns: st.tuples(
    st.lists(st.lists(st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S")), max_size=90),
                      min_size=columns, max_size=columns), min_size=1, max_size=5),
    st.sets(st.integers(0, columns - 1)))))
def test_columns_are_two_spaces_apart_and_lines_are_whole(made: tuple[list[list[str]], set[int]]) -> None:
    rows, right = made
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    assert table(rows, sorted(right)).split("\n") == [
        "  ".join(cell.rjust(width) if column in right else cell.ljust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def test_wide_characters_take_two_columns_and_nothing_is_markup() -> None:
    assert table(WIDE, right=[1]).split("\n") == [
        f"name{' ' * 296}   rows  is", f"[bold]専門家[/]{' ' * 285}     12  :smile: 👩‍👩‍👧", "",
        f"{'x' * 300}  1,000  e\u0301t\u00e9"]
    assert table([("a", "|"), ("日本", "|"), ("🙂", "|"), ("e\u0301", "|")]).split("\n") == [
        "a     |", "日本  |", "🙂    |", "e\u0301     |"]
    assert table([("a\tb", "|"), ("a", "|")]) == "a       b  |\na          |"


@pytest.mark.parametrize("variables", [{}, {"COLUMNS": "40", "TERM": "dumb"}, {"FORCE_COLOR": "1"},
                                       {"JUPYTER_COLUMNS": "40", "PYTHONIOENCODING": "ascii"}])
def test_the_terminal_and_the_environment_change_nothing(variables: dict[str, str]) -> None:
    script = f"from moa.core.text import table; print(ascii(table({WIDE!a}, right=[1])))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=variables)
    assert done.stdout.strip() == ascii(table(WIDE, right=[1]))
