"""Statistics of an evaluation: means with intervals of the bootstrap, paired tests of two models, length bias.

Pure functions of arrays that have one value a record; records are the units of every draw.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

DRAWS = 1000
LEVEL = 0.95
BLOCK_VALUES = 2**22
"""Values that are drawn at a time."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `records`, with the ends of its LEVEL bootstrap interval."""

    value: float
    low: float
    high: float
    records: int


@dataclass(frozen=True)
class Difference:
    """By how much the mean of a first model is higher than that of a second one on the same records, and how often chance
    alone would give as much (two-sided)."""

    value: float
    low: float
    high: float
    records: int
    p_value: float


@dataclass(frozen=True)
class Discordant:
    """On how many records only the first model is right, on how many only the second, and McNemar's exact p-value: how often
    as uneven a split, or a more uneven one, comes about where both are equally good."""

    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True)
class LengthBias:
    """Accuracy where the chosen response is the longer one and where it is the shorter one (None: there is no such pair),
    Pearson's correlation of margin and length difference (nan: one of the two does not vary), and the accuracy of always
    preferring the longer response."""

    longer: Estimate | None
    shorter: Estimate | None
    correlation: float
    by_length_alone: float


def wins(margins: ArrayLike) -> Floats:
    """1 where a margin is above 0, 0 where it is below, and one half for a tie."""
    return (np.sign(np.asarray(margins, dtype=np.float64)) + 1) / 2


def estimate(values: ArrayLike, *, seed: int) -> Estimate:
    """The mean of some values, one a record, with its interval: quantiles of the means of DRAWS samples of as many records,
    drawn with replacement (Efron and Tibshirani 1993, chapter 13). Raises ValueError where there are none."""
    array = _values(values)
    low, high = _interval(_drawn_means(array, seed=seed))
    return Estimate(float(array.mean()), low, high, len(array))


def macro_average(values: ArrayLike, groups: Sequence[str], *, seed: int) -> Estimate:
    """The mean of the groups' means, in which small groups count as much as large ones; each group is drawn by itself."""
    array, names = _values(values), np.asarray(groups)
    parts = [array[names == name] for name in sorted(set(groups))]
    draws = np.mean([_drawn_means(part, seed=seed + k) for k, part in enumerate(parts)], axis=0)
    low, high = _interval(draws)
    return Estimate(float(np.mean([part.mean() for part in parts])), low, high, len(array))


def paired_difference(first: ArrayLike, second: ArrayLike, *, seed: int) -> Difference:
    """Two models' values of the same records, compared by the paired bootstrap: records are drawn with both their values.

    The p-value is twice the share of draws, the observed one counted among them, in which the difference is not on the side
    of 0 on which it was observed (Koehn 2004, https://aclanthology.org/W04-3250, two-sided). Of few records all on one side
    every draw is on that side, too: it is never less than chance gives them one side, 2 of 2^records times."""
    differences = _values(first) - _values(second)
    draws = _drawn_means(differences, seed=seed)
    low, high = _interval(draws)
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    p_value = max(2 * (beyond + 1) / (len(draws) + 1), 2.0 ** (1 - len(differences)))
    return Difference(float(differences.mean()), low, high, len(differences), min(1.0, p_value))


def mcnemar(first: ArrayLike, second: ArrayLike) -> Discordant:
    """McNemar's exact test (1947) of two models' accuracies on the same records: of those on which they differ, how many has
    either; a tie is worse than a win and better than a loss."""
    a, b = _values(first), _values(second)
    only_first, only_second = int((a > b).sum()), int((a < b).sum())
    return Discordant(only_first, only_second, _two_sided(min(only_first, only_second), only_first + only_second))


def length_bias(margins: ArrayLike, extra_tokens: ArrayLike, *, seed: int) -> LengthBias:
    """How far margins follow length; `extra_tokens`: by how many tokens each pair's chosen response is the longer one."""
    values, extra = _values(margins), _values(extra_tokens)
    longer, shorter = values[extra > 0], values[extra < 0]
    return LengthBias(
        longer=estimate(wins(longer), seed=seed) if len(longer) else None,
        shorter=estimate(wins(shorter), seed=seed) if len(shorter) else None,
        correlation=correlation(values, extra),
        by_length_alone=float(wins(extra).mean()),
    )


def correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Pearson's coefficient; nan where one of the two does not vary."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def _values(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise ValueError("There are no records to average over.")
    assert np.isfinite(array).all(), "a value that is no number has no mean"
    return array


def _drawn_means(values: Floats, *, seed: int) -> Floats:
    """[DRAWS] means of samples with replacement; the same draws for the same seed and number of values."""
    return np.concatenate(list(_blocks_of_means(values, seed=seed)))


def _blocks_of_means(values: Floats, *, seed: int) -> Iterator[Floats]:
    draw, size = np.random.default_rng(seed), max(1, BLOCK_VALUES // len(values))
    for start in range(0, DRAWS, size):
        chosen = draw.integers(len(values), size=(min(size, DRAWS - start), len(values)))
        yield values[chosen].mean(axis=1)


def _interval(draws: Floats) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _two_sided(smaller: int, total: int) -> float:
    """Twice the chance of at most `smaller` heads in `total` tosses of a fair coin, at most 1."""
    log_ways = (math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(smaller + 1))
    return min(1.0, 2 * math.fsum(math.exp(ways - total * math.log(2)) for ways in log_ways))
