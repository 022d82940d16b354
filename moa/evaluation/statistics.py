"""Bootstrap intervals of a mean of paired differences. Pure. Knows nothing of releases and verdicts.

Each end is the further one of two (Hesterberg 2015, "What Teachers Should Know About the Bootstrap"): the percentile
interval, expanded because it is too short on few rows (section 5.3), and bootstrap t, which knows of skew (5.5).
"""

import math
from statistics import NormalDist

import numpy as np

CHUNK = 1 << 22   # resampled values held at once


def resampled(values: np.ndarray, resamples: int, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of `resamples` draws with replacement, (resamples,) each."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // len(values))
    means, spreads = [], []
    for done in range(0, resamples, step):
        drawn = values[rng.integers(len(values), size=(min(step, resamples - done), len(values)))]
        means.append(drawn.mean(axis=1))
        spreads.append(drawn.std(axis=1))
    return np.concatenate(means), np.concatenate(spreads)


def interval(values: np.ndarray, means: np.ndarray, spreads: np.ndarray, share: float) -> tuple[float, float]:
    """The interval that leaves `share` out at each end.

    Bootstrap t is left out where too many draws have no spread: most differences are 0 then, as between releases that
    share an expert. It knows no bounds: of rows that are equal but for one that gains much, it says that their mean may
    be a loss. No interval reaches beyond the differences that were seen.
    """
    tail = _tail(share, len(values))
    low, high = np.quantile(means, [tail, 1 - tail])
    mean, spread = values.mean(), values.std()
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num((means - mean) / spreads, nan=0.0, posinf=np.inf, neginf=-np.inf)
    lowest, highest = (np.quantile(t, end, method="nearest") for end in (share, 1 - share))
    if np.isfinite(highest):
        low = min(low, mean - highest * spread)
    if np.isfinite(lowest):
        high = max(high, mean - lowest * spread)
    return float(max(low, values.min())), float(min(high, values.max()))


def _tail(share: float, count: int) -> float:
    """Tail of the bootstrap distribution that stands for `share`, expanded for few rows.

    Hesterberg 2015: Phi(-sqrt(n / (n - 1)) * t_{share, n - 1}); the t quantile by its expansion in 1 / degrees of
    freedom (Abramowitz and Stegun 26.7.5), right to three digits from five rows on.
    """
    z, v = NormalDist().inv_cdf(1 - share), count - 1
    t = (z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
         + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3))
    return NormalDist().cdf(-t * math.sqrt(count / v))
