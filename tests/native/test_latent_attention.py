"""Multi-head latent attention: absorbed equals plain, and a token alone equals itself in a chunk, on any threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native as native
from argosy.config import Format, KvDtype
from tests.native import _native_testing
from tests.native.kv_formats import rounded

Floats = NDArray[np.float32]
SCALE = 0.21
LENGTH = 600  # three sections of 256 positions, the last one partial


@pytest.fixture(params=native.instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Case, "instruction_set", request.param)


@dataclass(frozen=True)
class Sizes:
    heads: int
    nope: int
    rope: int
    rank: int
    value: int


SMALL = Sizes(heads=3, nope=5, rope=6, rank=13, value=7)
ODD_HEADS = Sizes(heads=20, nope=24, rope=8, rank=40, value=16)
WIDE = Sizes(heads=48, nope=32, rope=16, rank=64, value=32)


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def matrix_of(format: Format, weights: Floats) -> tuple[native.Matrix, Floats]:
    """Return the matrix, and the weights that it holds."""
    rows, cols = weights.shape
    data = np.empty(native.matrix_bytes(format, rows, cols), np.uint8)
    native.quantize(format, weights, data)
    return native.Matrix(data, 0, format, rows, cols), native.dequantize(format, data, rows, cols)


class Case:
    """Two sequences of LENGTH positions in blocks in random order, with their weights and cache."""

    instruction_set: ClassVar[str | None] = None  # set for each test

    def __init__(
        self,
        sizes: Sizes,
        dtype: KvDtype,
        *,
        format: Format = "f32",
        block_tokens: int = 16,
    ) -> None:
        self.sizes = s = sizes
        self.q = normal(2, LENGTH, s.heads, s.nope + s.rope)
        self.vectors = normal(2, LENGTH, s.rank + s.rope, seed=1)
        key_up = normal(s.heads * s.rank, s.nope, seed=2) / np.float32(s.rank**0.5)
        value_up = normal(s.heads * s.value, s.rank, seed=3) / np.float32(s.rank**0.5)
        (self.key_up, key_weights), (self.value_up, value_weights) = (
            matrix_of(format, weights) for weights in (key_up, value_up)
        )
        self.key_weights = key_weights.reshape(s.heads, s.rank, s.nope).astype(np.float64)
        self.value_weights = value_weights.reshape(s.heads, s.value, s.rank).astype(np.float64)

        needed = -(-LENGTH // block_tokens)
        num_blocks = 2 * needed + 3
        self.kv = native.KvCache(
            [native.KvShape.none(), native.KvShape.latent(s.rank + s.rope)], num_blocks, block_tokens, dtype
        )
        order = np.random.default_rng(0).permutation(num_blocks)
        self.table = order[: 2 * needed].reshape(2, needed).astype(np.int32)
        # The content of other sequences' blocks and beyond the end must not matter.
        everything = np.arange(num_blocks * block_tokens, dtype=np.int64)
        runtime = native.Runtime(1, instruction_set=self.instruction_set)
        garbage = np.full((len(everything), s.rank + s.rope), np.nan, np.float32)
        _native_testing.latent_write(runtime, self.kv, 1, garbage, everything)
        position = np.arange(LENGTH)
        for blocks, vectors in zip(self.table, self.vectors, strict=True):
            slots = blocks[position // block_tokens].astype(np.int64) * block_tokens + position % block_tokens
            _native_testing.latent_write(runtime, self.kv, 1, vectors, slots)
        runtime.close()
        self.vectors = rounded(self.vectors, dtype)
        self._of_sequence: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    def attend(
        self, sequence: list[int], position: list[int], *, until: list[int] | None = None, threads: int = 1
    ) -> Floats:
        runtime = native.Runtime(threads, instruction_set=self.instruction_set)
        out = np.full((len(sequence), self.sizes.heads * self.sizes.value), np.nan, np.float32)
        _native_testing.latent_attention(
            runtime,
            self.kv,
            1,
            self.q[sequence, position],
            self.key_up,
            self.value_up,
            self.table,
            np.array(sequence, np.int32),
            np.array(position, np.int32),
            SCALE,
            out,
            None if until is None else np.array(until, np.int32),
        )
        s = self.sizes
        sizes = native.StackSizes(1, 0)
        sizes.add_latent_attention(s.heads, s.nope, s.rope, s.rank, s.value, 0)
        assert runtime.scratch_bytes <= sizes.scratch_bytes(len(sequence), threads)
        runtime.close()
        return out

    def expected(self, sequence: int, position: int, until: int | None = None) -> NDArray[np.float64]:
        """Compute the plain form, which expands the vectors to keys and values for every head."""
        s, until = self.sizes, until or position + 1
        shared = self.vectors[sequence, :until, s.rank :].astype(np.float64)
        q = self.q[sequence, position].astype(np.float64)
        keys, values = (every[:, :until] for every in self._expanded(sequence))
        scores = SCALE * (np.einsum("hpn,hn->hp", keys, q[:, : s.nope]) + q[:, s.nope :] @ shared.T)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        return np.einsum("hp,hpv->hv", weights, values).reshape(-1)

    def _expanded(self, sequence: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The keys [heads, positions, nope] and values of a whole sequence, which is expanded once."""
        if sequence not in self._of_sequence:
            latents = self.vectors[sequence, :, : self.sizes.rank].astype(np.float64)
            self._of_sequence[sequence] = (
                np.einsum("pr,hrn->hpn", latents, self.key_weights, optimize=True),
                np.einsum("pr,hvr->hpv", latents, self.value_weights, optimize=True),
            )
        return self._of_sequence[sequence]


