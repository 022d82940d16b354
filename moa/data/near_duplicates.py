"""Near-duplicate texts among millions: MinHash finds candidate pairs, and the texts' shingles decide.

A text is the set of its shingles, runs of five words. Two texts are near-duplicates when the Jaccard similarity of
their sets reaches a threshold (Broder 1997, "On the resemblance and containment of documents"). Each text has a sketch
of PERMUTATIONS MinHash values, cut into bands. Two texts are candidates when their sketches agree on a whole band, and
bands are so narrow that 98.5 % of the pairs whose similarity equals the threshold become candidates. Whether a pair is
found depends on these two texts alone, except where many texts agree on a band (see WINDOW).
"""

import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

SHINGLE = 5          # words
PERMUTATIONS = 64    # values of a sketch
RECALL = 0.985       # share of the pairs at the threshold that are found
WINDOW = 5           # texts that agree on a band are sorted, and each is compared with so many on either side
BATCH = 1 << 14      # pairs compared at a time

_WEIGHTS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93,
                     0xA0761D6478BD642F], np.uint64)


def band_width(threshold: float) -> int:
    """MinHash values in a band: the most that still find RECALL of the pairs whose similarity is `threshold`."""
    for width in range(PERMUTATIONS, 1, -1):
        if 1 - (1 - threshold**width) ** (PERMUTATIONS // width) >= RECALL:
            return width
    return 1


def shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hash every shingle of N texts, S shingles in all. Case and white space do not count.

    Returns:
        uint64 [S], the hashes; and int64 [N + 1], where each text's hashes begin. A text of fewer than SHINGLE words is
        one shingle.
    """
    words: list[int] = []
    lengths = np.empty(len(texts), np.int64)
    for number, text in enumerate(texts):
        hashes = [zlib.crc32(word) for word in text.lower().encode("utf-8", "replace").split()]
        hashes += [0] * (SHINGLE - len(hashes))
        words += hashes
        lengths[number] = len(hashes)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    hashed = np.array(words, np.uint64)
    hashed = (hashed + np.uint64(1)) * np.uint64(0xFF51AFD7ED558CCD)
    hashed ^= hashed >> np.uint64(33)
    size = max(0, len(hashed) - SHINGLE + 1)
    rolled = np.zeros(size, np.uint64)
    for offset, weight in enumerate(_WEIGHTS):
        rolled += hashed[offset : offset + size] * weight
    rolled ^= rolled >> np.uint64(29)
    inside = np.ones(size, bool)   # shingles that do not cross the end of a text
    for back in range(1, SHINGLE):
        inside[starts[1:-1] - back] = False
    return rolled[inside], np.concatenate(([0], np.cumsum(lengths - SHINGLE + 1)))


class Sketches:
    """Sketches of N texts, numbered in the order in which they were added.

    Args:
        file: is written with the hashes of all shingles; hashes of bands are in memory.
        threshold: least Jaccard similarity of near-duplicates.
    """

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
        for offset in range(self.width):   # hash of the band's values
            bands = (bands ^ values[:, offset :: self.width][:, : bands.shape[1]]) * np.uint64(0x9FB21C651E98DF25)
            bands ^= bands >> np.uint64(31)
        self._bands.append(bands)
        self._counts.append(np.diff(starts).astype(np.int64))
        hashes.astype(np.uint32).tofile(self._file)

    def survivors(self, priority: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decide which texts stay, so that of two near-duplicates only the one with the lower rank does.

        Args:
            priority: int64 [N], a different rank for each text; a text with a negative one is removed and not compared.

        Returns:
            bool [N], whether each text stays; and int64 [N], for each removed text the staying text that it is a
            near-duplicate of, and -1 for all others. No two texts that stay were found to be near-duplicates.
        """
        stays, double_of = priority >= 0, np.full(len(priority), -1, np.int64)
        for first, second in self._pairs(priority, stays):
            order = np.argsort(priority[second], kind="stable")   # texts of lower rank are decided first
            for preferred, other in zip(first[order].tolist(), second[order].tolist(), strict=True):
                if stays[preferred] and stays[other]:
                    stays[other], double_of[other] = False, preferred
        # Where the preferred text of a pair was removed later, follow the chain to the text that stays.
        while (chained := (double_of >= 0) & (double_of[double_of] >= 0)).any():
            double_of[chained] = double_of[double_of[chained]]
        return stays, double_of

    def pairs(self) -> Iterator[tuple[int, int, float]]:
        """Yield every pair of near-duplicates that is found, once and in order: (i, j, similarity), i < j."""
        count = sum(map(len, self._counts))
        similarities: dict[tuple[int, int], float] = {}
        for first, second in self._pairs(np.arange(count), np.ones(count, bool)):
            values = self._similarity(first, second).tolist()
            similarities.update(zip(zip(first.tolist(), second.tolist(), strict=True), values, strict=True))
        for (i, j), value in sorted(similarities.items()):
            yield i, j, value

    def _pairs(self, priority: np.ndarray, stays: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs of near-duplicates, band by band, the text of lower rank first.

        Only texts that `stays` marks are compared; the caller may unmark some of them between two yields.
        """
        self._file.close()
        bands = np.concatenate(self._bands) if self._bands else np.zeros((0, 1), np.uint64)
        for band in range(bands.shape[1]):
            staying = np.flatnonzero(stays)
            values, next_values = bands[staying, band], bands[staying, (band + 1) % bands.shape[1]]
            # Of texts that agree on this band, those that also agree on the next one are sorted side by side.
            order = np.lexsort((priority[staying], next_values, values))
            rows, values = staying[order], values[order]
            for step in range(1, WINDOW + 1):
                agree = np.flatnonzero(values[step:] == values[:-step])
                if not len(agree):
                    break
                for begin in range(0, len(agree), BATCH):
                    batch = agree[begin : begin + BATCH]
                    yield self._near_duplicates(rows[batch], rows[batch + step], priority, stays)

    def _near_duplicates(self, first: np.ndarray, second: np.ndarray, priority: np.ndarray,
                         stays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the pairs (first[i], second[i]), those of near-duplicates that both stay, the text of lower rank first."""
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
            within = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)   # number of a shingle in its text
            pair = np.repeat(np.arange(len(rows), dtype=np.uint64) << np.uint64(32), sizes)
            # np.unique is not used, because it hashes the keys and takes four times as long.
            key = np.sort(pair | hashes[np.repeat(starts[rows], sizes) + within])
            keys.append(key[np.concatenate(([True], key[1:] != key[:-1]))])
        sizes_of = [np.bincount((key >> np.uint64(32)).astype(np.int64), minlength=len(first)) for key in keys]
        both = np.sort(np.concatenate(keys))
        shared = both[1:][both[1:] == both[:-1]]
        common = np.bincount((shared >> np.uint64(32)).astype(np.int64), minlength=len(first))
        return common / (sizes_of[0] + sizes_of[1] - common)

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [N] each: number of shingles of each text, and where its hashes begin in the file."""
        if self._starts is None:
            self._counts = [np.concatenate(self._counts)]
            self._starts = np.cumsum(self._counts[0]) - self._counts[0]
        return self._counts[0], self._starts


def pairs(texts: Sequence[str], threshold: float) -> list[tuple[int, int, float]]:
    """Find the near-duplicates among `texts`: (i, j, Jaccard similarity), i < j, of at least `threshold`."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        sketches = Sketches(Path(folder) / "shingles", threshold)
        for begin in range(0, len(texts), 4096):
            sketches.add(texts[begin : begin + 4096])
        return list(sketches.pairs())
