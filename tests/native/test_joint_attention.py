"""Attention over small blocks that all KV heads share has the bits of a sequence of only the positions seen."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native as native
from argosy.config import KvDtype
from tests.native import _native_testing

Floats = NDArray[np.float32]
KV_HEADS, GROUP, HEAD_DIM, VALUE_DIM = 2, 5, 72, 40
HEADS, SCALE = KV_HEADS * GROUP, 0.2


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Sequences:
    """Two sequences, and another cache in which chosen positions lie as a sequence of their own."""

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
        self.block_tokens = block_tokens
        self.q = rng.standard_normal((2, length, HEADS, HEAD_DIM), np.float32)
        self.keys = rng.standard_normal((2, length, KV_HEADS, HEAD_DIM), np.float32)
        self.values = rng.standard_normal((2, length, KV_HEADS, VALUE_DIM), np.float32)
        self.sinks = rng.standard_normal(HEADS, np.float32)
        needed = -(-length // block_tokens)
        shape = native.KvShape.keys_values(KV_HEADS, HEAD_DIM, value_dim=VALUE_DIM)
        self.kv = native.KvCache([shape], 2 * needed, block_tokens, dtype)
        self.alone = native.KvCache([shape], 2 * needed, 16, dtype)
        self.table = rng.permutation(2 * needed).reshape(2, needed).astype(np.int32)
        self.runtime = native.Runtime(threads, instruction_set=instruction_set)
        for sequence in range(2):
            positions = np.arange(length)
            slots = self.table[sequence, positions // block_tokens].astype(np.int64) * block_tokens
            slots += positions % block_tokens
            native.kv_write(self.runtime, self.kv, 0, self.keys[sequence], self.values[sequence], slots)

    def attend(self, tokens: list[tuple[int, int]], chosen: NDArray[np.int32], size: int) -> Floats:
        sequence, order = (np.array(part, np.int32) for part in zip(*tokens, strict=True))
        out = np.full((len(tokens), HEADS * VALUE_DIM), np.nan, np.float32)
        _native_testing.joint_attention(
            self.runtime, self.kv, 0, self.q[sequence, order], self.table, sequence, order, chosen, size, SCALE,
            self.sinks, out,
        )  # fmt: skip
        return out

    def expected(self, token: tuple[int, int], blocks: NDArray[np.int32], size: int) -> Floats:
        """Dense attention of the token as the last of a sequence that has only the positions that it sees."""
        sequence, order = token
        seen = np.arange(order + 1)
        if (order + 1) // size > len(blocks):
            seen = seen[np.isin(seen // size, blocks) | (seen >= (order + 1) // size * size)]
        slots = np.arange(len(seen))
        keys, values = self.keys[sequence, seen], self.values[sequence, seen]
        native.kv_write(self.runtime, self.alone, 0, keys, values, slots)
        out = np.empty((1, HEADS * VALUE_DIM), np.float32)
        native.attention(
            self.runtime, self.alone, 0, self.q[token][None], np.arange(len(seen) // 16 + 1, dtype=np.int32)[None],
            np.zeros(1, np.int32), np.array([len(seen) - 1], np.int32), SCALE, 0, out, sinks=self.sinks,
        )  # fmt: skip
        return out[0]


def choose(tokens: list[tuple[int, int]], count: int, size: int) -> NDArray[np.int32]:
    rng = np.random.default_rng(1)
    chosen = np.full((len(tokens), count), -1, np.int32)
    for row, (_, order) in zip(chosen, tokens, strict=True):
        if (whole := (order + 1) // size) > count:
            row[:] = np.sort(rng.choice(whole, count, replace=False))
    return chosen


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8"])
@pytest.mark.parametrize(
    ("block_tokens", "count", "size", "threads"),
    [(16, 5, 4, 1), (16, 300, 4, 3), (16, 26, 48, 2), (5, 7, 3, 1), (40, 9, 8, 3)],
)
def test_bits_are_those_of_dense_attention_over_only_the_positions_seen(
    dtype: KvDtype, block_tokens: int, count: int, size: int, threads: int, instruction_set: str
) -> None:
    found = Sequences(
        instruction_set, count * size + 90, block_tokens=block_tokens, dtype=dtype, threads=threads
    )
    limit = (count + 1) * size - 1  # the first token with more whole blocks
    tokens = [(1, p) for p in (0, limit - 1, limit, limit + 1, count * size + 89)] + [(0, limit + 2)]
    chosen = choose(tokens, count, size)
    out = found.attend(tokens, chosen, size)
    for i, token in enumerate(tokens):
        alone = found.attend([token], chosen[i : i + 1], size)
        np.testing.assert_array_equal(alone[0], out[i])
        if block_tokens % 16 == 0 or (chosen[i] >= 0).all():  # else lanes have padding
            np.testing.assert_array_equal(out[i], found.expected(token, chosen[i], size))


def test_damage_outside_the_positions_seen_changes_nothing(instruction_set: str) -> None:
    """What gathered keys leave in memory does not reach a shorter choice either."""
    found = Sequences(instruction_set, 200)
    tokens = [(0, 150)]
    chosen = np.array([[3, 5, 11]], np.int32)
    expected = found.attend(tokens, chosen, 4)
    damaged = np.full((40, KV_HEADS, HEAD_DIM), np.nan, np.float32)
    slots = (found.table[0, 4:6, None] * 16 + np.arange(16)).ravel().astype(np.int64)
    native.kv_write(found.runtime, found.kv, 0, damaged[:32], damaged[:32, :, :VALUE_DIM].copy(), slots)
    found.attend([(0, 199)], np.arange(16, 24, dtype=np.int32)[None], 4)  # leaves NaN in the scratch
    np.testing.assert_array_equal(found.attend(tokens, chosen, 4), expected)
