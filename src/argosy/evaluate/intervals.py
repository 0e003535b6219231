"""Confidence intervals of measurements on few texts: a bootstrap over the texts with a fixed seed.

Texts are resampled whole, because the tokens of one text are alike (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993). Both models read the same texts, so their difference is resampled. Equal models give the interval
from 0 to 0, and the same scores always give the same interval.

Many groups are compared at once, and one in twenty 95 % intervals misses by chance. `simultaneous` widens all of
them together so that in 95 of 100 cases all of them hold (max-t: Westfall and Young, Resampling-Based Multiple
Testing, 1993).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
_NUM_RESAMPLES = 4000
_AT_ONCE = 200  # resamples whose weights are in memory at once
_SEED = 20_261_128

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured number and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0.0 or self.high < 0.0

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def ratio(sums: Floats, counts: Floats | NDArray[np.int64]) -> Estimate:
    """sum(sums) / sum(counts), with one entry per text, float64 [texts], and its percentile interval."""
    counts = np.asarray(counts, np.float64)
    # No count is zero.
    resampled = np.concatenate([(weights @ sums) / (weights @ counts) for weights in _resamples(len(sums))])
    low, high = np.quantile(resampled, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high))


def mean(values: Floats) -> Estimate:
    """The mean of `values`, one per text, with its interval."""
    return ratio(values, np.ones(len(values)))


def simultaneous(values: Floats) -> list[Estimate]:
    """The mean of each column of `values`, float64 [texts, columns], with simultaneous intervals.

    A constant column has an interval of zero width.
    """
    count = len(values)
    means, errors = values.mean(axis=0), values.std(axis=0) / np.sqrt(count)
    largest: list[Floats] = []
    for weights in _resamples(count):
        own_means = weights @ values / count
        own_squares = weights @ values**2 / count
        own_errors = np.sqrt(np.maximum(own_squares - own_means**2, 0.0) / count)
        away = np.abs(own_means - means)
        # A resample that repeats a single text has no spread: use that of all texts.
        scale = np.where(own_errors > 1e-3 * errors, own_errors, errors)
        largest.append(np.divide(away, scale, out=np.zeros_like(away), where=scale > 0.0).max(axis=1))
    factor = float(np.quantile(np.concatenate(largest), LEVEL))
    return [
        Estimate(float(value), float(value - factor * error), float(value + factor * error))
        for value, error in zip(means, errors, strict=True)
    ]


def _resamples(count: int) -> Iterator[Floats]:
    """How often each of `count` texts is drawn: yields float64 [resamples, count], a batch at a time."""
    random = np.random.Generator(np.random.PCG64(_SEED))
    for _ in range(0, _NUM_RESAMPLES, _AT_ONCE):
        yield random.multinomial(count, np.full(count, 1.0 / count), size=_AT_ONCE).astype(np.float64)
