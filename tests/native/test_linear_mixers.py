"""Kimi Delta Attention and lightning attention, in a stack of one layer, agree with numpy in float64 and in any chunks.

The layer's feed-forward network is zero, so that the hidden state after it is the embedding plus what the mixer adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native as native

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

HIDDEN, VOCABULARY, LENGTH = 20, 60, 45
HEADS, PAIRS, WIDTH, EPS = 3, 2, 4, 1e-5
FREQUENCY = 0.3 ** np.arange(PAIRS)


def normal(*shape: int, seed: int, scale: float = 1.0) -> Floats:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32) * np.float32(scale)


def matrix_of(weights: Floats) -> native.Matrix:
    return native.Matrix(np.ascontiguousarray(weights).view(np.uint8).reshape(-1), 0, "f32", *weights.shape)


def sigmoid(x: Doubles) -> Doubles:
    return 1 / (1 + np.exp(-x))


def rms(x: Doubles, weight: Floats, eps: float = EPS) -> Doubles:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def unit(x: Doubles) -> Doubles:
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + 1e-6)


def turned(x: Doubles) -> Doubles:
    """Rotate the first dimensions of x [tokens, heads, dim], in halves."""
    angle = np.arange(len(x))[:, None, None] * FREQUENCY
    first, second = x[..., :PAIRS], x[..., PAIRS : 2 * PAIRS]
    sides = (
        first * np.cos(angle) - second * np.sin(angle),
        second * np.cos(angle) + first * np.sin(angle),
    )
    return np.concatenate([*sides, x[..., 2 * PAIRS :]], axis=-1)


@dataclass
class KimiDelta:
    floor: float = 0.0
    decay_rank: int = 0
    gate_rank: int = 0
    dim: int = 9

    def __post_init__(self) -> None:
        channels = HEADS * self.dim
        self.sizes = (HEADS, HEADS, self.dim, self.dim, WIDTH)
        rows = (channels, channels, channels, HEADS)
        self.inputs = [normal(n, HIDDEN, seed=i, scale=0.4) for i, n in enumerate(rows)]
        self.factors = []
        for seed, rank in ((4, self.decay_rank), (6, self.gate_rank)):
            down = normal(rank, HIDDEN, seed=seed, scale=0.4) if rank else None
            self.factors.append((down, normal(channels, rank or HIDDEN, seed=seed + 1, scale=0.5)))
        self.output = normal(HIDDEN, channels, seed=8, scale=0.3)
        self.conv = [normal(WIDTH, n, seed=9 + i, scale=0.5) for i, n in enumerate(rows[:3])]
        self.rate, self.dt_bias = -np.exp(normal(HEADS, seed=12)), normal(channels, seed=13)
        self.norm = 1 + normal(self.dim, seed=14, scale=0.2)

    def mixer(self) -> native.Mixer:
        (decay_down, decay), (gate_down, gate) = self.factors
        return native.kimi_delta_attention(
            *(matrix_of(matrix) for matrix in (*self.inputs, decay, gate, self.output)),
            decay_down=None if decay_down is None else matrix_of(decay_down),
            gate_down=None if gate_down is None else matrix_of(gate_down),
            conv=(self.conv[0], self.conv[1], self.conv[2]),
            rate=self.rate,
            dt_bias=self.dt_bias,
            norm=self.norm,
            floor=self.floor,
            sizes=self.sizes,
            state_layer=0,
        )

    def add_sizes(self, sizes: native.StackSizes) -> None:
        sizes.add_kimi_delta(self.sizes, self.decay_rank + self.gate_rank)

    def expected(self, x: Doubles) -> Doubles:
        def convolved(part: int) -> Doubles:
            y = np.vstack([np.zeros((WIDTH - 1, len(self.inputs[part]))), x @ self.inputs[part].T])
            mixed = np.sum([self.conv[part][j] * y[j : j + len(x)] for j in range(WIDTH)], axis=0)
            return (mixed * sigmoid(mixed)).reshape(len(x), HEADS, -1)

        def projected(down: Floats | None, matrix: Floats) -> Doubles:
            y = x if down is None else x @ down.T
            return (y @ matrix.T).reshape(len(x), HEADS, -1)

        q, k, v = unit(convolved(0)) / np.sqrt(self.dim), unit(convolved(1)), convolved(2)
        raw = projected(*self.factors[0]) + self.dt_bias.reshape(HEADS, -1)
        rate, beta = self.rate[:, None].astype(np.float64), sigmoid(x @ self.inputs[3].T)
        decay = np.exp(self.floor * sigmoid(-rate * raw) if self.floor else rate * np.logaddexp(0, raw))
        out = np.empty_like(v)
        for head in range(HEADS):
            state = np.zeros((self.dim, self.dim))
            for t in range(len(x)):
                state = decay[t, head][:, None] * state
                change = beta[t, head] * (v[t, head] - k[t, head] @ state)
                state = state + np.outer(k[t, head], change)
                out[t, head] = q[t, head] @ state
        out = rms(out, self.norm) * sigmoid(projected(*self.factors[1]))
        return out.reshape(len(x), -1) @ self.output.T


@dataclass
class Lightning:
    num_groups: int = 1
    has_norms: bool = False
    has_silu: bool = False
    is_joined: bool = False  # the rows of q, k and v of each head in turn are one matrix, and nothing rotates
    dim: int = 10

    def __post_init__(self) -> None:
        rows = HEADS * self.dim
        self.sizes = (HEADS, HEADS, self.dim, self.dim, 1)
        self.inputs = [normal(rows, HIDDEN, seed=i, scale=0.4) for i in range(4)]
        self.output = normal(HIDDEN, rows, seed=4, scale=0.3)
        self.norms = [1 + normal(self.dim, seed=seed, scale=0.2) for seed in (5, 6)]
        self.norm = 1 + normal(rows, seed=7, scale=0.2)
        self.decay = np.array([0.5, 0.9, 0.99], np.float32)

    def mixer(self) -> native.Mixer:
        query_norm, key_norm = self.norms if self.has_norms else (None, None)
        inputs = [matrix_of(matrix) for matrix in self.inputs]
        if self.is_joined:
            by_head = np.stack(
                [matrix.reshape(HEADS, self.dim, HIDDEN) for matrix in self.inputs[:3]], axis=1
            )
            inputs[:3] = [matrix_of(by_head.reshape(-1, HIDDEN)), None, None]
        return native.lightning_attention(
            *inputs,
            matrix_of(self.output),
            num_heads=HEADS,
            has_silu=self.has_silu,
            query_norm=query_norm,
            key_norm=key_norm,
            decay=self.decay,
            norm=self.norm,
            norm_eps=0.03,
            num_groups=self.num_groups,
            scale=0.3,
            state_layer=0,
        )

    def add_sizes(self, sizes: native.StackSizes) -> None:
        sizes.add_delta_net(self.sizes)

    def expected(self, x: Doubles) -> Doubles:
        q, k, v = ((x @ matrix.T).reshape(len(x), HEADS, -1) for matrix in self.inputs[:3])
        if self.has_silu:
            q, k, v = (y * sigmoid(y) for y in (q, k, v))
        if self.has_norms:
            q, k = rms(q, self.norms[0]), rms(k, self.norms[1])
        if not self.is_joined:
            q, k = turned(q), turned(k)
        out = np.empty_like(v)
        for head in range(HEADS):
            state = np.zeros((self.dim, self.dim))
            for t in range(len(x)):
                state = float(self.decay[head]) * state + np.outer(k[t, head], v[t, head])
                out[t, head] = 0.3 * q[t, head] @ state
        grouped = out.reshape(len(x), self.num_groups, -1)
        out = rms(grouped, self.norm.reshape(self.num_groups, -1), eps=0.03).reshape(len(x), -1)
        return out * sigmoid(x @ self.inputs[3].T) @ self.output.T


def run(
    runtime: native.Runtime,
    case: KimiDelta | Lightning,
    chunk: int,
    length: int = LENGTH,
    state_sizes: tuple[int, int, int, int, int] | None = None,
) -> tuple[Floats, Floats]:
    """Run `length` tokens, `chunk` at a time; return their embeddings, and their hidden states after the layer."""
    embedding, ones, zeros = (
        normal(VOCABULARY, HIDDEN, seed=20),
        np.ones(HIDDEN, np.float32),
        matrix_of(np.zeros((HIDDEN, HIDDEN), np.float32)),
    )
    is_joined = isinstance(case, Lightning) and case.is_joined
    layer = native.Layer(
        ones,
        case.mixer(),
        ones,
        native.dense_ffn(zeros, zeros, zeros),
        rotary=None if is_joined else 0,
    )
    stack = native.Stack(
        runtime,
        native.KvCache([native.KvShape.none()], 1, 16, "f32"),
        embedding=matrix_of(embedding),
        head=matrix_of(embedding),
        final_norm=ones,
        norm_eps=EPS,
        rotaries=[native.Rotary(FREQUENCY, 1.0)],
        activation=("silu", 0.0, 0.0),
        layers=[layer],
        max_tokens=min(length, chunk),
        recurrent=native.RecurrentState(1, [native.StateShape.delta_net(state_sizes or case.sizes)]),
    )
    sizes = native.StackSizes(HIDDEN, PAIRS)
    case.add_sizes(sizes)
    sizes.add_dense(HIDDEN)
    assert stack.sizes == sizes
    positions = np.arange(length, dtype=np.int32)
    hidden = np.empty((length, HIDDEN), np.float32)
    num_blocks = -(-length // 16)
    table = np.zeros((1, num_blocks), np.int32)
    for begin in range(0, length, chunk):
        order = positions[begin : begin + chunk]
        step: dict[str, Any] = {"state_slots": np.zeros(1, np.int32)}
        stack.begin(
            order % VOCABULARY,
            np.zeros_like(order),
            np.zeros(len(order), np.int64),
            np.zeros(len(order), np.bool_),
            table,
            order,
            np.empty(0, np.int64),
            np.empty((0, VOCABULARY), np.float32),
            taps=[(0, hidden[begin : begin + chunk])],
            **step,
        )
        assert stack.advance() is None
    return embedding[positions % VOCABULARY], hidden


CASES: dict[str, KimiDelta | Lightning] = {
    "kimi": KimiDelta(),
    "kimi_low_ranks": KimiDelta(decay_rank=5, gate_rank=7),
    "kimi_floor": KimiDelta(floor=-5.0, dim=33),
    "kimi_floor_low_rank": KimiDelta(floor=-2.0, decay_rank=40, dim=8),
    "lightning": Lightning(),
    "lightning_norms": Lightning(has_norms=True, dim=33),
    "lightning_groups": Lightning(num_groups=3, has_norms=True),
    "lightning_silu": Lightning(has_norms=True, has_silu=True, dim=16),
    "lightning_joined": Lightning(has_silu=True, is_joined=True, dim=9),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_a_mixer_meets_numpy_in_every_chunk(name: str, instruction_set: str) -> None:
    case, runtime = CASES[name], native.Runtime(2, instruction_set=instruction_set)
    embedding, together = run(runtime, case, LENGTH)
    added = case.expected(rms(embedding.astype(np.float64), np.ones(HIDDEN, np.float32)))
    error = np.abs(together - embedding - added).max() / np.abs(added).max()
    assert error < (2e-4 if instruction_set == "amx" else 5e-6)  # tiles keep 16 bits of a number
    for chunk in (1, 7):
        assert np.array_equal(run(runtime, case, chunk)[1], together)
    runtime.close()


@pytest.mark.parametrize("name", ["kimi_floor_low_rank", "lightning_groups", "lightning_joined"])
def test_4096_tokens_have_the_same_bits_in_every_chunk(name: str) -> None:
    runtime = native.Runtime(2)
    together = run(runtime, CASES[name], 4096, 4096)[1]
    assert np.isfinite(together).all()
    for chunk in (1, 7, 256):
        np.testing.assert_array_equal(run(runtime, CASES[name], chunk, 4096)[1], together)
    runtime.close()


def test_sizes_that_do_not_fit_are_refused() -> None:
    runtime = native.Runtime(1)
    with pytest.raises(ValueError, match=r"floor is 1\.0.*, expected 0 or less"):
        KimiDelta(floor=1.0).mixer()
    with pytest.raises(ValueError, match="rows of gate modulo num_groups is 2, expected 0"):
        Lightning(num_groups=7).mixer()
    with pytest.raises(ValueError, match="q and k in one matrix have no norms"):
        Lightning(is_joined=True, has_norms=True).mixer()
    with pytest.raises(ValueError, match="the mixer and the recurrent state have different sizes"):
        run(runtime, KimiDelta(), LENGTH, state_sizes=(HEADS, HEADS, 9, 13, WIDTH))
    runtime.close()
