"""The bits of the reference implementation of SynthID-Text, in numpy, to compare ours with.

    ids of an n-gram, then the key of a round  ─ a linear congruential generator ─>  a place in a table of coins

`SynthIDTextWatermarkLogitsProcessor` of transformers, and the package synthid-text, compute the same; the test in
`tests/oracle` compares. The table has 2^16 coins, so of each round's key only the lowest 16 bits matter, and whoever
has marked text can find them by trying: that is why ours are a keyed hash.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from argosy.config import WATERMARK_DEPTH
from argosy.engine.watermark import Ngrams, Watermark, Words

TABLE_SIZE, TABLE_SEED = 1 << 16, 0
_MULTIPLIER, _INCREMENT = np.uint64(6364136223846793005), np.uint64(1)


def keys_of(key: bytes) -> list[int]:
    """The keys of the rounds, from a key of ours."""
    digest = hashlib.shake_256(key).digest(4 * WATERMARK_DEPTH)
    return [int.from_bytes(digest[4 * i : 4 * i + 4]) >> 1 for i in range(WATERMARK_DEPTH)]


def coins() -> npt.NDArray[np.uint64]:
    """`torch.randint(0, 2, (TABLE_SIZE,))` with a generator of TABLE_SEED: Mersenne Twister, the lowest bit of each
    word."""
    twister = np.random.MT19937()
    twister._legacy_seeding(TABLE_SEED)  # as torch seeds it
    return twister.random_raw(TABLE_SIZE).astype(np.uint64) & np.uint64(1)


class ReferenceWatermark(Watermark):
    """A mark with the reference's bits."""

    def __init__(self, key: bytes) -> None:
        super().__init__(key)
        self._keys = np.array(keys_of(key), np.uint64)
        self._coins = coins()

    def words(self, ngrams: Ngrams) -> Words:
        hashed = np.ones(len(ngrams), np.uint64)
        for ids in ngrams.T:
            hashed = (hashed + ids) * _MULTIPLIER + _INCREMENT
        words = np.zeros(len(ngrams), np.uint64)
        for i, key in enumerate(self._keys):
            place = ((hashed + key) * _MULTIPLIER + _INCREMENT) % np.uint64(TABLE_SIZE)
            words |= self._coins[place] << np.uint64(i)
        return words
