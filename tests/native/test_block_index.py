"""Block-sparse attention: heads choose the best blocks, and attention has the bits of a sequence of only these."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native as native
from argosy.config import KvDtype
from tests.native import _native_testing
from tests.native.test_latent_attention import matrix_of

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
KV_HEADS, GROUP, HEAD_DIM, VALUE_DIM, DIM = 3, 5, 24, 20, 12
SCALE = 0.2


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Sequences:
    """Two sequences; index keys and queries are small whole numbers, whose products are exact and often equal."""

    def __init__(
        self,
        instruction_set: str,
        length: int,
        *,
        block_tokens: int = 16,
        dtype: KvDtype = "f32",
        threads: int = 1,
    ) -> None:
        rng = np.random.default_rng(0)
        self.length, self.block_tokens = length, block_tokens
        self.index_keys = rng.integers(-3, 4, (2, length, DIM)).astype(np.float32)
        self.index_q = rng.integers(-3, 4, (2, length, KV_HEADS, DIM)).astype(np.float32)
        self.q = rng.standard_normal((2, length, KV_HEADS * GROUP, HEAD_DIM), np.float32)
        self.keys = rng.standard_normal((2, length, KV_HEADS, HEAD_DIM), np.float32)
        self.values = rng.standard_normal((2, length, KV_HEADS, VALUE_DIM), np.float32)
        needed = -(-length // block_tokens)
        shape = native.KvShape.keys_values(KV_HEADS, HEAD_DIM, value_dim=VALUE_DIM, index_dim=DIM)
        self.kv = native.KvCache([shape], 2 * needed, block_tokens, dtype)
        self.table = rng.permutation(2 * needed).reshape(2, needed).astype(np.int32)
        self.runtime = native.Runtime(threads, instruction_set=instruction_set)
        for sequence in range(2):
            slots = self.slots(sequence, np.arange(length))
            native.kv_write(self.runtime, self.kv, 0, self.keys[sequence], self.values[sequence], slots)
            _native_testing.index_write(self.runtime, self.kv, 0, self.index_keys[sequence], slots)

    def slots(self, sequence: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        blocks = self.table[sequence, positions // self.block_tokens].astype(np.int64)
        return blocks * self.block_tokens + positions % self.block_tokens

    def attend(
        self, tokens: list[tuple[int, int]], count: int, size: int, *, local: int = 1
    ) -> tuple[Ints, Floats]:
        sequence, order = [s for s, _ in tokens], [p for _, p in tokens]
        chosen = np.full((len(tokens), KV_HEADS, count), -1, np.int32)
        out = np.full((len(tokens), KV_HEADS * GROUP * VALUE_DIM), np.nan, np.float32)
        _native_testing.block_attention(
            self.runtime,
            self.kv,
            0,
            self.q[sequence, order],
            self.index_q[sequence, order],
            self.table,
            np.array(sequence, np.int32),
            np.array(order, np.int32),
            size,
            local,
            SCALE,
            chosen,
            out,
        )
        return chosen, out

    def expected_choice(self, token: tuple[int, int], count: int, size: int, local: int) -> Ints:
        sequence, order = token
        products = self.index_q[token].astype(np.float64) @ self.index_keys[sequence, : order + 1].T
        own = order // size
        padded = np.full((KV_HEADS, (own + 1) * size), -np.inf)
        padded[:, : order + 1] = products
        scores = padded.reshape(KV_HEADS, own + 1, size).max(axis=2)
        scores[:, max(0, own + 1 - local) :] = np.inf
        return np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :count], axis=1).astype(np.int32)

    def masked(self, token: tuple[int, int], chosen: Ints, size: int) -> Floats:
        """Attention over the positions of chosen blocks, in float64."""
        sequence, order = token
        out = np.empty((KV_HEADS, GROUP, VALUE_DIM))
        for head, blocks in enumerate(chosen):
            seen = np.isin(np.arange(order + 1) // size, blocks)
            keys = self.keys[sequence, : order + 1, head][seen].astype(np.float64)
            scores = SCALE * self.q[token].reshape(KV_HEADS, GROUP, HEAD_DIM)[head] @ keys.T
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[head] = weights @ self.values[sequence, : order + 1, head][seen]
        return out.reshape(-1).astype(np.float32)


@pytest.mark.parametrize(
    ("block_tokens", "count", "size", "local"),
    [(16, 3, 32, 1), (16, 1, 16, 1), (5, 4, 20, 2), (16, 5, 48, 3)],
)
def test_heads_choose_the_best_blocks_and_attend_to_them(
    block_tokens: int, count: int, size: int, local: int, instruction_set: str
) -> None:
    found = Sequences(instruction_set, 700, block_tokens=block_tokens)
    limit = count * size
    tokens = [(1, p) for p in (0, limit - 1, limit, limit + 1, 2 * limit, 699)]
    chosen, out = found.attend(tokens, count, size, local=local)
    assert (chosen[:2] == -1).all()  # they see everything
    for i, token in enumerate(tokens):
        expected = found.expected_choice(token, count, size, local)
        if i >= 2:
            np.testing.assert_array_equal(chosen[i], expected)
        np.testing.assert_allclose(out[i], found.masked(token, expected, size), atol=2e-5)


def test_a_long_sequence_is_scored_in_several_rounds(instruction_set: str) -> None:
    """8,192 positions are no multiple of 48, nor of a section of 256."""
    found = Sequences(instruction_set, 17_000, threads=2)
    tokens = [(0, 8_160), (0, 16_400), (0, 16_999)]
    chosen, out = found.attend(tokens, 30, 48)
    for i, token in enumerate(tokens):
        np.testing.assert_array_equal(chosen[i], found.expected_choice(token, 30, 48, 1))
        np.testing.assert_allclose(out[i], found.masked(token, chosen[i], 48), atol=2e-5)


@pytest.mark.parametrize("dtype", ["f16", "q8"])
@pytest.mark.parametrize("threads", [1, 3])
def test_bits_are_those_of_dense_attention_over_only_the_chosen_blocks(
    dtype: KvDtype, threads: int, instruction_set: str
) -> None:
    count, size = 40, 32  # more than a section of 1,024 positions
    found = Sequences(instruction_set, 1_600, dtype=dtype, threads=threads)
    tokens = [(0, 1_279), (0, 1_280), (0, 1_281), (1, 1_599)]
    chosen, out = found.attend(tokens, count, size)
    for i, (sequence, order) in enumerate(tokens):
        np.testing.assert_array_equal(found.attend([(sequence, order)], count, size)[1][0], out[i])
        for head in range(KV_HEADS):
            blocks = chosen[i, head] if i > 0 else np.arange(count)
            table = np.concatenate(
                [found.table[sequence, b * size // 16 : (b + 1) * size // 16] for b in blocks]
            )
            dense = np.empty((1, KV_HEADS * GROUP * VALUE_DIM), np.float32)
            native.attention(
                found.runtime,
                found.kv,
                0,
                found.q[sequence, order][None],
                table[None],
                np.zeros(1, np.int32),
                np.array([(count - 1) * size + order % size], np.int32),
                SCALE,
                0,
                dense,
            )
            mine = slice(head * GROUP * VALUE_DIM, (head + 1) * GROUP * VALUE_DIM)
            np.testing.assert_array_equal(out[i, mine], dense[0, mine])


def test_a_chunk_has_the_bits_of_its_tokens_one_by_one(instruction_set: str) -> None:
    found = Sequences(instruction_set, 300, threads=2)
    tokens = [(0, p) for p in range(90, 131)] + [(1, 299), (1, 40), (0, 298), (0, 299)]
    chosen, out = found.attend(tokens, 3, 32)
    for i, token in enumerate(tokens):
        one, alone = found.attend([token], 3, 32)
        np.testing.assert_array_equal(one[0], chosen[i])
        np.testing.assert_array_equal(alone[0], out[i])


def test_a_damaged_index_key_is_chosen_and_the_own_block_stays(instruction_set: str) -> None:
    found = Sequences(instruction_set, 320)
    damaged = np.full((9, DIM), np.nan, np.float32)  # one in each block before the last
    slots = found.slots(0, np.arange(9) * 32 + 7)
    _native_testing.index_write(found.runtime, found.kv, 0, damaged, slots)
    chosen, out = found.attend([(0, 319)], 3, 32)
    assert chosen[0].tolist() == [[0, 1, 9]] * KV_HEADS
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("dtype", "nbytes"),
    [
        ("f32", 4 * (KV_HEADS * (24 + 32) + 12)),
        ("f16", 2 * (KV_HEADS * (24 + 32) + 12)),
        ("q8", KV_HEADS * (24 + 2 + 32 + 2) + 14),
    ],
)
def test_index_keys_lie_behind_values_and_are_copied_with_them(dtype: KvDtype, nbytes: int) -> None:
    shape = native.KvShape.keys_values(KV_HEADS, HEAD_DIM, value_dim=VALUE_DIM, index_dim=DIM)
    assert native.KvCache([shape] * 2, 3, 16, dtype).nbytes == 2 * 3 * 16 * nbytes
    found = Sequences(native.instruction_sets()[0], 128, dtype=dtype)
    before = found.attend([(0, 127)], 2, 32)
    saved = np.empty((8, found.kv.block_bytes), np.uint8)
    for block, data in zip(found.table[0], saved, strict=True):
        found.kv.copy_out(block, data)
    for block, data in zip(found.table[1], saved, strict=True):
        found.kv.copy_in(block, data)
    found.table[0] = found.table[1]
    for one, other in zip(before, found.attend([(0, 127)], 2, 32), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_indexer_that_always_chooses_more_blocks_than_it_may_is_refused() -> None:
    query, _ = matrix_of("f32", np.zeros((8, 6), np.float32))
    key, _ = matrix_of("f32", np.zeros((4, 6), np.float32))
    norm = np.ones(4, np.float32)
    with pytest.raises(ValueError, match="num_local is 3, expected 1 to 2"):
        native.BlockIndexer(
            query, key, query_norm=norm, key_norm=norm, num_chosen=2, block_size=16, num_local=3
        )
