"""The lightning indexer chooses the best positions; attention over them equals that over a sequence of only these."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native as native
from argosy.config import KvDtype
from tests.native import _native_testing
from tests.native.test_latent_attention import ODD_HEADS, SCALE, SMALL, WIDE, Sizes, matrix_of, normal

Floats = NDArray[np.float32]
HEADS, DIM, LENGTH, BLOCK = 5, 12, 20_000, 16  # three rounds of scores, the last one partial


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Index:
    """Two sequences of small whole numbers, whose scores are exact in float32 and often equal."""

    def __init__(self, instruction_set: str, *, length: int = LENGTH, dtype: KvDtype = "f32") -> None:
        rng = np.random.default_rng(0)
        self.instruction_set, self.length = instruction_set, length
        self.keys = rng.integers(-1, 2, (2, length, DIM)).astype(np.float32)
        self.q = rng.integers(-2, 3, (2, length, HEADS, DIM)).astype(np.float32)
        self.weights = rng.integers(-1, 3, (2, length, HEADS)).astype(np.float32)
        needed = -(-length // BLOCK)
        self.kv = native.KvCache([native.KvShape.latent(3, DIM)], 2 * needed + 1, BLOCK, dtype)
        self.table = rng.permutation(2 * needed + 1)[: 2 * needed].reshape(2, needed).astype(np.int32)
        everything = np.arange((2 * needed + 1) * BLOCK, dtype=np.int64)
        self.write(np.full((len(everything), DIM), np.nan, np.float32), everything)
        for blocks, keys in zip(self.table, self.keys, strict=True):
            self.write(keys, self.slots(blocks))

    def slots(self, blocks: NDArray[np.int32]) -> NDArray[np.int64]:
        position = np.arange(self.length)
        return blocks[position // BLOCK].astype(np.int64) * BLOCK + position % BLOCK

    def write(self, keys: Floats, slots: NDArray[np.int64]) -> None:
        runtime = native.Runtime(1, instruction_set=self.instruction_set)
        _native_testing.index_write(runtime, self.kv, 0, keys, slots)
        runtime.close()

    def choose(
        self,
        sequence: list[int],
        position: list[int],
        count: int,
        *,
        until: list[int] | None = None,
        threads: int = 1,
    ) -> NDArray[np.int32]:
        runtime = native.Runtime(threads, instruction_set=self.instruction_set)
        chosen = np.full((len(sequence), count), -1, np.int32)
        _native_testing.choose_positions(
            runtime,
            self.kv,
            0,
            self.q[sequence, position],
            self.weights[sequence, position],
            self.table,
            np.array(sequence, np.int32),
            np.array(position, np.int32),
            chosen,
            None if until is None else np.array(until, np.int32),
        )
        sizes = native.StackSizes(1, 0)
        sizes.add_latent_attention(1, 1, 0, 3, 1, 1, HEADS, DIM, count)
        assert runtime.scratch_bytes <= sizes.scratch_bytes(len(sequence), threads)
        runtime.close()
        return chosen

    def expected(self, sequence: int, position: int, count: int) -> NDArray[np.int32]:
        products = self.q[sequence, position].astype(np.float64) @ self.keys[sequence, : position + 1].T
        scores = self.weights[sequence, position] @ np.maximum(products, 0)
        return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int32)


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_the_best_positions_are_chosen_and_the_lower_ones_of_a_tie(
    dtype: KvDtype, instruction_set: str
) -> None:
    index = Index(instruction_set, dtype=dtype)
    for count in (1, 7, 600, 2048):
        for position in (count, 255 + count, 4095, 8191, 8192, LENGTH - 1):
            chosen = index.choose([1], [position], count)
            np.testing.assert_array_equal(chosen[0], index.expected(1, position, count))


def test_a_choice_is_the_same_in_every_batch_and_on_any_threads(instruction_set: str) -> None:
    index = Index(instruction_set, length=700)
    count = 40
    tokens = [(0, p) for p in range(30, 58)] + [(1, 699), (0, 698), (0, 699)]
    sequence, position = [s for s, _ in tokens], [p for _, p in tokens]
    for threads in (1, 3):
        found = index.choose(sequence, position, count, threads=threads)
        for row, (s, p) in zip(found, tokens, strict=True):
            if p < count:  # it sees everything
                assert (row == -1).all()
            else:
                np.testing.assert_array_equal(row, index.expected(s, p, count))
                np.testing.assert_array_equal(row, index.choose([s], [p], count, threads=threads)[0])


def test_a_token_that_sees_later_ones_chooses_among_them_too(instruction_set: str) -> None:
    index = Index(instruction_set, length=300)
    index.q[0, 100], index.weights[0, 100] = index.q[0, 299], index.weights[0, 299]
    chosen = index.choose([0], [100], 50, until=[300])
    np.testing.assert_array_equal(chosen[0], index.expected(0, 299, 50))


def test_a_damaged_key_is_chosen(instruction_set: str) -> None:
    """NaN counts as the best score: attention would hide the damage if it passed over the position."""
    index = Index(instruction_set, length=100)
    index.write(np.full((1, DIM), np.nan, np.float32), index.slots(index.table[0])[77:78])
    assert 77 in index.choose([0], [99], 3)


@pytest.mark.parametrize("sizes", [SMALL, ODD_HEADS, WIDE])
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("length", "count"),
    [(700, 290), *(pytest.param(length, 2048, marks=pytest.mark.full) for length in (2049, 4096, 20_000))],
)
def test_attention_over_chosen_positions_has_the_bits_of_a_sequence_of_only_these(
    sizes: Sizes, dtype: KvDtype, threads: int, length: int, count: int, instruction_set: str
) -> None:
    s, num_blocks = sizes, length // BLOCK + 1
    vectors, q = normal(length, s.rank + s.rope), normal(length, s.heads, s.nope + s.rope, seed=1)
    key_up, _ = matrix_of("f32", normal(s.heads * s.rank, s.nope, seed=2))
    value_up, _ = matrix_of("f32", normal(s.heads * s.value, s.rank, seed=3))
    kv = native.KvCache([native.KvShape.latent(s.rank + s.rope, 8)], num_blocks, BLOCK, dtype)
    tokens = [count - 40, count - 2, count - 1, count, (count + length) // 2, length - 1]
    chosen = np.stack([np.sort(np.random.default_rng(t).permutation(t + 1)[:count]) for t in [*tokens[3:]]])
    chosen = np.concatenate([np.full((3, count), -1), chosen]).astype(np.int32)
    table = np.arange(num_blocks, dtype=np.int32)

    with contextlib.closing(native.Runtime(threads, instruction_set=instruction_set)) as runtime:

        def attend(rows: list[int], until: list[int], limit: NDArray[np.int32] | None) -> Floats:
            out = np.empty((len(rows), s.heads * s.value), np.float32)
            _native_testing.latent_attention(
                runtime,
                kv,
                0,
                q[rows],
                key_up,
                value_up,
                table[None],
                np.zeros(len(rows), np.int32),
                np.array(until, np.int32) - 1,
                SCALE,
                out,
                None,
                limit,
            )
            return out

        _native_testing.latent_write(runtime, kv, 0, vectors, np.arange(length))
        found = attend(tokens, [t + 1 for t in tokens], chosen)
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(found[:3], attend(tokens[:3], [t + 1 for t in tokens[:3]], None))
        for i in range(3, 6):
            _native_testing.latent_write(runtime, kv, 0, vectors[chosen[i]], np.arange(count))
            np.testing.assert_array_equal(found[i], attend([tokens[i]], [count], None)[0])


@pytest.mark.parametrize(
    ("dtype", "nbytes"), [("f32", 4 * (20 + 12)), ("f16", 2 * (20 + 12)), ("q8", 22 + 14)]
)
def test_index_keys_lie_beside_latent_vectors_and_are_copied_with_them(dtype: KvDtype, nbytes: int) -> None:
    kv = native.KvCache([native.KvShape.latent(20, DIM)] * 2, 3, BLOCK, dtype)
    assert kv.nbytes == 3 * kv.block_bytes == 3 * 2 * BLOCK * nbytes
    runtime = native.Runtime(1)
    keys = normal(BLOCK, DIM)
    slots = np.arange(BLOCK, dtype=np.int64)
    for layer in range(2):
        _native_testing.index_write(runtime, kv, layer, keys * np.float32(layer + 1), slots)
    saved = np.empty(kv.block_bytes, np.uint8)
    kv.copy_out(0, saved)
    kv.copy_in(2, saved)
    found = np.full((1, 4), -1, np.int32)
    q, weights = normal(1, HEADS, DIM, seed=1), np.ones((1, HEADS), np.float32)
    choices = []
    for block in (0, 2):
        for layer in range(2):
            _native_testing.choose_positions(
                runtime,
                kv,
                layer,
                q,
                weights,
                np.array([[block]], np.int32),
                np.zeros(1, np.int32),
                np.array([15], np.int32),
                found,
            )
            choices.append(found.tolist())
    assert choices[:2] == choices[2:]
    runtime.close()
