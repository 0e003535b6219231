"""Transcoded blocks hold, bit for bit, the values that the `gguf` package or the specification gives them.

Every instruction set writes and reads the same bytes (native/tests/test_kernels_matmul.cpp).
"""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from argosy import _native as native
from tests.native import ik_blocks
from tests.native.gguf_blocks import (
    BLOCK_TYPES,
    Bytes,
    dequantized,
    put_iq1_m_scales,
    random_blocks,
    with_row_scales,
)


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    return str(request.param)


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
    """Every scale takes zero, both ends of the subnormals, the largest value, infinity and NaN, with either sign."""
    specials = [0.0, 6e-8, 6.09e-5, 6.11e-5, 1.0, 65504.0, np.inf, np.nan]
    halves = np.array([sign * value for value in specials for sign in (1, -1)], np.float16)
    _, cols, size, places = BLOCK_TYPES[block_type]
    for place in places:
        blocks = random_blocks(block_type, len(halves), cols).reshape(-1, size)
        blocks[:, place : place + 2] = halves.reshape(-1, 1).view(np.uint8)
        require_same_values(block_type, blocks.reshape(-1), len(halves), cols)
    if block_type == "IQ1_M":
        blocks = random_blocks(block_type, len(halves), cols).reshape(-1, size)
        put_iq1_m_scales(blocks, halves)
        require_same_values(block_type, blocks.reshape(-1), len(halves), cols)
    if ik_blocks.SIZES.get(block_type, (0, None))[1] is not None:
        bare = np.random.default_rng(3).integers(0, 256, (len(halves), size), np.uint8)
        rows = with_row_scales(block_type, bare, halves)
        require_same_values(block_type, rows.reshape(-1), len(halves), cols)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
def test_quants_and_sub_scales_may_have_extreme_values(block_type: str, byte: int) -> None:
    _, width, _, places = BLOCK_TYPES[block_type]
    blocks = np.full_like(random_blocks(block_type, 3, width), byte).reshape(3, -1)
    for place in places:
        blocks[:, place : place + 2] = np.array([[0.37]], np.float16).view(np.uint8)
    if block_type == "IQ1_M":
        put_iq1_m_scales(blocks, np.full(3, 0.37, np.float16))
    require_same_values(block_type, blocks.reshape(-1), 3, width)


# Checksums of what ik_llama.cpp's own functions (its commit 8337e4c) decode from the blocks that the test makes. That
# of IQ6_K decodes with a polynomial, and its products with the table that the polynomial approximates.
@pytest.mark.parametrize(
    ("block_type", "checksum"),
    [
        ("IQ2_K", 0x1DEFA809),
        ("IQ3_K", 0x61820630),
        ("IQ4_K", 0x190D02FB),
        ("IQ5_K", 0xFB301304),
        ("IQ2_KS", 0x26BE784D),
        ("IQ3_KS", 0x3D8E50E1),
        ("IQ4_KS", 0xFF6D4359),
        ("IQ5_KS", 0x736E82C1),
        ("IQ2_KL", 0xAC57C863),
    ],
)
def test_values_are_those_that_ik_llama_decodes(block_type: str, checksum: int) -> None:
    rows, cols, generator = 64, 512, np.random.default_rng(7)
    size, row_scale = ik_blocks.SIZES[block_type]
    blocks = generator.integers(0, 256, (rows, 2 * size), dtype=np.uint8)
    if row_scale is None:
        halves = blocks.reshape(-1, size)
        halves[:, :2] = generator.standard_normal(2 * rows).astype("<f2").reshape(-1, 1).view(np.uint8)
    elif row_scale == "<f2":
        blocks = with_row_scales(block_type, blocks, generator.standard_normal(rows))
    else:  # powers of two: their products are exact in any order
        blocks = with_row_scales(block_type, blocks, np.ldexp(1.0, generator.integers(-8, 8, rows)))
    matrix = native.transcode(block_type, blocks.reshape(-1), rows, cols)
    found = native.dequantize(block_type.lower(), matrix, rows, cols)
    assert zlib.crc32((found + np.float32(0)).tobytes()) == checksum


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_products_match_the_weights_in_the_blocks(block_type: str, instruction_set: str) -> None:
    """They are equal up to the rounding of float32 sums, for activations that are integers times their scale."""
    format, width, *_ = BLOCK_TYPES[block_type]
    rows, cols = 37, 2 * width
    blocks = random_blocks(block_type, rows, cols)
    memory = native.transcode(block_type, blocks, rows, cols)
    matrix = native.Matrix(memory, 0, format, rows, cols)
    require_products(matrix, dequantized(block_type, blocks, rows, cols), instruction_set)


