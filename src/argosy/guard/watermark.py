"""The evidence that a text carries a key's watermark: a score and its exact p-value.

    token ids  ─ first_ngrams ─>  n-grams  ─ keyed bits, from the owner of the key ─>  words  ─ judge ─>  Evidence

In a text written without the key, the bits of different n-grams are independent fair coins. The score therefore has
a known distribution, whatever the text, provided that no n-gram counts twice. Only the first n-gram of each context
counts, because that is the one that was marked.

    S = sum over n-grams t and rounds i of w_i g_ti        w_i = 290 - 9 i, whole numbers
    score = S / (sum of w, times the number of n-grams)    0.5 without the watermark

These are the weights of the reference implementation (SynthID-Text, Nature 634, 2024: from 10 down to 1 over 30
rounds), times 29: early rounds mark more than late ones.

The p-value is P(sum >= S) for that sum of coins, computed from the product of their generating functions. The coins
are first tilted (Esscher, 1932) so that S is their mean, which makes the smallest p-value as precise as the
largest.

Elsewhere: the bits are `engine/watermark.py`, the command is `cli/commands/watermark.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from argosy.config import WATERMARK_CONTEXT, WATERMARK_DEPTH
from argosy.errors import UsageError

MOST_TOKENS = 1 << 18  # per text; the transform then has 2^23 values
_WEIGHTS = 290 - 9 * np.arange(WATERMARK_DEPTH)
_DEVIATIONS = 9.0  # half the window; the probability outside it is below 2 e^-40 (Hoeffding, 1963)
_STEEPEST = 1.0  # tilt at which every coin is 1 but for e^-29 of them

Coins = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence found in a text.

    num_counted: the number of n-grams whose bits counted.
    score: the weighted mean of their bits, 0.5 without the watermark; None: nothing counted.
    log10_p: the logarithm of the probability of this score or a higher one without the watermark.
    """

    num_counted: int
    score: float | None
    log10_p: float

    @property
    def p_value(self) -> float:
        """0 where it is smaller than any float."""
        return float(10.0**self.log10_p)


def first_ngrams(token_ids: Sequence[int]) -> npt.NDArray[np.uint32]:
    """The n-grams of a text that count: uint32 [n, WATERMARK_CONTEXT + 1], the first of each context.

    Raises:
        UsageError: the text has too many tokens.
    """
    if len(token_ids) > MOST_TOKENS:
        raise UsageError(f"the text has {len(token_ids)} tokens, and at most {MOST_TOKENS} can be judged")
    ids = np.array(token_ids, np.uint32)
    size = WATERMARK_CONTEXT + 1
    if ids.size < size:
        return np.empty((0, size), np.uint32)
    ngrams = np.lib.stride_tricks.sliding_window_view(ids, size)
    _, first = np.unique(ngrams[:, :-1], axis=0, return_index=True)
    return np.ascontiguousarray(ngrams[np.sort(first)])


def judge(words: npt.NDArray[np.uint64]) -> Evidence:
    """Judge a text by the words of its n-grams: uint64 [n], bit i for round i."""
    if not words.size:
        return Evidence(0, None, 0.0)
    ones = [int(np.count_nonzero(words >> np.uint64(i) & np.uint64(1))) for i in range(WATERMARK_DEPTH)]
    total = int(np.dot(_WEIGHTS, ones))
    return Evidence(words.size, total / (int(_WEIGHTS.sum()) * words.size), log10_p_value(words.size, total))


def log10_p_value(num_counted: int, total: int) -> float:
    """The log10 of P(sum >= total) for `num_counted` n-grams whose bits are independent fair coins.

    Args:
        total: from 0 to `num_counted` times the sum of the weights.
    """
    most = num_counted * int(_WEIGHTS.sum())
    if total <= 0:
        return 0.0
    if 2 * total <= most:  # fair coins: the lower tail mirrors the upper one
        return math.log10(1.0 - 10.0 ** log10_p_value(num_counted, most - total + 1))
    tilt = _tilt(total / num_counted)
    of_one = _tilted(tilt)  # the sum of one n-gram's coins
    deviation = math.sqrt(num_counted * float(np.dot(_WEIGHTS, _WEIGHTS)) / 4)
    size = 1 << max(of_one.size, int(2 * _DEVIATIONS * deviation)).bit_length()
    # Sums are modulo `size`; the window around `total` is wide enough that no other sum matters.
    sums = np.fft.irfft(np.fft.rfft(of_one, size) ** num_counted, size)
    steps = np.arange(size // 2)
    tail = float(np.dot(np.exp(-tilt * steps), sums[(total + steps) % size]))
    log_mean = float(np.sum(np.logaddexp(0.0, tilt * _WEIGHTS) - math.log(2)))  # one n-gram, e^(tilt * sum)
    log_p = num_counted * log_mean - tilt * total + math.log(max(tail, 1e-300))
    return min(0.0, log_p / math.log(10))


def _tilt(mean: float) -> float:
    """The tilt that gives one n-gram's sum this mean, which is above the fair coins' mean."""
    low, high = 0.0, _STEEPEST
    for _ in range(60):
        middle = (low + high) / 2
        found = float(np.sum(_WEIGHTS / (1.0 + np.exp(-middle * _WEIGHTS))))
        low, high = (middle, high) if found < mean else (low, middle)
    return (low + high) / 2


def _tilted(tilt: float) -> Coins:
    """The distribution of one n-gram's sum when the coin of weight w has odds e^(tilt * w)."""
    chances = np.ones(1)
    for weight in _WEIGHTS.tolist():
        one = 1.0 / (1.0 + math.exp(-tilt * weight))
        both = np.zeros(chances.size + weight)
        both[: chances.size] = (1.0 - one) * chances
        both[weight:] += one * chances
        chances = both
    return chances
