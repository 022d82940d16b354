"""What the generators share: people, the choosing of words, and the refusal of rows that nearly repeat another."""

import random
from collections.abc import Callable, Sequence

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
TOO_SIMILAR = 0.8      # of two rows' word shingles; below the 0.9 at which the prepare step drops rows
ATTEMPTS_PER_ROW = 50


def words(line: str) -> tuple[str, ...]:
    """The alternatives of a bank written as `one|two|three`."""
    return tuple(line.split("|"))


def people(rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """Different people, in random order."""
    return rng.sample(PEOPLE, count)


def shingles(row: Row) -> frozenset[tuple[str, ...]]:
    """Every run of `SHINGLE` words in the whole row, question and answer."""
    text = " ".join(row.values()).lower().split()
    return frozenset(tuple(text[i:i + SHINGLE]) for i in range(max(1, len(text) - SHINGLE + 1)))


def similarity(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    """Jaccard similarity of two rows' shingles: shared / in either."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def distinct(draw: Callable[[], Row | None], rows: int) -> list[Row]:
    """Call `draw` until it has given `rows` rows of which no two are alike; None is a draw that came to nothing.

    Gives up, with fewer rows, after `ATTEMPTS_PER_ROW` draws for each row asked for.
    """
    kept: list[Row] = []
    seen: list[frozenset[tuple[str, ...]]] = []
    for _ in range(rows * ATTEMPTS_PER_ROW):
        if len(kept) == rows:
            break
        row = draw()
        if row is None:
            continue
        mine = shingles(row)
        if all(similarity(mine, other) < TOO_SIMILAR for other in seen):
            kept.append(row)
            seen.append(mine)
    return kept


def joined(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
