"""Words of n-grams are SipHash-2-4, and a tournament reweighs as its formula says."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native as native

KEY = bytes(range(16))


def words_of(ngrams: NDArray[np.uint32], key: bytes = KEY) -> NDArray[np.uint64]:
    words = np.empty(len(ngrams), np.uint64)
    native.ngram_words(key, ngrams, words)
    return words


def test_the_plain_reference_gives_the_published_vectors() -> None:
    assert reference_siphash(bytes(range(15))) == 0xA129CA6149BE45E5  # appendix A of the paper
    assert reference_siphash(b"") == 0x726FDB47DD0E0E31  # the first of the authors' vectors.h


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63])
def test_a_word_is_siphash_of_the_ids_as_little_endian_bytes(size: int) -> None:
    ngrams = np.random.default_rng(size).integers(2**32, size=(7, size), dtype=np.uint32)
    expected = [reference_siphash(ids.astype("<u4").tobytes()) for ids in ngrams]
    assert words_of(ngrams).tolist() == expected
    assert words_of(ngrams[:0]).tolist() == []


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 9, 1000])
@pytest.mark.parametrize("depth", [0, 1, 30, 64])
def test_a_round_moves_weight_to_tokens_whose_bit_is_one(num_tokens: int, depth: int) -> None:
    rng = np.random.default_rng(num_tokens)
    words = rng.integers(2**64, size=num_tokens, dtype=np.uint64)
    weights = rng.random(num_tokens)
    weights /= weights.sum() if num_tokens else 1
    expected = weights.copy()
    for i in range(depth):
        bits = (words >> np.uint64(i) & np.uint64(1)).astype(np.float64)
        expected = expected * (1 + bits - (bits * expected).sum())
    native.tournament(words, weights, depth=depth)
    np.testing.assert_allclose(weights, expected, rtol=1e-9, atol=1e-15)  # sums in another order
    assert num_tokens == 0 or weights.sum() == pytest.approx(1)


def test_a_round_is_a_match_that_the_larger_bit_wins() -> None:
    """Two tokens are drawn from the weights; the one with the larger bit wins, and chance decides a tie."""
    words, weights = np.array([0b1, 0b0, 0b1], np.uint64), np.array([0.2, 0.5, 0.3])
    won = np.zeros(3)
    for a in range(3):
        for b in range(3):
            winners = [a, b] if words[a] == words[b] else [a if words[a] > words[b] else b]
            for winner in winners:
                won[winner] += weights[a] * weights[b] / len(winners)
    native.tournament(words, weights, depth=1)
    np.testing.assert_allclose(weights, won, rtol=1e-12)


def reference_siphash(message: bytes, key: bytes = KEY) -> int:
    """SipHash-2-4 by the paper (Aumasson and Bernstein, 2012), in plain Python."""
    mask = 2**64 - 1

    def turn(value: int, by: int) -> int:
        return (value << by | value >> (64 - by)) & mask

    k0, k1 = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rounds(count: int) -> None:
        for _ in range(count):
            v[0] = (v[0] + v[1]) & mask
            v[1] = turn(v[1], 13) ^ v[0]
            v[0] = turn(v[0], 32)
            v[2] = (v[2] + v[3]) & mask
            v[3] = turn(v[3], 16) ^ v[2]
            v[0] = (v[0] + v[3]) & mask
            v[3] = turn(v[3], 21) ^ v[0]
            v[2] = (v[2] + v[1]) & mask
            v[1] = turn(v[1], 17) ^ v[2]
            v[2] = turn(v[2], 32)

    padded = message + bytes(7 - len(message) % 8) + bytes([len(message) % 256])
    for at in range(0, len(padded), 8):
        block = int.from_bytes(padded[at : at + 8], "little")
        v[3] ^= block
        rounds(2)
        v[0] ^= block
    v[2] ^= 0xFF
    rounds(4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]
