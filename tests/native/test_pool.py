"""Entries that stand for groups of positions: values as in numpy, and the same bits for every chunk and thread."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native
from tests.native import _native_testing

Array = NDArray[np.float32]
# Ratio, dimension, overlap: DeepSeek-V4's two kinds, GLM-5.3's, and odd ones.
SIZES = [(4, 40, True), (128, 72, False), (16, 128, False), (2, 7, False), (3, 5, True), (1, 9, False)]


def entries_of(
    vectors: Array, gates: Array | None, bias: Array | None, sizes: tuple[int, int, bool]
) -> Array:
    """The entries of a whole sequence in float64, group by group."""
    ratio, dim, has_overlap = sizes
    count = len(vectors) // ratio
    x = vectors[: count * ratio].astype(np.float64).reshape(count, ratio, -1)
    g = np.zeros_like(x) if gates is None else gates[: count * ratio].astype(np.float64).reshape(x.shape)
    g = g if bias is None else g + bias
    if has_overlap:
        nothing = np.zeros((1, ratio, dim))
        x = np.concatenate([np.concatenate([nothing, x[:-1, :, :dim]]), x[:, :, dim:]], axis=1)
        g = np.concatenate([np.concatenate([nothing - np.inf, g[:-1, :, :dim]]), g[:, :, dim:]], axis=1)
    weights = np.exp(g - g.max(axis=1, keepdims=True))
    return ((weights * x).sum(axis=1) / weights.sum(axis=1)).astype(np.float32)


class Pool:
    """One pool, whose slot 0 goes through a sequence part by part."""

    def __init__(
        self, sizes: tuple[int, int, bool], threads: int = 1, instruction_set: str | None = None
    ) -> None:
        self.runtime = _native.Runtime(threads, instruction_set=instruction_set)
        self.sizes = sizes
        shape = _native.StateShape.pools([sizes])
        # A layer always has a state here: that of a pool with ratio 1 is empty.
        self.state = _native.RecurrentState(2, [shape, _native.StateShape.short_conv(1, 2)])

    def add(
        self, vectors: Array, gates: Array | None, bias: Array | None, slot: int = 0
    ) -> tuple[Array, Array]:
        """Return entries and the positions at which their groups begin."""
        count = len(vectors)
        out, begins = np.full((count, self.sizes[1]), np.nan, np.float32), np.zeros(3 * count, np.float32)
        runs, at = np.array([[0, count, slot]]), self.state.position(slot)
        made = _native_testing.pool(
            self.runtime, self.state, 0, vectors, gates, bias, runs, sizes=self.sizes, out=out, begins=begins
        )
        saved = np.zeros(self.state.slot_floats, np.float32)
        self.state.copy_out(slot, saved)
        self.state.copy_in(slot, saved, at + count)
        return out[:made], begins[:made]


def inputs_of(
    sizes: tuple[int, int, bool], count: int, seed: int = 0, has_gates: bool = True
) -> tuple[Array, Array | None, Array | None]:
    ratio, dim, has_overlap = sizes
    rng = np.random.default_rng(seed)
    columns = dim * (2 if has_overlap else 1)

    def draw(rows: int) -> Array:
        return rng.standard_normal((rows, columns)).astype(np.float32)

    return (draw(count), draw(count) * 4, draw(ratio)) if has_gates else (draw(count), None, None)


@pytest.mark.parametrize("instruction_set", _native.instruction_sets())
@pytest.mark.parametrize("sizes", SIZES)
def test_entries_are_softmax_means_of_their_groups(
    sizes: tuple[int, int, bool], instruction_set: str
) -> None:
    for has_gates in (True, False):
        given = inputs_of(sizes, 3 * sizes[0] + sizes[0] // 2, has_gates=has_gates)
        entries, begins = Pool(sizes, instruction_set=instruction_set).add(*given)
        np.testing.assert_allclose(entries, entries_of(*given, sizes), rtol=2e-5, atol=2e-6)
        assert begins.tolist() == [sizes[0] * i for i in range(len(entries))]


@pytest.mark.parametrize("sizes", SIZES)
def test_chunks_and_threads_do_not_change_bits(sizes: tuple[int, int, bool]) -> None:
    vectors, gates, bias = inputs_of(sizes, 300)
    whole, begins = Pool(sizes).add(vectors, gates, bias)
    assert len(whole) == 300 // sizes[0]
    for chunk in (1, 7, 256):
        pool = Pool(sizes, threads=2)
        parts = [
            pool.add(
                vectors[at : at + chunk], None if gates is None else gates[at : at + chunk], bias, slot=1
            )
            for at in range(0, 300, chunk)
        ]
        assert np.concatenate([entries for entries, _ in parts]).tobytes() == whole.tobytes()
        assert np.concatenate([begin for _, begin in parts]).tobytes() == begins.tobytes()


def test_what_a_slot_held_before_does_not_matter() -> None:
    sizes = (4, 40, True)
    given = inputs_of(sizes, 10)
    pool = Pool(sizes)
    first, _ = pool.add(*given)
    pool.state.restart(0)
    again, _ = pool.add(*given)
    assert again.tobytes() == first.tobytes()


def test_nan_damages_only_its_own_dimension_and_the_entries_of_its_group() -> None:
    sizes = (4, 40, True)
    vectors, gates, bias = inputs_of(sizes, 16)
    assert gates is not None
    clean, _ = Pool(sizes).add(vectors, gates, bias)
    gates[5, 3] = gates[6, 40 + 8] = np.nan  # the first half goes into the next group's entry
    damaged, _ = Pool(sizes).add(vectors, gates, bias)
    assert np.argwhere(np.isnan(damaged)).tolist() == [[1, 8], [2, 3]]
    np.testing.assert_array_equal(damaged[[0, 3]], clean[[0, 3]])


def test_a_gate_of_minus_infinity_leaves_its_vector_out() -> None:
    sizes = (3, 5, False)
    vectors, gates, _ = inputs_of(sizes, 3)
    assert gates is not None
    gates[0] = -np.inf
    entries, _ = Pool(sizes).add(vectors, gates, None)
    np.testing.assert_allclose(entries, entries_of(vectors, gates, None, sizes), rtol=2e-5, atol=2e-6)


def test_a_store_has_room_for_the_entries_of_its_blocks() -> None:
    """Entries of many positions take a place in every block, so that a block can be copied alone."""
    for ratio, entries in ((1, 16), (2, 8), (16, 1), (128, 1)):
        shape = _native.KvShape.pooled(40, ratio)
        assert _native.kv_cache_bytes([shape], 10, 16, "f32") == 10 * entries * 40 * 4
    for ratio in (3, 24, 0, -1):
        with pytest.raises(
            ValueError, match="expected a divisor or a multiple of the 16 positions of a block"
        ):
            _native.kv_cache_bytes([_native.KvShape.pooled(40, ratio)], 10, 16, "f32")
