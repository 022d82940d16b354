"""Helpers of the generators: their data files, people, lists of words, and the rejection of near-duplicate rows."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

Row = dict[str, str]   # instruction, input (optional), output

# name, subject pronoun, possessive
PEOPLE: tuple[tuple[str, str, str], ...] = (
    ("Ada", "she", "her"), ("Ben", "he", "his"), ("Carla", "she", "her"), ("David", "he", "his"),
    ("Elena", "she", "her"), ("Felix", "he", "his"), ("Grace", "she", "her"), ("Hugo", "he", "his"),
    ("Ines", "she", "her"), ("Jonas", "he", "his"), ("Kate", "she", "her"), ("Leon", "he", "his"),
    ("Maria", "she", "her"), ("Nils", "he", "his"), ("Olivia", "she", "her"), ("Paul", "he", "his"),
    ("Rosa", "she", "her"), ("Sam", "he", "his"), ("Tina", "she", "her"), ("Umar", "he", "his"),
    ("Vera", "she", "her"), ("Will", "he", "his"), ("Yara", "she", "her"), ("Zoran", "he", "his"),
)
SHINGLE = 3
TOO_SIMILAR = 0.8      # similarity of two rows; below the 0.9 at which stage `prepare` drops rows
ATTEMPTS_PER_ROW = 50


def load(name: str) -> Any:
    """The content of the data file `NAME.yaml` beside this module."""
    return YAML(typ="safe").load((Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8"))


def words(line: str) -> tuple[str, ...]:
    """The alternatives of a list of words written as `one|two|three`."""
    return tuple(line.split("|"))


def people(rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """Different people, in random order."""
    return rng.sample(PEOPLE, count)


def shingles(row: Row) -> frozenset[tuple[str, ...]]:
    """Every run of `SHINGLE` words of the row's texts, joined."""
    text = " ".join(row.values()).lower().split()
    return frozenset(tuple(text[i:i + SHINGLE]) for i in range(max(1, len(text) - SHINGLE + 1)))


def similarity(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    """Jaccard similarity of two rows' shingles: size of the intersection over size of the union."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def distinct(draw: Callable[[], Row | None], rows: int) -> list[Row]:
    """Call `draw` until it has returned `rows` rows of which no two are near-duplicates.

    Args:
        draw: returns a row, or None when its random numbers fit no row.
        rows: number of rows to return.

    Returns:
        The rows in the order drawn. They are fewer than `rows` when `ATTEMPTS_PER_ROW` draws a row were not enough.
    """
    accepted: list[Row] = []
    seen: list[frozenset[tuple[str, ...]]] = []
    for _ in range(rows * ATTEMPTS_PER_ROW):
        if len(accepted) == rows:
            break
        row = draw()
        if row is None:
            continue
        row_shingles = shingles(row)
        if all(similarity(row_shingles, other) < TOO_SIMILAR for other in seen):
            accepted.append(row)
            seen.append(row_shingles)
    return accepted


def joined(parts: Sequence[str]) -> str:
    """The parts as English lists them: `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