def error() -> float:
    """The largest error of a result; tiles keep 16 bits of a number."""
    return 1e-4 if Case.instruction_set == "amx" else 1e-5


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", get_args(KvDtype))
@pytest.mark.parametrize(
    ("sizes", "block_tokens"), [(SMALL, 16), (SMALL, 5), (ODD_HEADS, 16), (ODD_HEADS, 7), (WIDE, 32)]
)
def test_absorbed_equals_plain_and_a_token_alone_equals_itself_in_a_chunk(
    dtype: KvDtype, sizes: Sizes, block_tokens: int
) -> None:
    case = Case(sizes, dtype, block_tokens=block_tokens)
    positions = (0, 1, 15, 16, 63, 64, 65, 255, 256, 257, 320, 511, 512, 599)
    chunks = ((0, 1), (3, 10), (60, 130), (250, 260), (568, 600))
    batch = list(range(LENGTH))
    if Case.instruction_set == "plain":  # it has no tiles of tokens, and takes 30 times as long
        batch = sorted({*positions, *(position for chunk in chunks for position in range(*chunk))})
    together = np.full((LENGTH, sizes.heads * sizes.value), np.nan, np.float32)
    together[batch] = case.attend([0] * len(batch), batch, threads=2)
    for position in positions:
        alone = case.attend([0], [position])
        assert np.array_equal(alone[0], together[position])
        np.testing.assert_allclose(alone[0], case.expected(0, position), atol=error())
    for begin, end in chunks:
        found = case.attend([0] * (end - begin), list(range(begin, end)))
        assert np.array_equal(found, together[begin:end])


@pytest.mark.parametrize("threads", [2, 3, 9])
def test_threads_and_neighbours_change_no_bit(threads: int) -> None:
    """Nine threads share out all sections of a single token, two threads some of them."""
    case = Case(ODD_HEADS, "f16")
    sequence, position = [0, 1, 1, 0, 0, 0, 1, 1], [599, 3, 4, 255, 256, 257, 520, 0]
    alone = np.concatenate([case.attend([s], [p]) for s, p in zip(sequence, position, strict=True)])
    assert np.array_equal(case.attend(sequence, position, threads=threads), alone)
    for row, (s, p) in enumerate(zip(sequence, position, strict=True)):
        assert np.array_equal(case.attend([s], [p], threads=threads)[0], alone[row])


