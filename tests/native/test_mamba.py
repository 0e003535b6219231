"""Short convolutions and Mamba-2 agree with their formulas in float64, and a token's bits depend on no other token.

Every test runs once per instruction set of this CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native as native
from tests.native import _native_testing

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Sizes = tuple[int, int, int, int, int]
EPS = 1e-6

# Heads, head and state dimensions, groups, positions of the convolution: sizes around one vector (8, 16) and four
# (32, 64), and channels around a block of the convolution (128).
SIZES: list[Sizes] = [
    (1, 1, 1, 1, 1),
    (2, 7, 9, 2, 2),
    (3, 15, 16, 1, 4),
    (4, 33, 17, 2, 4),
    (6, 64, 8, 3, 3),
    (2, 70, 33, 1, 4),
    (8, 64, 128, 4, 4),
]


@pytest.fixture(params=native.instruction_sets())
def runtimes(request: pytest.FixtureRequest) -> Iterator[dict[int, native.Runtime]]:
    """A runtime by its number of threads."""
    made = {threads: native.Runtime(threads, instruction_set=request.param) for threads in (1, 3)}
    yield made
    for runtime in made.values():
        runtime.close()


@dataclass(frozen=True)
class Mixer:
    """Random weights of a Mamba-2 mixer, and its projections of one sequence."""

    sizes: Sizes
    projected: Floats
    conv: Floats
    conv_bias: Floats | None
    rate: Floats
    dt_bias: Floats
    skip: Floats
    norm: Floats
    dt_limit: tuple[float, float] = (0.0, float("inf"))

    @classmethod
    def random(
        cls,
        sizes: Sizes,
        num_tokens: int,
        *,
        has_bias: bool = True,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
    ) -> Mixer:
        heads, head_dim, state_dim, groups, width = sizes
        rng = np.random.default_rng(sizes)
        channels = heads * head_dim
        mixed = channels + 2 * groups * state_dim

        def normal(*shape: int) -> Floats:
            return rng.standard_normal(shape, np.float32)

        return cls(
            sizes,
            normal(num_tokens, channels + mixed + heads),
            normal(width, mixed) * np.float32(width**-0.5),
            normal(mixed) if has_bias else None,
            -np.exp(normal(heads)),
            normal(heads),
            normal(heads),
            1 + 0.3 * normal(channels),
            dt_limit,
        )

    def state(self, num_slots: int = 1) -> native.RecurrentState:
        return native.RecurrentState(num_slots, [native.StateShape.mamba(self.sizes)])

    def run(
        self,
        runtime: native.Runtime,
        state: native.RecurrentState,
        tokens: slice = slice(None),
        runs: Sequence[tuple[int, int, int]] | None = None,
    ) -> Floats:
        projected = self.projected[tokens].copy()
        out = np.full((len(projected), len(self.norm)), np.nan, np.float32)
        _native_testing.mamba_recurrence(
            runtime,
            state,
            0,
            projected,
            np.array(runs or [(0, len(projected), 0)], np.int64),
            conv=self.conv,
            conv_bias=self.conv_bias,
            rate=self.rate,
            dt_bias=self.dt_bias,
            skip=self.skip,
            norm=self.norm,
            eps=EPS,
            sizes=self.sizes,
            dt_limit=self.dt_limit,
            out=out,
        )
        return out

    def expected(self) -> Doubles:
        """Compute arXiv:2405.21060 with its convolution, gate and norm within groups, in float64."""
        heads, head_dim, state_dim, groups, _ = self.sizes
        channels, tokens = heads * head_dim, len(self.projected)
        z, mixed, dt = np.split(
            self.projected.astype(np.float64), [channels, channels + self.conv.shape[1]], axis=1
        )
        mixed = silu(convolve(mixed, self.conv, self.conv_bias))
        x, b, c = np.split(mixed, [channels, channels + groups * state_dim], axis=1)
        x = x.reshape(tokens, heads, head_dim)
        b, c = (part.reshape(tokens, groups, state_dim) for part in (b, c))
        dt = np.clip(np.logaddexp(0, dt + self.dt_bias), *self.dt_limit)
        decay = np.exp(self.rate.astype(np.float64) * dt)
        out = np.empty((tokens, heads, head_dim))
        for head in range(heads):
            group = head // (heads // groups)
            state = np.zeros((head_dim, state_dim))
            for t in range(tokens):
                state = decay[t, head] * state + dt[t, head] * np.outer(x[t, head], b[t, group])
                out[t, head] = state @ c[t, group] + self.skip[head] * x[t, head]
        gated = (out.reshape(tokens, channels) * silu(z)).reshape(tokens, groups, -1)
        gated /= np.sqrt((gated**2).mean(axis=-1, keepdims=True) + EPS)
        return gated.reshape(tokens, channels) * self.norm


def convolve(x: Doubles, weights: Floats, bias: Floats | None) -> Doubles:
    """Return the causal convolution of each channel."""
    width = len(weights)
    padded = np.vstack([np.zeros((width - 1, x.shape[1])), x])
    total = sum(weights[j].astype(np.float64) * padded[j : j + len(x)] for j in range(width))
    return total + (0 if bias is None else bias)


def silu(x: Doubles) -> Doubles:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_mamba_matches_the_formula(runtimes: dict[int, native.Runtime], sizes: Sizes) -> None:
    for mixer in (
        Mixer.random(sizes, 23),
        Mixer.random(sizes, 23, has_bias=False, dt_limit=(0.2, 1.5)),
    ):
        # The norm scales an output near zero up, with its rounding error: hence the loose bound, and the tight median.
        found, expected = mixer.run(runtimes[1], mixer.state()), mixer.expected()
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)
        assert np.median(abs(found - expected)) < 2e-6


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_and_threads_change_no_bit(
    runtimes: dict[int, native.Runtime], sizes: Sizes, chunk: int
) -> None:
    mixer = Mixer.random(sizes, 19)
    whole = mixer.run(runtimes[1], mixer.state())
    state = mixer.state()
    parts = [mixer.run(runtimes[3], state, slice(at, at + chunk)) for at in range(0, 19, chunk)]
    np.testing.assert_array_equal(np.vstack(parts), whole)
    assert state.position(0) == 19


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_four_thousand_tokens_have_the_same_bits_in_chunks(
    runtimes: dict[int, native.Runtime], chunk: int
) -> None:
    mixer = Mixer.random((2, 9, 7, 1, 4), 4096)
    whole_state, state = mixer.state(), mixer.state()
    whole = mixer.run(runtimes[1], whole_state)
    parts = [mixer.run(runtimes[1], state, slice(at, at + chunk)) for at in range(0, 4096, chunk)]
    np.testing.assert_array_equal(np.vstack(parts), whole)
    np.testing.assert_array_equal(saved(state), saved(whole_state))


def saved(state: native.RecurrentState, slot: int = 0) -> Floats:
    found = np.empty(state.slot_floats, np.float32)
    state.copy_out(slot, found)
    return found


def test_sequences_of_a_batch_do_not_affect_each_other(runtimes: dict[int, native.Runtime]) -> None:
    mixer = Mixer.random((4, 33, 17, 2, 4), 19)
    alone = [
        mixer.run(runtimes[1], mixer.state(), slice(begin, end)) for begin, end in ((0, 7), (7, 8), (8, 19))
    ]
    state = mixer.state(num_slots=4)
    together = mixer.run(runtimes[3], state, runs=[(0, 7, 3), (7, 8, 0), (8, 19, 2)])
    np.testing.assert_array_equal(together, np.vstack(alone))
    assert [state.position(slot) for slot in range(4)] == [1, 0, 11, 7]


def test_a_restored_state_continues_with_the_same_bits(runtimes: dict[int, native.Runtime]) -> None:
    mixer = Mixer.random((4, 33, 17, 2, 4), 19)
    state = mixer.state(num_slots=2)
    mixer.run(runtimes[1], state, slice(0, 8))
    kept = saved(state)
    first = mixer.run(runtimes[1], state, slice(8, 19))
    for slot in (0, 1):
        state.copy_in(slot, kept, 8)
        np.testing.assert_array_equal(mixer.run(runtimes[1], state, slice(8, 19), [(0, 11, slot)]), first)
    state.restart(0)
    fresh = mixer.run(runtimes[1], mixer.state(), slice(8, 19))
    np.testing.assert_array_equal(mixer.run(runtimes[1], state, slice(8, 19)), fresh)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("channels", "width"), [(1, 1), (7, 3), (64, 3), (130, 3), (257, 4)])
def test_gated_convolutions_match_the_formula_in_every_chunk(
    runtimes: dict[int, native.Runtime], channels: int, width: int, has_bias: bool
) -> None:
    rng = np.random.default_rng([channels, width])
    gate_in, gate_out, x = rng.standard_normal((3, 23, channels), np.float32)
    weights = rng.standard_normal((width, channels), np.float32)
    bias = rng.standard_normal(channels, np.float32) if has_bias else None

    def run(runtime: native.Runtime, chunk: int) -> Floats:
        # A layer with matrices lies before it: each layer has its own place.
        shapes = [native.StateShape.mamba((1, 3, 5, 1, 2)), native.StateShape.short_conv(channels, width)]
        state = native.RecurrentState(1, shapes)
        out = np.full(x.shape, np.nan, np.float32)
        for at in range(0, 23, chunk):
            here = slice(at, at + chunk)
            runs = np.array([(0, len(x[here]), 0)], np.int64)
            _native_testing.causal_conv(
                runtime, state, 1, x[here], gate_in[here], gate_out[here], runs,
                weights=weights, bias=bias, out=out[here],
            )  # fmt: skip
        return out

    doubles = [part.astype(np.float64) for part in (gate_in, gate_out, x)]
    expected = doubles[1] * convolve(doubles[0] * doubles[2], weights, bias)
    whole = run(runtimes[1], 23)
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-5)
    for chunk in (1, 2, 5):
        np.testing.assert_array_equal(run(runtimes[3], chunk), whole)


def test_a_convolution_alone_keeps_no_matrices() -> None:
    shape = native.StateShape.short_conv(2048, 3)
    assert (shape.window_floats, shape.matrix_floats) == (2 * 2048, 0)
    shape = native.StateShape.mamba((64, 64, 128, 8, 4))
    assert (shape.window_floats, shape.matrix_floats) == (3 * (4096 + 2048), 64 * 64 * 128)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="heads modulo groups is 1, expected 0"):
        native.StateShape.mamba((3, 4, 4, 2, 4))
    with pytest.raises(ValueError, match="size of 0, expected 1 or more"):
        native.StateShape.mamba((3, 4, 0, 1, 4))
    with pytest.raises(ValueError, match="size of 0, expected 1 or more"):
        native.StateShape.short_conv(16, 0)
    with pytest.raises(ValueError, match="more than 2\\^62 bytes"):
        native.StateShape.mamba((1 << 40, 1 << 30, 8, 1, 4))
