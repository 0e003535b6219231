"""Token ids -> rows of n-gram tables. Rows depend on ids alone, so they are read before their layer runs.

    Ngrams.rows(step): the ids of each token and of those before it -> hash of each head -> row

Checkpoints do not always store the constants of the hashes; they follow from a few settings.

Elsewhere: `config/ngrams.py` describes a table; `prompt/folding.py` folds tokens; `native/ops/table_rows.h` reads rows.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
from numpy.typing import NDArray

from argosy.config import NgramConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.step import Step

_MOST_PRIME = 1 << 40  # beyond any table, and still found at once
_MOST_PRIMES = 4096
_BORDER = -1  # of folded ids: no n-gram reaches across it
NO_ROW = -1
_INT64 = np.iinfo(np.int64)
_MASK = (1 << 64) - 1
# SplitMix64 (Steele, Lea and Flood, 2014)
_GAMMA, _FIRST_MIX, _SECOND_MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SEED_STEP = 10007  # between the seeds of two layers


class Ngrams:
    """The rows of one table that a step needs.

    Args:
        vocab_size: ids are below it.
        token_map: int32 [n], the folded id of each token; None: ids stay. Tokens from `n` on are borders.

    Raises:
        CheckpointError: the product of an id and a multiplier would overflow, or the map has another number of ids.
    """

    def __init__(
        self, config: NgramConfig, vocab_size: int, token_map: NDArray[np.int32] | None = None
    ) -> None:
        self.config = config
        self._map, self._blank, ids = None, config.blank_id, max(vocab_size, config.blank_id + 1)
        if config.folded_ids:
            self._map = _map_of(config, vocab_size, token_map)
            self._blank, ids = int(self._map[config.blank_id]), config.folded_ids
        if ids * max(config.multipliers) > _INT64.max:
            raise CheckpointError(
                f"the multipliers of an n-gram table reach {max(config.multipliers)}; expected less than 2^63 / {ids}"
            )
        self._multipliers = np.array(config.multipliers, np.int64)
        self._primes = np.array(config.primes, np.int64).reshape(config.num_earlier, -1)
        self._offsets = (np.cumsum(self._primes) - self._primes.reshape(-1)).reshape(self._primes.shape)

    def rows(self, step: Step) -> NDArray[np.int64]:
        """Return the rows of each token: int64 [tokens, heads]; `NO_ROW` stands for zeros.

        The tokens of a sequence are consecutive in the step, and `step.earlier_ids` holds those before them.
        """
        ids = self._window(step)
        products = ids * self._multipliers
        mixed = np.bitwise_xor.accumulate(products, axis=1)[:, 1:]  # [tokens, lengths of n-grams]
        rows = mixed[:, :, None] % self._primes + self._offsets
        if self._map is not None:
            rows[self._map[step.token_ids] == _BORDER] = NO_ROW
        return rows.reshape(len(ids), -1)

    def _window(self, step: Step) -> NDArray[np.int64]:
        """Return the ids int64 [tokens, 1 + num_earlier] of each token and, one after another, of those before it."""
        config, count = self.config, self.config.num_earlier
        sequence, num_tokens = step.sequence.astype(np.int64), step.num_tokens
        earlier = step.earlier_ids
        if earlier is None:
            earlier = np.full((len(step.block_table), count), -1, np.int32)
        earlier = earlier[:, earlier.shape[1] - count :]
        flat = np.empty(num_tokens + earlier.size, np.int64)
        at = np.arange(num_tokens) + count * (sequence + 1)
        starts = np.searchsorted(sequence, np.arange(len(earlier))) + count * np.arange(len(earlier))
        flat[starts[:, None] + np.arange(count)] = earlier
        flat[at] = step.token_ids
        is_absent = flat < 0
        if self._map is not None:
            flat = self._map[flat].astype(np.int64)
        window = flat[at[:, None] - np.arange(1 + count)]
        is_border = is_absent | (flat == (_BORDER if self._map is not None else config.border_id))
        hides = is_border[at[:, None] - np.arange(1 + count)]
        if self._map is None:
            hides[:, 0] = False  # a border's own n-grams reach back
        window[np.logical_or.accumulate(hides, axis=1)] = self._blank
        ids: NDArray[np.int64] = window
        return ids


def _map_of(config: NgramConfig, vocab_size: int, token_map: NDArray[np.int32] | None) -> NDArray[np.int32]:
    """Return the folded id of each token of the vocabulary, and `_BORDER` for those that are borders."""
    if token_map is None:
        raise CheckpointError(
            f"this checkpoint has no tokenizer.json, which its n-gram tables need: their rows follow from "
            f"{config.folded_ids} folded tokens",
            hint="copy tokenizer.json from the same place as the weights",
        )
    found = int(token_map.max(initial=-1)) + 1
    if found != config.folded_ids or config.blank_id >= len(token_map):
        raise CheckpointError(
            f"the tokens of this checkpoint's tokenizer fold to {found} ids; its n-gram tables were made for "
            f"{config.folded_ids}, so that every n-gram would read another row",
            hint="get tokenizer.json again, from the same place as the weights",
        )
    whole = np.full(max(vocab_size, len(token_map)), _BORDER, np.int32)
    whole[: len(token_map)] = token_map
    if config.border_id is not None:
        whole[config.border_id] = _BORDER
    return whole


def primes_from(start: int, first: int, count: int) -> tuple[int, ...]:
    """Return `count` primes, of those not below `start`, after the first `first`.

    Raises:
        UnsupportedModel: they are too large or too many.
    """
    if not 2 <= start <= _MOST_PRIME or first + count > _MOST_PRIMES:
        raise UnsupportedModel(
            f"n-gram tables of {first + count} heads with {start} rows each are not supported; "
            f"at most {_MOST_PRIMES} heads and {_MOST_PRIME} rows"
        )
    found: list[int] = []
    begin, size = start, 64 * max(1, first + count)
    while len(found) < first + count:
        is_prime = np.ones(size, np.bool_)
        for prime in _primes_below(isqrt(begin + size) + 1):
            is_prime[max(prime * prime, -(-begin // prime) * prime) - begin :: prime] = False
        found += (np.flatnonzero(is_prime) + begin).tolist()
        begin += size
    return tuple(found[first : first + count])


def _primes_below(end: int) -> list[int]:
    """The sieve of Eratosthenes."""
    is_prime = np.ones(end, np.bool_)
    is_prime[:2] = False
    for number in range(2, isqrt(end) + 1):
        if is_prime[number]:
            is_prime[number * number :: number] = False
    return [int(prime) for prime in np.flatnonzero(is_prime)]


def _most_multiplier(num_ids: int) -> int:
    """Return the end of the numbers x whose multiplier 2 x + 1 cannot overflow with an id."""
    return max(1, int(_INT64.max) // max(num_ids, 1) // 2)


def splitmix_multipliers(seed: int, table: int, num_ids: int, count: int) -> tuple[int, ...]:
    """Return the multipliers of a model's table with this number, by SplitMix64 (Qwen3.8)."""
    multipliers = []
    for index in range(count):
        value = (seed + _SEED_STEP * table + _GAMMA * (index + 2)) & _MASK
        value = ((value ^ (value >> 30)) * _FIRST_MIX) & _MASK
        value = ((value ^ (value >> 27)) * _SECOND_MIX) & _MASK
        multipliers.append(2 * ((value ^ (value >> 31)) % _most_multiplier(num_ids)) + 1)
    return tuple(multipliers)


def pcg_multipliers(layer: int, num_ids: int, count: int) -> tuple[int, ...]:
    """Return the multipliers of a layer's table by numpy's PCG64 (DeepSeek-V4.1)."""
    generator = np.random.default_rng(_SEED_STEP * layer)
    drawn = generator.integers(0, _most_multiplier(num_ids), count, np.int64)
    return tuple((2 * drawn + 1).tolist())
