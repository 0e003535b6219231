"""Change the rate of a sound, as the loaders of the reference processors do.

float32 [samples] at one rate, in pieces of any length  ->  float32 [samples] at another rate
"""

from __future__ import annotations

import math

import numpy as np
import soxr
from numpy.typing import NDArray


class Resampler:
    """Resamples one sound, piece by piece; the pieces have no effect on the result.

    The result has ceil(samples * ratio) samples: soxr rounds, and librosa pads or cuts soxr's result.
    """

    def __init__(self, rate: float, wanted: float) -> None:
        self._rates = (rate, wanted)
        self._stream = None if rate == wanted else soxr.ResampleStream(rate, wanted, 1, quality="HQ")
        self._num_in = 0
        self._pieces: list[NDArray[np.float32]] = []

    def add(self, samples: NDArray[np.float32]) -> None:
        self._num_in += samples.size
        self._pieces.append(samples if self._stream is None else self._stream.resample_chunk(samples))

    def finish(self) -> NDArray[np.float32]:
        """Return the whole result; call it once."""
        if self._stream is not None:
            self._pieces.append(self._stream.resample_chunk(np.zeros(0, np.float32), last=True))
        samples = np.concatenate([np.zeros(0, np.float32), *self._pieces])
        self._pieces.clear()
        rate, wanted = self._rates
        num_wanted = math.ceil(self._num_in * wanted / rate)
        if samples.size < num_wanted:
            samples = np.pad(samples, (0, num_wanted - samples.size))
        return samples[:num_wanted]