@pytest.mark.parametrize("sizes", [SMALL, ODD_HEADS])
def test_tokens_of_a_span_see_later_ones(sizes: Sizes) -> None:
    """The spans cross a stretch of 64 positions and a section of 256; the other tokens see only what precedes them."""
    case = Case(sizes, "f32")
    position = [*range(50, 70), *range(240, 330)]
    until = [300 if 245 <= p < 300 else 66 if 60 <= p < 66 else p + 1 for p in position]
    sequence = [1] * len(position)
    together = case.attend(sequence, position, until=until, threads=2)
    for row, (p, end) in enumerate(zip(position, until, strict=True)):
        assert np.array_equal(case.attend([1], [p], until=[end])[0], together[row])
        np.testing.assert_allclose(together[row], case.expected(1, p, end), atol=error())


@pytest.mark.parametrize("format", ["f16", "bf16", "q8", "q4"])
def test_matrices_of_any_format_work(format: Format) -> None:
    case = Case(WIDE, "f32", format=format)
    positions = list(range(280, 290))
    together = case.attend([1] * 10, positions, threads=2)
    for row, position in enumerate(positions):
        assert np.array_equal(case.attend([1], [position])[0], together[row])
        # Queries and results are rounded to int8 before a product with quantised weights.
        atol = 0.03 if format in ("q8", "q4") else error()
        if format == "bf16" and Case.instruction_set == "amx":  # products keep 16 bits of an activation
            atol = 1e-4
        np.testing.assert_allclose(together[row], case.expected(1, position), atol=atol)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    case = Case(SMALL, "f32")
    case.q *= 300
    # Scores of hundreds that keep 16 bits are off by up to 0.01, and weights by as many hundredths.
    atol = 0.05 if case.instruction_set == "amx" else 1e-2
    np.testing.assert_allclose(case.attend([0], [599])[0], case.expected(0, 599), atol=atol)


def test_arguments_that_do_not_fit_are_refused_with_both_numbers() -> None:
    case = Case(SMALL, "f32")
    runtime, zero, out = native.Runtime(1), np.zeros(1, np.int32), np.empty((1, 21), np.float32)

    def attend(q: Floats, *, layer: int = 1, key: native.Matrix = case.key_up, position: int = 0) -> None:
        _native_testing.latent_attention(
            runtime, case.kv, layer, q, key, case.value_up, case.table, zero, zero + position, 1.0, out
        )

    attend(case.q[0, :1])
    with pytest.raises(ValueError, match=r"kv_rank \+ rope_dim is 18, expected 19"):
        attend(case.q[0, :1, :, :10].copy())
    with pytest.raises(ValueError, match="rows of key_up is 39, expected 26"):
        attend(case.q[0, :1, :2].copy())
    with pytest.raises(ValueError, match="keeps nothing, expected one that keeps latent vectors"):
        attend(case.q[0, :1], layer=0)
    with pytest.raises(ValueError, match=r"order\[0\] is 608, expected 0 to 607"):
        attend(case.q[0, :1], position=608)
    with pytest.raises(ValueError, match=r"sees_until\[0\] is 7, expected 8 to 608"):
        _native_testing.latent_attention(
            runtime, case.kv, 1, case.q[0, :1], case.key_up, case.value_up, case.table, zero, zero + 7, 1.0, out,
            zero + 7,
        )  # fmt: skip
    with pytest.raises(
        ValueError, match="kv_rank modulo the panel rows of a quantised key_up is 13, expected 0"
    ):
        attend(case.q[0, :1], key=matrix_of("q8", normal(39, 5))[0])
    with pytest.raises(ValueError, match="a slot is 1264, expected 0 to 1263"):
        _native_testing.latent_write(runtime, case.kv, 1, normal(1, 19), np.array([1264], np.int64))
    runtime.close()
