"""Text for terminals."""

from hypothesis import given
from hypothesis import strategies as st

from moa.core.text import shorten


@given(st.text(max_size=300), st.integers(2, 120))
def test_what_is_shortened_is_one_printable_line(text: str, width: int) -> None:
    shown = shorten(text, width)
    assert len(shown) <= width and shown.isprintable()


def test_a_terminals_control_characters_are_escaped() -> None:
    assert shorten("a \x1b[31mred\x1b[0m \n row", 80) == r"a \x1b[31mred\x1b[0m row"
    assert shorten("short enough", 12) == "short enough" and shorten("too long by one", 14) == "too long by o…"
