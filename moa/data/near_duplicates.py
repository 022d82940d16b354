"""Near-duplicate texts among millions: MinHash finds candidates, the shingles themselves decide.

A text is the set of its shingles, five words in a row. Two texts are near-duplicates when the Jaccard similarity of
their sets reaches a threshold (Broder 1997). Candidates agree on all values of one band of their sketches, and a
band is as narrow as needed for finding 98.5 % of the pairs right at the threshold. Whether a pair is found depends on
these two texts alone, except in bands with many texts (see WINDOW).
"""

import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

SHINGLE = 5          # words
PERMUTATIONS = 64    # values of a sketch
RECALL = 0.985       # of pairs right at the threshold
WINDOW = 5           # texts that agree on a band are compared with this many neighbours on either side
BATCH = 1 << 14      # pairs compared at a time

_WEIGHTS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93,
                     0xA0761D6478BD642F], np.uint64)


def band_width(threshold: float) -> int:
    """Values in a band: the most that still find RECALL of the pairs whose similarity is `threshold`."""
    for width in range(PERMUTATIONS, 1, -1):
        if 1 - (1 - threshold**width) ** (PERMUTATIONS // width) >= RECALL:
            return width
    return 1


def shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all shingles of all texts, and where each text's begin: uint64 [S], int64 [N + 1].

    A text of fewer words is one shingle. Case and white space do not count.
    """
    words: list[int] = []
    lengths = np.empty(len(texts), np.int64)
    for number, text in enumerate(texts):
        found = [zlib.crc32(word) for word in text.lower().encode("utf-8", "replace").split()]
        found += [0] * (SHINGLE - len(found))
        words += found
        lengths[number] = len(found)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    hashed = np.array(words, np.uint64)
    hashed = (hashed + np.uint64(1)) * np.uint64(0xFF51AFD7ED558CCD)
    hashed ^= hashed >> np.uint64(33)
    size = max(0, len(hashed) - SHINGLE + 1)
    rolled = np.zeros(size, np.uint64)
    for place, weight in enumerate(_WEIGHTS):
        rolled += hashed[place : place + size] * weight
    rolled ^= rolled >> np.uint64(29)
    inside = np.ones(size, bool)   # shingles that do not cross the end of a text
    for back in range(1, SHINGLE):
        inside[starts[1:-1] - back] = False
    return rolled[inside], np.concatenate(([0], np.cumsum(lengths - SHINGLE + 1)))


class Sketches:
    """Sketches of many texts, in the order in which they were added. Shingles lie in a file, bands in memory."""

    def __init__(self, file: Path, threshold: float) -> None:
        self.threshold = threshold
        self.width = band_width(threshold)
        self._path = file
        self._file = file.open("wb")
        self._bands: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._starts: np.ndarray | None = None   # set once all texts are added

    def add(self, texts: Sequence[str]) -> None:
        """Append the sketches of these texts."""
        from rensa import RMinHash

        if not texts:
            return
        hashes, starts = shingles(texts)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, starts.astype(np.uint64), PERMUTATIONS, 1)
        values = np.fromiter(chain.from_iterable(matrix.to_rows()), np.uint32, len(texts) * PERMUTATIONS)
        values = values.reshape(-1, PERMUTATIONS).astype(np.uint64)
        bands = np.zeros((len(texts), PERMUTATIONS // self.width), np.uint64)
        for place in range(self.width):   # hash of the band's values
            bands = (bands ^ values[:, place :: self.width][:, : bands.shape[1]]) * np.uint64(0x9FB21C651E98DF25)
            bands ^= bands >> np.uint64(31)
        self._bands.append(bands)
        self._counts.append(np.diff(starts).astype(np.int64))
        hashes.astype(np.uint32).tofile(self._file)

    def survivors(self, priority: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keep of near-duplicates only the first in `priority`.

        Args:
            priority: int64 [N], different ranks; a text with a negative one is left out altogether.

        Returns:
            bool [N], whether each text stays; and int64 [N], the text whose near-duplicate each other text is, or -1.
            No two texts that stay were found to be near-duplicates.
        """
        stays, double_of = priority >= 0, np.full(len(priority), -1, np.int64)
        for first, second in self._pairs(priority, stays):
            order = np.argsort(priority[second], kind="stable")   # texts of higher priority are decided first
            for one, other in zip(first[order].tolist(), second[order].tolist(), strict=True):
                if stays[one] and stays[other]:
                    stays[other], double_of[other] = False, one
        while (chained := (double_of >= 0) & (double_of[double_of] >= 0)).any():   # removed later
            double_of[chained] = double_of[double_of[chained]]
        return stays, double_of

    def pairs(self) -> Iterator[tuple[int, int, float]]:
        """Every pair found, once: (i, j, similarity), i < j."""
        count = sum(map(len, self._counts))
        found: dict[tuple[int, int], float] = {}
        for first, second in self._pairs(np.arange(count), np.ones(count, bool)):
            alike = self._similarity(first, second)
            found.update(zip(zip(first.tolist(), second.tolist(), strict=True), alike.tolist(), strict=True))
        for (i, j), value in sorted(found.items()):
            yield i, j, value

    def _pairs(self, priority: np.ndarray, stays: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Near-duplicates band by band, the one with priority first, among texts that stay when the band begins."""
        self._file.close()
        bands = np.concatenate(self._bands) if self._bands else np.zeros((0, 1), np.uint64)
        for band in range(bands.shape[1]):
            alive = np.flatnonzero(stays)
            here, beside = bands[alive, band], bands[alive, (band + 1) % bands.shape[1]]
            order = np.lexsort((priority[alive], beside, here))   # sorts similar texts of a band side by side
            rows, here = alive[order], here[order]
            for step in range(1, WINDOW + 1):
                agree = np.flatnonzero(here[step:] == here[:-step])
                if not len(agree):
                    break
                for begin in range(0, len(agree), BATCH):
                    some = agree[begin : begin + BATCH]
                    yield self._alike(rows[some], rows[some + step], priority, stays)

    def _alike(self, first: np.ndarray, second: np.ndarray, priority: np.ndarray, stays: np.ndarray
               ) -> tuple[np.ndarray, np.ndarray]:
        """Of these pairs, those of near-duplicates that both still stay, the one with priority first."""
        both = stays[first] & stays[second]
        first, second = first[both], second[both]
        alike = self._similarity(first, second) >= self.threshold - 1e-9
        first, second = first[alike], second[alike]
        swap = priority[first] > priority[second]
        return np.where(swap, second, first), np.where(swap, first, second)

    def _similarity(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Jaccard similarity of the shingle sets of pairs of texts: float [P]."""
        if not len(first):
            return np.zeros(0)
        counts, starts = self._index()
        hashes: Any = np.memmap(self._path, np.uint32, "r")
        keys = []
        for rows in (first, second):
            sizes = counts[rows]
            ends = np.cumsum(sizes)
            within = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
            pair = np.repeat(np.arange(len(rows), dtype=np.uint64) << np.uint64(32), sizes)
            # Not np.unique, which hashes and takes four times as long.
            key = np.sort(pair | hashes[np.repeat(starts[rows], sizes) + within])
            keys.append(key[np.concatenate(([True], key[1:] != key[:-1]))])
        sizes_of = [np.bincount((key >> np.uint64(32)).astype(np.int64), minlength=len(first)) for key in keys]
        both = np.sort(np.concatenate(keys))
        shared = both[1:][both[1:] == both[:-1]]
        common = np.bincount((shared >> np.uint64(32)).astype(np.int64), minlength=len(first))
        return common / (sizes_of[0] + sizes_of[1] - common)

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """How many shingles each text has, and where they begin in the file."""
        if self._starts is None:
            self._counts = [np.concatenate(self._counts)]
            self._starts = np.cumsum(self._counts[0]) - self._counts[0]
        return self._counts[0], self._starts


def pairs(texts: Sequence[str], threshold: float) -> list[tuple[int, int, float]]:
    """Near-duplicates among `texts`: (i, j, Jaccard similarity), i < j."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        sketches = Sketches(Path(folder) / "shingles", threshold)
        for begin in range(0, len(texts), 4096):
            sketches.add(texts[begin : begin + 4096])
        return list(sketches.pairs())
