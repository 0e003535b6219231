"""The gated delta net of `argosy._native` agrees with a float64 formula; other tokens do not change a token's result.

Every test runs once per instruction set of this CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native as native
from tests.native import _native_testing

Floats = NDArray[np.float32]
Sizes = tuple[int, int, int, int, int]
EPS = 1e-6

# Key heads, value heads, key and value dimensions, positions of the convolution: sizes around one vector (8, 16) and
# four (32, 64), with one value head per key head and with several.
SIZES: list[Sizes] = [
    (1, 1, 1, 1, 1),
    (2, 2, 7, 9, 2),
    (1, 3, 16, 15, 4),
    (2, 4, 17, 33, 4),
    (3, 3, 8, 64, 3),
    (2, 6, 32, 70, 4),
    (1, 2, 128, 128, 4),
]


@pytest.fixture(params=native.instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Net, "instruction_set", request.param)


@dataclass(frozen=True)
class Net:
    """Random weights, and the inputs of one sequence as the projections give them."""

    sizes: Sizes
    qkv: Floats
    z: Floats
    b: Floats
    a: Floats
    conv: Floats
    rate: Floats
    dt_bias: Floats
    norm: Floats
    is_tiled: bool = False
    floor: float | None = (
        None  # Kimi Delta Attention: a decay for each key dimension; 0: without a least decay
    )
    instruction_set: ClassVar[str | None] = None  # set for each test

    @classmethod
    def random(
        cls,
        sizes: Sizes,
        num_tokens: int,
        *,
        seed: int = 0,
        is_tiled: bool = False,
        floor: float | None = None,
    ) -> Net:
        key_heads, value_heads, key_dim, value_dim, width = sizes
        rng = np.random.default_rng([seed, *sizes])
        channels, values = 2 * key_heads * key_dim + value_heads * value_dim, value_heads * value_dim

        def normal(*shape: int) -> Floats:
            return rng.standard_normal(shape, np.float32)

        return cls(
            sizes,
            normal(num_tokens, channels),
            normal(num_tokens, values),
            normal(num_tokens, value_heads),
            3 * normal(num_tokens, value_heads * (1 if floor is None else key_dim)),
            normal(width, channels) * np.float32(width**-0.5),
            -np.exp(normal(value_heads)),
            normal(value_heads * (1 if floor is None else key_dim)),
            1 + 0.3 * normal(value_dim),
            is_tiled,
            floor,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.qkv)

    def state(self, num_slots: int = 1) -> native.RecurrentState:
        return native.RecurrentState(num_slots, [native.StateShape.delta_net(self.sizes)])

    def run(
        self,
        state: native.RecurrentState,
        tokens: slice = slice(None),
        *,
        runs: Sequence[tuple[int, int, int]] | None = None,
        threads: int = 1,
    ) -> Floats:
        """Return the output for these tokens; by default they are one run in slot 0."""
        qkv, b, a = self.qkv[tokens].copy(), self.b[tokens].copy(), self.a[tokens].copy()
        out = np.full((len(qkv), self.z.shape[1]), np.nan, np.float32)
        runtime = native.Runtime(threads, instruction_set=self.instruction_set)
        _native_testing.gated_delta(
            runtime,
            state,
            0,
            qkv,
            self.z[tokens].copy(),
            b,
            a,
            np.array(runs or [(0, len(qkv), 0)], np.int64),
            conv=self.conv if self.floor is None else self.separate_conv,
            rate=self.rate,
            dt_bias=self.dt_bias,
            norm=self.norm,
            eps=EPS,
            sizes=self.sizes,
            is_tiled=self.is_tiled,
            out=out,
            floor=self.floor,
        )
        runtime.close()
        return out

    @property
    def separate_conv(self) -> Floats:
        key_heads, _, key_dim, _, _ = self.sizes
        parts = np.split(self.conv, [key_heads * key_dim, 2 * key_heads * key_dim], axis=1)
        return np.concatenate([part.reshape(1, -1) for part in parts], axis=1)

    def expected(self) -> NDArray[np.float64]:
        """Compute the formula of arXiv:2412.06464 or 2510.26692, with convolution, norms and gates, in float64."""
        key_heads, value_heads, key_dim, value_dim, width = self.sizes
        x = np.vstack([np.zeros((width - 1, self.qkv.shape[1])), self.qkv.astype(np.float64)])
        mixed = silu(sum(self.conv[j].astype(np.float64) * x[j : j + self.num_tokens] for j in range(width)))
        keys = key_heads * key_dim
        q, k = (mixed[:, at : at + keys].reshape(-1, key_heads, key_dim) for at in (0, keys))
        v = mixed[:, 2 * keys :].reshape(-1, value_heads, value_dim)
        q = unit(q) / np.sqrt(key_dim)
        k = unit(k)
        raw = (self.a + self.dt_bias.astype(np.float64)).reshape(self.num_tokens, value_heads, -1)
        rate = self.rate.astype(np.float64)[:, None]
        decay = np.exp(
            self.floor / (1 + np.exp(rate * raw)) if self.floor else rate * np.logaddexp(0, raw)
        )  # [tokens, heads, 1 or key_dim]
        beta = 1 / (1 + np.exp(-self.b.astype(np.float64)))
        out = np.empty((self.num_tokens, value_heads, value_dim))
        for head in range(value_heads):
            key_head = head % key_heads if self.is_tiled else head // (value_heads // key_heads)
            state = np.zeros((key_dim, value_dim))
            for t in range(self.num_tokens):
                state = state * decay[t, head][:, None]
                change = beta[t, head] * (v[t, head] - k[t, key_head] @ state)
                state = state + np.outer(k[t, key_head], change)
                out[t, head] = q[t, key_head] @ state
        out /= np.sqrt((out**2).mean(axis=-1, keepdims=True) + EPS)
        z = self.z.reshape(out.shape).astype(np.float64)
        out = self.norm * out * (silu(z) if self.floor is None else 1 / (1 + np.exp(-z)))
        return out.reshape(self.num_tokens, -1)


def silu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / (1 + np.exp(-x))


def unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_output_matches_the_formula(sizes: Sizes) -> None:
    net = Net.random(sizes, 23)
    # The norm scales an output near zero up, with its rounding error: hence the loose bound here, and the tight median.
    np.testing.assert_allclose(net.run(net.state()), net.expected(), rtol=2e-3, atol=2e-4)
    assert np.median(abs(net.run(net.state()) - net.expected())) < 2e-6


def test_tiled_value_heads_take_key_heads_in_turn() -> None:
    net = Net.random((2, 4, 17, 33, 4), 12, is_tiled=True)
    np.testing.assert_allclose(net.run(net.state()), net.expected(), rtol=2e-3, atol=2e-4)
    grouped = Net.random((2, 4, 17, 33, 4), 12)
    assert not np.allclose(grouped.run(grouped.state()), net.expected(), atol=1e-2)


KIMI_SIZES: list[Sizes] = [(1, 1, 1, 1, 1), (2, 2, 7, 9, 2), (3, 3, 17, 33, 4), (1, 1, 128, 128, 4)]


@pytest.mark.parametrize("floor", [0.0, -5.0])
@pytest.mark.parametrize("sizes", KIMI_SIZES, ids=str)
def test_decays_of_key_dimensions_match_the_formula(sizes: Sizes, floor: float) -> None:
    net = Net.random(sizes, 23, floor=floor)
    np.testing.assert_allclose(net.run(net.state()), net.expected(), rtol=2e-3, atol=2e-4)
    assert np.median(abs(net.run(net.state()) - net.expected())) < 2e-6


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_and_threads_change_no_bit_of_decays_of_key_dimensions(chunk: int) -> None:
    net = Net.random((3, 3, 17, 33, 4), 19, floor=-5.0)
    whole = net.run(net.state())
    state = net.state()
    parts = [net.run(state, slice(at, at + chunk), threads=3) for at in range(0, 19, chunk)]
    np.testing.assert_array_equal(np.vstack(parts), whole)
    assert state.position(0) == 19


def test_a_restarted_slot_begins_with_empty_windows_of_separate_convolutions() -> None:
    net = Net.random((2, 2, 17, 33, 4), 9, floor=0.0)
    fresh = net.run(net.state())
    state = net.state()
    net.run(state)
    state.restart(0)
    np.testing.assert_array_equal(net.run(state), fresh)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_and_threads_change_no_bit(sizes: Sizes, chunk: int) -> None:
    net = Net.random(sizes, 19)
    whole = net.run(net.state())
    state = net.state()
    parts = [net.run(state, slice(at, at + chunk), threads=3) for at in range(0, 19, chunk)]
    np.testing.assert_array_equal(np.vstack(parts), whole)
    assert state.position(0) == 19


def test_sequences_of_a_batch_do_not_affect_each_other() -> None:
    net = Net.random((2, 4, 17, 33, 4), 19)
    alone = [net.run(net.state(), slice(begin, end)) for begin, end in ((0, 7), (7, 8), (8, 19))]
    state = net.state(num_slots=4)
    together = net.run(state, runs=[(0, 7, 3), (7, 8, 0), (8, 19, 2)], threads=2)
    np.testing.assert_array_equal(together, np.vstack(alone))
    assert [state.position(slot) for slot in range(4)] == [1, 0, 11, 7]


def test_a_restored_state_continues_with_the_same_bits() -> None:
    net = Net.random((2, 4, 17, 33, 4), 19)
    state = net.state(num_slots=2)
    net.run(state, slice(0, 8))
    saved = np.empty(state.slot_floats, np.float32)
    state.copy_out(0, saved)
    first = net.run(state, slice(8, 19))
    for slot in (0, 1):  # restored in place, and in another slot
        state.copy_in(slot, saved, 8)
        assert state.position(slot) == 8
        np.testing.assert_array_equal(net.run(state, slice(8, 19), runs=[(0, 11, slot)]), first)
    state.restart(0)
    assert not np.array_equal(net.run(state, slice(8, 19)), first)


def test_a_copied_slot_continues_from_the_same_position_with_the_same_bits() -> None:
    net = Net.random((2, 4, 17, 33, 4), 19)
    state = net.state(num_slots=3)
    net.run(state, slice(0, 8), runs=[(0, 8, 2)])
    state.copy_slot(2, 0)
    state.copy_slot(2, 2)
    assert [state.position(slot) for slot in range(3)] == [8, 0, 8]
    first = net.run(state, slice(8, 19), runs=[(0, 11, 2)])
    np.testing.assert_array_equal(net.run(state, slice(8, 19), runs=[(0, 11, 0)]), first)
    with pytest.raises(ValueError, match="slot is 3, expected 0 to 2"):
        state.copy_slot(0, 3)


def test_a_restarted_slot_keeps_nothing_of_the_previous_sequence() -> None:
    net = Net.random((1, 2, 16, 16, 4), 9)
    fresh = net.run(net.state())
    state = net.state()
    net.run(Net.random(net.sizes, 9, seed=1).state())
    net.run(state)
    state.restart(0)
    np.testing.assert_array_equal(net.run(state), fresh)


def test_extreme_decays_stay_finite() -> None:
    net = Net.random((1, 1, 16, 16, 2), 6)
    net.a[:, 0] = [-200, -30, 19.9, 20.1, 80, 3e4]  # from a softplus of 0 to a decay of 0
    assert np.isfinite(net.run(net.state())).all()


def test_sizes_that_do_not_fit_are_refused() -> None:
    delta_net = native.StateShape.delta_net
    with pytest.raises(ValueError, match="value heads modulo key heads is 1, expected 0"):
        delta_net((2, 3, 4, 4, 4))
    with pytest.raises(ValueError, match="size of 0, expected 1 or more"):
        delta_net((1, 1, 0, 4, 4))
    with pytest.raises(ValueError, match="size of 0, expected 1 or more"):
        native.RecurrentState(0, [delta_net((1, 1, 4, 4, 4))])
    with pytest.raises(ValueError, match="more than 2\\^62 bytes"):
        native.recurrent_state_bytes(1 << 60, [delta_net((16, 32, 128, 128, 4))])
    shapes = [delta_net((16, 32, 128, 128, 4)), delta_net((1, 2, 3, 5, 1))]
    assert [shape.window_floats for shape in shapes] == [3 * 8192, 0]
    assert [shape.matrix_floats for shape in shapes] == [32 * 128 * 128, 2 * 3 * 5]
    assert native.recurrent_state_bytes(2, shapes) == 2 * 4 * (3 * 8192 + 32 * 128 * 128 + 2 * 3 * 5)
    net = Net.random((1, 1, 4, 4, 2), 3)
    with pytest.raises(ValueError, match="slot 0 has two runs"):
        net.run(net.state(), runs=[(0, 1, 0), (1, 3, 0)])
    with pytest.raises(ValueError, match="slot is 1, expected 0 to 0"):
        net.run(net.state(), runs=[(0, 3, 1)])
