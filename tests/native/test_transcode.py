"""GGUF blocks in slot formats: the values that the `gguf` package reads, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from argosy import _native as native
from tests.native.gguf_blocks import BLOCK_TYPES, Bytes, dequantized, random_blocks


@pytest.fixture(params=native.instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.instruction_set()
    native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set(before)


def require_same_values(block_type: str, blocks: Bytes, rows: int, cols: int) -> None:
    expected = dequantized(block_type, blocks, rows, cols)
    matrix = native.transcode(block_type, blocks, rows, cols)
    found = native.dequantize(BLOCK_TYPES[block_type][0], matrix, rows, cols)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert np.array_equal(found[numbers].view(np.uint32), expected[numbers].view(np.uint32))


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
def test_every_weight_keeps_its_bits(block_type: str, rows: int) -> None:
    for blocks_a_row in (1, 2, 3):
        cols = blocks_a_row * BLOCK_TYPES[block_type][1]
        require_same_values(block_type, random_blocks(block_type, rows, cols), rows, cols)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_scales_may_be_any_float16(block_type: str) -> None:
    """Zero, both subnormal ends, the largest, infinity and NaN, of either sign, in every place of a scale."""
    specials = [0.0, 6e-8, 6.09e-5, 6.11e-5, 1.0, 65504.0, np.inf, np.nan]
    halves = np.array([sign * value for value in specials for sign in (1, -1)], np.float16)
    _, cols, size, places = BLOCK_TYPES[block_type]
    for place in places:
        blocks = random_blocks(block_type, len(halves), cols).reshape(-1, size)
        blocks[:, place : place + 2] = halves.reshape(-1, 1).view(np.uint8)
        require_same_values(block_type, blocks.reshape(-1), len(halves), cols)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
def test_quants_and_sub_scales_reach_their_ends(block_type: str, byte: int) -> None:
    _, width, _, places = BLOCK_TYPES[block_type]
    blocks = np.full_like(random_blocks(block_type, 3, width), byte).reshape(3, -1)
    for place in places:
        blocks[:, place : place + 2] = np.array([[0.37]], np.float16).view(np.uint8)
    require_same_values(block_type, blocks.reshape(-1), 3, width)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_every_instruction_set_writes_the_same_bytes(block_type: str) -> None:
    cols = 2 * BLOCK_TYPES[block_type][1]
    blocks = random_blocks(block_type, 19, cols)
    found = native.transcode(block_type, blocks, 19, cols)
    assert len(found) == native.matrix_bytes(BLOCK_TYPES[block_type][0], 19, cols)
    native.use_instruction_set("plain")
    assert np.array_equal(found, native.transcode(block_type, blocks, 19, cols))


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_products_are_those_of_the_weights_in_the_blocks(block_type: str) -> None:
    """To the last bits of float32 sums, for activations that are whole numbers of their scale."""
    format, width, *_ = BLOCK_TYPES[block_type]
    rows, cols = 37, 2 * width
    blocks = random_blocks(block_type, rows, cols)
    weights = dequantized(block_type, blocks, rows, cols).astype(np.float64)
    x = np.random.default_rng(3).integers(-126, 127, (11, cols)).astype(np.float32)
    x[:, ::32] = 127  # so that each group's scale is one
    matrix = native.Matrix(native.transcode(block_type, blocks, rows, cols), 0, format, rows, cols)
    runtime = native.Runtime(2)
    out, alone = np.empty((11, rows), np.float32), np.empty((1, rows), np.float32)
    native.matmul(runtime, [matrix], x, [out])
    assert np.all(np.abs(out - x @ weights.T) <= 2e-6 * (np.abs(x) @ np.abs(weights).T))
    for token in range(11):
        native.matmul(runtime, [matrix], x[token : token + 1], [alone])
        assert np.array_equal(alone[0], out[token])
    runtime.close()


def test_what_cannot_be_transcoded_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown block type 'Q3_K'; known: Q8_0"):
        native.transcode("Q3_K", np.zeros(0, np.uint8), 0, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cols is 128, expected a multiple of 256 for Q4_K"):
        native.transcode("Q4_K", np.zeros(72, np.uint8), 1, 128)
    with pytest.raises(ValueError, match=r"data has shape \[17\], expected \[18\]"):
        native.transcode("Q4_0", np.zeros(17, np.uint8), 1, 32)


@pytest.mark.parametrize("format", ["q4_1", "q5_0", "q4_k", "q5_k", "q6_k"])
def test_nothing_is_quantised_to_a_format_that_only_gguf_files_have(format: str) -> None:
    out = np.zeros(native.matrix_bytes(format, 1, 256), np.uint8)
    with pytest.raises(ValueError, match=f"nothing is quantised to {format}"):
        native.quantize(format, np.zeros((1, 256), np.float32), out)
