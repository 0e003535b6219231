"""The operations of encoders agree with numpy in float64, with strided rows and any number of threads.

Every test runs once per instruction set of this CPU. A result may differ from numpy's by 1e-5 of the largest value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native as native

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@pytest.fixture(scope="module", params=native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def runtime(instruction_set: str) -> Iterator[native.Runtime]:
    runtime = native.Runtime(2, instruction_set=instruction_set)
    yield runtime
    runtime.close()


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def assert_close(found: Floats, expected: Doubles, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0) <= tolerance * np.abs(expected).max(initial=0)


def matrix_of(format: str, weights: Floats) -> tuple[native.Matrix, Doubles]:
    """Return a matrix and its weights as the products use them."""
    memory = np.zeros(native.matrix_bytes(format, *weights.shape), np.uint8)
    native.quantize(format, weights, memory)
    return native.Matrix(memory, 0, format, *weights.shape), native.dequantize(
        format, memory, *weights.shape
    ).astype(np.float64)


# Products.


@pytest.mark.covering(2)
@pytest.mark.parametrize("format", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1), (33, 16), (70, 100), (96, 1152)])
@pytest.mark.parametrize("tokens", [0, 1, 7, 16, 50, 400])
def test_linear_multiplies_and_adds_the_bias(
    runtime: native.Runtime, format: str, shape: tuple[int, int], tokens: int
) -> None:
    rows, cols = shape
    matrix, weights = matrix_of(format, normal(rows, cols))
    x, bias = normal(tokens, cols, seed=1), 5 * normal(rows, seed=2)
    out = np.full((tokens, rows), np.nan, np.float32)
    native.linear(runtime, matrix, x, out, bias, exact=True)
    assert_close(out, x.astype(np.float64) @ weights.T + bias)
    native.linear(runtime, matrix, x, out, exact=True)
    assert_close(out, x.astype(np.float64) @ weights.T)


def rounded(x: Floats) -> Doubles:
    """Return x rounded to bfloat16, to nearest even."""
    bits = x.view(np.uint32).astype(np.uint64)
    return (
        ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32).astype(np.float64)
    )


def rounds(instruction_set: str) -> bool:
    """Return whether this CPU multiplies bfloat16 by itself."""
    return instruction_set in ("avx512", "amx") and "avx512_bf16" in Path("/proc/cpuinfo").read_text()


# Sizes around a pair and a vector of columns, a tile and a block of rows, a vector, a panel and a chunk of tokens.
@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (6, 31), (7, 33), (48, 64), (49, 65), (100, 1152)])
@pytest.mark.parametrize("tokens", [16, 17, 33, 64, 65, 200, 1040])
def test_linear_rounds_many_tokens_to_bfloat16_where_that_is_faster(
    runtime: native.Runtime, instruction_set: str, shape: tuple[int, int], tokens: int
) -> None:
    rows, cols = shape
    matrix, weights = matrix_of("bf16", normal(rows, cols))
    wide, bias = normal(tokens, cols + 3, seed=1), 5 * normal(rows, seed=2)
    x, around = wide[:, 1 : cols + 1], np.full((tokens, rows + 2), 7, np.float32)
    seen = rounded(x.copy()) if rounds(instruction_set) else x.astype(np.float64)
    native.linear(runtime, matrix, x, around[:, 1:-1], bias)
    assert_close(around[:, 1:-1], seen @ weights.T + bias)
    native.linear(runtime, matrix, x, around[:, 1:-1])
    assert_close(around[:, 1:-1], seen @ weights.T)
    assert (around[:, [0, -1]] == 7).all()


def test_few_tokens_other_formats_and_exact_products_are_not_rounded(runtime: native.Runtime) -> None:
    x, out, expected = normal(16, 64), np.empty((16, 40), np.float32), np.empty((16, 40), np.float32)
    weights = normal(40, 64, seed=1)
    for format in ("f32", "f16", "bf16"):
        matrix, _ = matrix_of(format, weights)
        native.matmul(runtime, [matrix], x, [expected])
        native.linear(runtime, matrix, x, out, exact=format == "bf16")
        assert np.array_equal(out, expected)
    native.linear(runtime, matrix, x[:15], out[:15])
    assert np.array_equal(out[:15], expected[:15])


def test_a_rounded_token_gets_the_same_bits_with_any_neighbours_and_threads(instruction_set: str) -> None:
    one, three = (native.Runtime(threads, instruction_set=instruction_set) for threads in (1, 3))
    matrix, _ = matrix_of("bf16", normal(150, 333))
    x, bias = normal(200, 333, seed=1), normal(150, seed=2)
    together = np.empty((200, 150), np.float32)
    native.linear(one, matrix, x, together, bias)
    for rows in (slice(0, 200), slice(5, 22), slice(60, 130), slice(184, 200)):
        out = np.empty_like(together[rows])
        native.linear(three, matrix, x[rows], out, bias)
        assert np.array_equal(out, together[rows])


def finished(finish: str, result: Doubles, before: Floats) -> Doubles:
    if finish == "add":
        return before + result
    if finish == "multiply":
        return before * result
    if finish == "silu":
        return result / (1 + np.exp(-result))
    return gelu(finish.removeprefix("gelu_"), result) if finish.startswith("gelu_") else result


@pytest.mark.parametrize(
    "finish", ["store", "add", "multiply", "gelu_erf", "gelu_tanh", "gelu_quick", "silu"]
)
@pytest.mark.parametrize(("format", "tokens"), [("f32", 70), ("bf16", 5), ("bf16", 70), ("q8", 70)])
def test_linear_finishes_its_result(
    runtime: native.Runtime, instruction_set: str, format: str, tokens: int, finish: Any
) -> None:
    matrix, weights = matrix_of(format, normal(75, 60))
    x, bias, around = normal(tokens, 60, seed=1), normal(75, seed=2), normal(tokens, 77, seed=3)
    before, out = around[:, 1:-1].copy(), around[:, 1:-1]
    edges = around[:, [0, -1]].copy()
    native.linear(runtime, matrix, x, out, bias, finish=finish)
    is_rounded = format == "bf16" and tokens >= 16 and rounds(instruction_set)
    result = (rounded(x) if is_rounded else x.astype(np.float64)) @ weights.T + bias
    # With q8, x has 16 bits.
    assert_close(out, finished(finish, result, before), 1e-4 if format == "q8" else 1e-5)
    assert np.array_equal(around[:, [0, -1]], edges)


def test_linear_takes_quantised_weights(runtime: native.Runtime) -> None:
    matrix, weights = matrix_of("q8", normal(40, 100))
    x, bias = normal(50, 100, seed=1), normal(40, seed=2)
    out = np.full((50, 40), np.nan, np.float32)
    native.linear(runtime, matrix, x, out, bias)
    assert_close(out, x.astype(np.float64) @ weights.T + bias, 1e-4)  # x has 16 bits


@pytest.mark.parametrize("format", ["f32", "bf16", "q8"])
def test_rows_of_linear_may_be_strided(runtime: native.Runtime, format: str) -> None:
    matrix, _ = matrix_of(format, normal(33, 64))
    wide, bias = normal(20, 200, seed=1), normal(33, seed=2)
    expected = np.empty((20, 33), np.float32)
    native.linear(runtime, matrix, wide[:, 70:134].copy(), expected, bias)
    around = np.full((20, 50), 7, np.float32)
    native.linear(runtime, matrix, wide[:, 70:134], around[:, 10:43], bias)
    assert np.array_equal(around[:, 10:43], expected)
    assert (around[:, :10] == 7).all()
    assert (around[:, 43:] == 7).all()
    backwards = np.empty((20, 33), np.float32)
    native.linear(runtime, matrix, wide[::-1, 70:134], backwards[::-1], bias)
    assert np.array_equal(backwards, expected)


# Small operations.


@pytest.mark.parametrize("cols", [1, 7, 16, 17, 33, 1152])
def test_layer_norm_equals_its_formula(runtime: native.Runtime, cols: int) -> None:
    x = normal(5, cols) + np.float32(3)
    weight, bias = normal(cols, seed=1), normal(cols, seed=2)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6) * weight
    out = np.full_like(x, np.nan)
    native.layer_norm(runtime, x, weight, bias, 1e-6, out)
    assert_close(out, expected + bias)
    native.layer_norm(runtime, x, weight, None, 1e-6, x)
    assert_close(x, expected)


def gelu(kind: str, x: Doubles) -> Doubles:
    if kind == "erf":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    if kind == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / (1 + np.exp(-1.702 * x))


@pytest.mark.parametrize("kind", ["erf", "tanh", "quick"])
def test_gelu_is_within_a_millionth_of_its_formula(runtime: native.Runtime, kind: Any) -> None:
    x = np.arange(-12, 12, 0.00237, dtype=np.float32)[None, :]
    expected = gelu(kind, x.astype(np.float64))
    native.gelu(runtime, x, kind)
    assert np.all(np.abs(x - expected) <= 1e-6 * np.maximum(1, np.abs(expected)))


def test_gelu_keeps_zero_large_numbers_and_nan(runtime: native.Runtime) -> None:
    kinds: tuple[Any, ...] = ("erf", "tanh", "quick")
    for kind in kinds:
        x = np.array([[0, 100, 1e30, -100, np.nan]], np.float32)
        native.gelu(runtime, x, kind)
        assert np.array_equal(x[0, :3], np.array([0, 100, 1e30], np.float32))
        assert abs(x[0, 3]) <= 1e-30
        assert np.isnan(x[0, 4])


# Attention.


def attend(runtime: native.Runtime, query: Floats, key: Floats, value: Floats, scale: float) -> Floats:
    out = np.full(query.shape, np.nan, np.float32)
    native.attend(runtime, query, key, value, scale, out)
    return out


def attention(query: Floats, key: Floats, value: Floats, scale: float) -> Doubles:
    group = query.shape[1] // key.shape[1]
    keys, values = (np.repeat(each.astype(np.float64), group, axis=1) for each in (key, value))
    scores = np.einsum("thd,shd->hts", query.astype(np.float64), keys, optimize=True) * scale
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return np.einsum("hts,shd->thd", weights / weights.sum(axis=2, keepdims=True), values, optimize=True)


@pytest.mark.covering(2)
@pytest.mark.parametrize("dim", [1, 16, 64, 72, 80])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2)])
@pytest.mark.parametrize("sizes", [(1, 1), (3, 50), (16, 47), (17, 48), (64, 49), (65, 96), (130, 200)])
def test_attend_equals_softmax_attention(
    runtime: native.Runtime, dim: int, heads: tuple[int, int], sizes: tuple[int, int]
) -> None:
    query = 3 * normal(sizes[0], heads[0], dim)
    key, value = normal(sizes[1], heads[1], dim, seed=1), normal(sizes[1], heads[1], dim, seed=2)
    found = attend(runtime, query, key, value, dim**-0.5)
    assert_close(found, attention(query, key, value, dim**-0.5))


def test_attend_sees_scores_of_any_size_and_many_keys(instruction_set: str) -> None:
    runtime = native.Runtime(2, instruction_set=instruction_set)
    query = 40 * normal(3, 2, 64)
    key, value = normal(3000, 2, 64, seed=1), normal(3000, 2, 64, seed=2)
    expected = attention(query, key, value, 1.0)
    assert_close(
        attend(runtime, query, key, value, 1.0), expected, 1e-4
    )  # scores of 1000 are rounded to 6e-5
    assert runtime.scratch_bytes <= 2 * (300 << 10)


def test_a_query_gets_the_same_bits_with_any_neighbours_and_threads(instruction_set: str) -> None:
    one, three = (native.Runtime(threads, instruction_set=instruction_set) for threads in (1, 3))
    query, key, value = normal(150, 4, 72), normal(333, 4, 72, seed=1), normal(333, 4, 72, seed=2)
    together = attend(one, query, key, value, 0.1)
    assert np.array_equal(attend(three, query, key, value, 0.1), together)
    for rows in (slice(0, 1), slice(5, 22), slice(60, 130), slice(149, 150)):
        assert np.array_equal(attend(three, query[rows], key, value, 0.1), together[rows])
    some_heads = attend(three, query[:, 1:3], key[:, 1:3], value[:, 1:3], 0.1)
    assert np.array_equal(some_heads, together[:, 1:3])


def test_rows_of_attend_may_be_strided_and_out_may_be_query(runtime: native.Runtime) -> None:
    fused = normal(70, 3, 4, 16)
    query, key, value = fused[:, 0], fused[:, 1], fused[:, 2]
    expected = attend(runtime, query.copy(), key.copy(), value.copy(), 0.25)
    assert np.array_equal(attend(runtime, query, key, value, 0.25), expected)
    rest = fused[:, 1:].copy()
    native.attend(runtime, query, key, value, 0.25, query)
    assert np.array_equal(query, expected)
    assert np.array_equal(fused[:, 1:], rest)


# Attention in bfloat16.


def test_a_runtime_says_whether_it_rounds(runtime: native.Runtime, instruction_set: str) -> None:
    assert runtime.rounds == rounds(instruction_set)


# One skip for each test where no instruction set rounds.
@pytest.fixture(scope="module", params=list(filter(rounds, native.instruction_sets())) or [None])
def rounding_runtime(request: pytest.FixtureRequest) -> Iterator[native.Runtime]:
    if request.param is None:
        pytest.skip("needs a processor with AVX-512 BF16")
    with closing(native.Runtime(2, instruction_set=request.param)) as runtime:
        yield runtime


def attend_rounded(
    runtime: native.Runtime, query: Floats, key: Floats, value: Floats, scale: float
) -> Floats:
    memory = np.full(native.rounded_keys_bytes(*key.shape), 0xFF, np.uint8)
    native.round_keys(runtime, key, value, memory)
    out = np.full(query.shape, np.nan, np.float32)
    native.attend_rounded(runtime, query, memory, len(key), key.shape[1], scale, out)
    return out


# Sizes around a vector and a panel of queries, a pair and a block of keys.
@pytest.mark.parametrize("sizes", [(1, 1), (3, 50), (17, 95), (64, 96), (65, 97), (130, 200)])
def test_attend_rounded_is_attention_of_rounded_numbers(
    rounding_runtime: native.Runtime, sizes: tuple[int, int]
) -> None:
    for heads, dim in itertools.product([(1, 1), (4, 4), (6, 2)], [1, 15, 64, 72]):
        assert_attends_rounded(rounding_runtime, heads, dim, sizes)


def assert_attends_rounded(
    runtime: native.Runtime, heads: tuple[int, int], dim: int, sizes: tuple[int, int]
) -> None:
    query = 3 * normal(sizes[0], heads[0], dim)
    key, value = normal(sizes[1], heads[1], dim, seed=1), normal(sizes[1], heads[1], dim, seed=2)
    found = attend_rounded(runtime, query, key, value, dim**-0.5)
    log2_of_e = np.float32(math.log2(math.e))
    seen = rounded(query * np.float32(dim**-0.5 * log2_of_e)) / log2_of_e
    expected = attention(
        seen.astype(np.float32), rounded(key).astype(np.float32), rounded(value).astype(np.float32), 1.0
    )
    # A weight is rounded by at most 2e-3 of itself, and so is the sum that it is divided by.
    assert np.abs(found - expected).max() <= 4e-3 * np.abs(value).max()


def test_a_query_of_attend_rounded_gets_the_same_bits_with_any_neighbours_and_threads(
    rounding_runtime: native.Runtime,
) -> None:
    one, three = (
        native.Runtime(threads, instruction_set=rounding_runtime.instruction_set) for threads in (1, 3)
    )
    query, key, value = normal(150, 4, 72), normal(333, 4, 72, seed=1), normal(333, 4, 72, seed=2)
    together = attend_rounded(one, query, key, value, 0.1)
    assert np.array_equal(attend_rounded(three, query, key, value, 0.1), together)
    for rows in (slice(0, 1), slice(5, 22), slice(60, 130), slice(149, 150)):
        assert np.array_equal(attend_rounded(three, query[rows], key, value, 0.1), together[rows])
    some_heads = attend_rounded(three, query[:, 1:3], key[:, 1:3], value[:, 1:3], 0.1)
    assert np.array_equal(some_heads, together[:, 1:3])


def test_rows_of_attend_rounded_may_be_strided_and_out_may_be_query(rounding_runtime: native.Runtime) -> None:
    fused = normal(70, 3, 4, 16)
    query, key, value = fused[:, 0], fused[:, 1], fused[:, 2]
    expected = attend_rounded(rounding_runtime, query.copy(), key.copy(), value.copy(), 0.25)
    assert np.array_equal(attend_rounded(rounding_runtime, query, key, value, 0.25), expected)
    memory = np.empty(native.rounded_keys_bytes(*key.shape), np.uint8)
    native.round_keys(rounding_runtime, key, value, memory)
    rest = fused[:, 1:].copy()
    native.attend_rounded(rounding_runtime, query, memory, len(key), 4, 0.25, query)
    assert np.array_equal(query, expected)
    assert np.array_equal(fused[:, 1:], rest)


# Wrong arguments.


def test_wrong_arguments_are_refused(runtime: native.Runtime) -> None:
    def zeros(*shape: int) -> Floats:
        return np.zeros(shape, np.float32)

    matrix, _ = matrix_of("f32", normal(16, 32))
    with pytest.raises(ValueError, match=r"x has shape \[3, 31\], expected \[any, 32\]"):
        native.linear(runtime, matrix, zeros(3, 31), zeros(3, 16))
    with pytest.raises(ValueError, match="a row of x is not C-contiguous"):
        native.linear(runtime, matrix, zeros(3, 64)[:, ::2], zeros(3, 16))
    with pytest.raises(ValueError, match="rows of out overlap: they are 0 elements apart"):
        native.linear(
            runtime, matrix, zeros(3, 32), np.lib.stride_tricks.as_strided(zeros(16), (3, 16), (0, 4))
        )
    with pytest.raises(ValueError, match=r"bias has shape \[15\], expected \[16\]"):
        native.linear(runtime, matrix, zeros(3, 32), zeros(3, 16), zeros(15))
    with pytest.raises(ValueError, match="unknown finish 'exact'; known: store, add, multiply, gelu_erf"):
        native.linear(runtime, matrix, zeros(3, 32), zeros(3, 16), finish="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown kind 'exact'; known: erf, tanh, quick"):
        native.gelu(runtime, zeros(1, 1), "exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="heads modulo KV heads is 1, expected 0"):
        native.attend(runtime, zeros(3, 3, 8), zeros(5, 2, 8), zeros(5, 2, 8), 1, zeros(3, 3, 8))
    with pytest.raises(ValueError, match="keys is 0, expected 1 to"):
        native.attend(runtime, zeros(3, 2, 8), zeros(0, 2, 8), zeros(0, 2, 8), 1, zeros(3, 2, 8))
    with pytest.raises(ValueError, match="a row of key is not C-contiguous"):
        native.attend(runtime, zeros(3, 2, 8), zeros(5, 4, 8)[:, ::2], zeros(5, 2, 8), 1, zeros(3, 2, 8))
    with pytest.raises(ValueError, match="keys is 0, expected 1 to"):
        native.rounded_keys_bytes(0, 2, 8)
    size = native.rounded_keys_bytes(5, 2, 8)
    with pytest.raises(ValueError, match=rf"rounded has shape \[{size - 1}\], expected \[{size}\]"):
        native.round_keys(runtime, zeros(5, 2, 8), zeros(5, 2, 8), np.empty(size - 1, np.uint8))
    memory = np.empty(size, np.uint8)
    with pytest.raises(ValueError, match=rf"rounded has shape \[{size - 1}\], expected \[{size}\]"):
        native.attend_rounded(runtime, zeros(3, 2, 8), memory[1:], 5, 2, 1, zeros(3, 2, 8))
    with pytest.raises(ValueError, match="heads modulo KV heads is 1, expected 0"):
        native.attend_rounded(runtime, zeros(3, 3, 8), memory, 5, 2, 1, zeros(3, 3, 8))
    if not runtime.rounds:
        with pytest.raises(ValueError, match="this runtime does not round"):
            native.round_keys(runtime, zeros(5, 2, 8), zeros(5, 2, 8), memory)