def require_products(matrix: native.Matrix, weights: np.ndarray, instruction_set: str) -> None:
    rows, cols = weights.shape
    x = np.random.default_rng(3).integers(-126, 127, (11, cols)).astype(np.float32)
    x[:, ::32] = 127  # makes each group's scale one
    runtime = native.Runtime(2, instruction_set=instruction_set)
    out, alone = np.empty((11, rows), np.float32), np.empty((1, rows), np.float32)
    native.matmul(runtime, [matrix], x, [out])
    weights = weights.astype(np.float64)
    assert np.all(np.abs(out - x @ weights.T) <= 2e-6 * (np.abs(x) @ np.abs(weights).T))
    for token in range(11):
        native.matmul(runtime, [matrix], x[token : token + 1], [alone])
        assert np.array_equal(alone[0], out[token])
    runtime.close()


@pytest.mark.parametrize("block_type", [name for name, entry in BLOCK_TYPES.items() if entry[1] > 32])
def test_columns_may_end_inside_a_block(block_type: str, instruction_set: str) -> None:
    format, block_cols, *_ = BLOCK_TYPES[block_type]
    for blocks, missing in ((1, 4), (2, 3 * block_cols // 4)):
        stored = blocks * block_cols
        memory = native.transcode(block_type, random_blocks(block_type, 20, stored), 20, stored)
        cols = stored - missing
        weights = native.dequantize(format, memory, 20, cols)
        require_products(native.Matrix(memory, 0, format, 20, cols), weights, instruction_set)


def test_scales_of_mxfp4_may_be_any_byte() -> None:
    """They run from 2^-128 to 2^126 of the doubled values, subnormal at the low end; in GGUF files 255 is 2^127."""
    blocks = random_blocks("MXFP4", 256, 32).reshape(256, 17)
    blocks[:, 0] = np.arange(256)
    require_same_values("MXFP4", blocks.reshape(-1), 256, 32)
    smallest = native.dequantize("mxfp4", native.transcode("MXFP4", blocks[0] & 0x11, 1, 32), 1, 32)
    assert smallest[0, 0] == np.float32(2.0**-128)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def nibbles_of(quants: Bytes) -> Bytes:
    """Return two nibbles per byte, the low half first: [rows, 2 * bytes]."""
    return np.stack([quants & 15, quants >> 4], axis=-1).reshape(len(quants), -1)


def random_int4(rows: int, cols: int) -> tuple[Bytes, Bytes, np.ndarray]:
    """Return quants, scales, and their values by the specification of compressed-tensors."""
    generator = np.random.default_rng([rows, cols])
    quants = generator.integers(0, 2**32, (rows, cols // 8), np.uint32)
    scales = (generator.standard_normal((rows, cols // 32)) * 0.02).astype(np.float32).view(np.uint32) >> 16
    shifts = 4 * np.arange(8, dtype=np.uint32)
    whole = (quants[:, :, None] >> shifts & 15).reshape(rows, cols).astype(np.float32) - 8
    values = whole * np.repeat((scales << 16).view(np.float32), 32, axis=1)
    return quants.view(np.uint8), scales.astype(np.uint16).view(np.uint8), values


def random_mxfp4(rows: int, cols: int) -> tuple[Bytes, Bytes, np.ndarray]:
    """Return quants, scales of every size, and their values by the OCP MX specification."""
    generator = np.random.default_rng([rows, cols])
    quants = generator.integers(0, 256, (rows, cols // 2), np.uint8)
    scales = generator.integers(0, 256, (rows, cols // 32), np.uint8)
    scales.reshape(-1)[: min(scales.size, 3)] = [0, 1, 254][: scales.size]
    powers = np.ldexp(1.0, scales.astype(np.int32) - 127)
    powers[scales == 255] = np.nan
    with np.errstate(over="ignore"):
        values = (E2M1[nibbles_of(quants)] * np.repeat(powers, 32, axis=1)).astype(np.float32)
    return quants, scales, values


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
@pytest.mark.parametrize(("format", "random_parts"), [("int4", random_int4), ("mxfp4", random_mxfp4)])
def test_quants_and_scales_of_safetensors_are_joined_in_panels(format, random_parts, rows: int) -> None:
    for cols in (32, 96, 256):
        quants, scales, expected = random_parts(rows, cols)
        for parts in ((("quants", quants), ("scales", scales)), (("scales", scales), ("quants", quants))):
            matrix = np.full(native.matrix_bytes(format, rows, cols), 0xA5, np.uint8)
            for name, data in parts:
                assert (
                    native.transcode(f"{format}_{name}", data.reshape(-1), rows, cols, out=matrix) is matrix
                )
            assert np.array_equal(native.dequantize(format, matrix, rows, cols), expected, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 16, 23])
def test_matrices_interleaved_row_by_row_are_separated(rows: int) -> None:
    quants, scales, expected = random_mxfp4(2 * rows, 64)
    size = native.matrix_bytes("mxfp4", rows, 64)
    both = native.transcode("mxfp4_quants", quants.reshape(-1), rows, 64, interleaved=2)
    native.transcode("mxfp4_scales", scales.reshape(-1), rows, 64, interleaved=2, out=both)
    assert len(both) == 2 * size
    for i in range(2):
        found = native.dequantize("mxfp4", both[i * size :][:size], rows, 64)
        assert np.array_equal(found, expected[i::2], equal_nan=True)


def test_products_with_int4_follow_the_specification(instruction_set: str) -> None:
    rows, cols = 37, 96
    quants, scales, weights = random_int4(rows, cols)
    memory = native.transcode("int4_quants", quants.reshape(-1), rows, cols)
    native.transcode("int4_scales", scales.reshape(-1), rows, cols, out=memory)
    require_products(native.Matrix(memory, 0, "int4", rows, cols), weights, instruction_set)


def test_blocks_that_cannot_be_transcoded_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown block type 'IQ9_S'; known: Q8_0"):
        native.transcode("IQ9_S", np.zeros(0, np.uint8), 0, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cols is 128, expected a multiple of 256 for Q4_K"):
        native.transcode("Q4_K", np.zeros(72, np.uint8), 1, 128)
    with pytest.raises(ValueError, match=r"data has shape \[17\], expected \[18\]"):
        native.transcode("Q4_0", np.zeros(17, np.uint8), 1, 32)


@pytest.mark.parametrize(
    "format",
    [
        *("q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"),
        *("q2_k", "q3_k", "iq4_nl", "iq4_xs", "mxfp4", "nvfp4", "int4"),
        *("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s", "iq1_m"),
        *("tq1_0", "tq2_0", "q1_0", "q2_0", *map(str.lower, ik_blocks.SIZES)),
    ],
)
def test_quantising_to_a_format_that_only_files_have_is_refused(format: str) -> None:
    out = np.zeros(native.matrix_bytes(format, 1, 256), np.uint8)
    with pytest.raises(ValueError, match=f"cannot quantise to {format}"):
        native.quantize(format, np.zeros((1, 256), np.float32), out)
