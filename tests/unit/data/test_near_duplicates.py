"""Near-duplicates: the similarity is exact, and few pairs above the threshold are missed."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.data import near_duplicates

WORDS = [f"word{number}" for number in range(400)]


def jaccard(one: str, other: str) -> float:
    first, second = (set(zip(*(text.lower().split()[start:] for start in range(5)), strict=False))
                     or {tuple(text.lower().split())} for text in (one, other))
    return len(first & second) / len(first | second)


def corpus(seed: int) -> list[str]:
    """Texts and disturbed copies of them."""
    chosen = random.Random(seed)
    texts = [" ".join(chosen.choices(WORDS, k=chosen.randint(1, 60))) for _ in range(120)]
    for text in list(texts):
        words = text.split()
        words[chosen.randrange(len(words))] = "other"
        texts.append(" ".join(words))
        texts.append(f"{text} and more")
    return texts


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9, 1.0])
def test_pairs_are_those_of_an_exhaustive_search(threshold: float) -> None:
    texts = corpus(1)
    wanted = {(i, j) for i in range(len(texts)) for j in range(i) if jaccard(texts[i], texts[j]) >= threshold - 1e-9}
    found = near_duplicates.pairs(texts, threshold)
    assert all(abs(jaccard(texts[i], texts[j]) - value) < 1e-9 for i, j, value in found)
    hits = {(j, i) for i, j, _ in found}
    assert hits <= wanted
    assert len(wanted) > 30 or threshold == 1.0
    assert len(hits) >= 0.97 * len(wanted)


@given(st.lists(st.text(max_size=60), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_text_has_shingles_and_is_its_own_double(texts: list[str]) -> None:
    hashes, starts = near_duplicates.shingles(texts)
    assert (np.diff(starts) >= 1).all() and starts[-1] == len(hashes)
    found = {(i, j) for i, j, value in near_duplicates.pairs([*texts, *texts], 1.0) if value == 1.0}
    count = len(texts)
    if len({" ".join(text.lower().split()) for text in texts}) == count and count < near_duplicates.WINDOW // 2:
        assert {(number, number + count) for number in range(count)} <= found


def test_no_two_survivors_are_alike_and_the_first_in_priority_stays(tmp_path: Path) -> None:
    texts = corpus(2)
    sketches = near_duplicates.Sketches(tmp_path / "shingles", 0.8)
    sketches.add(texts[:100])
    sketches.add(texts[100:])
    priority = np.random.default_rng(3).permutation(len(texts))
    stays, double_of = sketches.survivors(priority)
    kept = set(np.flatnonzero(stays).tolist())
    assert not [pair for pair in near_duplicates.pairs(texts, 0.8) if kept.issuperset(pair[:2])]
    left = np.flatnonzero(~stays)
    assert len(left) > 50 and (priority[double_of[left]] < priority[left]).all()
    assert (double_of[stays] == -1).all()


def test_a_crowded_band_is_searched_in_bounded_time() -> None:
    same = ["the very same beginning of every text " * 4 + f"number {number}" for number in range(2000)]
    assert len(near_duplicates.pairs(same, 0.5)) >= 1999   # each has a neighbour; all pairs would be 2 million
