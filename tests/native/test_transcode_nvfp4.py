"""NVFP4 matrices keep the values of their tensors: codes, scales of 16 columns, and a factor of the whole matrix."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native as native
from tests.native.gguf_blocks import random_blocks
from tests.native.test_transcode import E2M1, nibbles_of, require_products, require_same_values
from tests.native.test_transcode_fp8 import e4m3

Bytes = NDArray[np.uint8]


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def number(value: float) -> Bytes:
    """Return the bytes of a float32."""
    return np.array([value], np.float32).view(np.uint8)


def random_parts(rows: int, cols: int) -> tuple[Bytes, Bytes, NDArray[np.float64]]:
    """Return codes, scales with zeros, the largest, subnormal and negative ones, and what they stand for."""
    generator = np.random.default_rng([rows, cols])
    quants = generator.integers(0, 256, (rows, cols // 2), np.uint8)
    scales = generator.integers(0, 256, (rows, cols // 16), np.uint8)
    scales[scales & 0x7F == 0x7F] = 0x7E
    edges = np.array([0, 0x7E, 1, 0x81], np.uint8)[: scales.size]
    scales.reshape(-1)[: len(edges)] = edges
    return quants, scales, E2M1[nibbles_of(quants)] * np.repeat(e4m3(scales), 16, axis=1)


def matrix_of(rows: int, cols: int, *parts: tuple[str, Bytes]) -> Bytes:
    matrix = np.full(native.matrix_bytes("nvfp4", rows, cols), 0xA5, np.uint8)
    for name, data in parts:
        assert native.transcode(name, data.reshape(-1), rows, cols, out=matrix) is matrix
    return matrix


@pytest.mark.parametrize("cols", [16, 48, 64, 80, 128, 208])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
def test_parts_are_joined_in_any_order(rows: int, cols: int) -> None:
    quants, scales, units = random_parts(rows, cols)
    for name, given, factor in (
        ("nvfp4_factor", 0.0123, np.float32(0.0123)),
        ("nvfp4_factor", -2.5, np.float32(-2.5)),
        ("nvfp4_factor", 0.0, np.float32(0.0)),
        ("nvfp4_factor", 1e30, np.float32(1e30)),
        ("nvfp4_divisor", 2048.0, np.float32(1 / 2048)),
        ("nvfp4_divisor", 1797.3, np.float32(1) / np.float32(1797.3)),
    ):
        parts = [("nvfp4_quants", quants), ("nvfp4_scales", scales), (name, number(given))]
        expected = (units * np.float64(factor)).astype(np.float32)  # units are exact as float32
        for order in (parts, parts[::-1]):
            found = native.dequantize("nvfp4", matrix_of(rows, cols, *order), rows, cols)
            np.testing.assert_array_equal(found, expected)
    alone = matrix_of(rows, cols, ("nvfp4_quants", quants), ("nvfp4_scales_alone", scales))
    np.testing.assert_array_equal(native.dequantize("nvfp4", alone, rows, cols), units.astype(np.float32))


def test_scales_in_blocks_of_a_gguf_may_be_any_byte() -> None:
    """The byte has no sign; 0x7F is zero, and 0xFF is 480."""
    blocks = random_blocks("NVFP4", 256, 64).reshape(256, 36)
    blocks[:, :4] = np.arange(256).reshape(-1, 1)
    require_same_values("NVFP4", blocks.reshape(-1), 256, 64)


@pytest.mark.parametrize("rows", [3, 40])
def test_blocks_of_a_gguf_may_have_a_factor(rows: int) -> None:
    blocks = random_blocks("NVFP4", rows, 192)
    units = native.dequantize("nvfp4", native.transcode("NVFP4", blocks, rows, 192), rows, 192)
    parts = [("nvfp4_blocks", blocks), ("nvfp4_factor", number(0.37))]
    for order in (parts, parts[::-1]):
        found = native.dequantize("nvfp4", matrix_of(rows, 192, *order), rows, 192)
        np.testing.assert_array_equal(found, units * np.float32(0.37))


@pytest.mark.parametrize("cols", [80, 256])
def test_products_follow_the_definition(cols: int, instruction_set: str) -> None:
    quants, scales, units = random_parts(37, cols)
    memory = matrix_of(
        37, cols, ("nvfp4_scales", scales), ("nvfp4_quants", quants), ("nvfp4_factor", number(0.0123))
    )
    weights = units * np.float64(np.float32(0.0123))
    require_products(native.Matrix(memory, 0, "nvfp4", 37, cols), weights, instruction_set)


@pytest.mark.parametrize("rows", [1, 16, 23])
def test_matrices_interleaved_row_by_row_are_separated(rows: int) -> None:
    quants, scales, units = random_parts(2 * rows, 80)
    size = native.matrix_bytes("nvfp4", rows, 80)
    both = native.transcode("nvfp4_quants", quants.reshape(-1), rows, 80, interleaved=2)
    native.transcode("nvfp4_scales_alone", scales.reshape(-1), rows, 80, interleaved=2, out=both)
    for i in range(2):
        found = native.dequantize("nvfp4", both[i * size :][:size], rows, 80)
        np.testing.assert_array_equal(found, units[i::2].astype(np.float32))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        *(("nvfp4_factor", number(value)) for value in (np.nan, np.inf, -np.inf, 1e35)),
        *(("nvfp4_divisor", number(value)) for value in (np.nan, np.inf, 0.0, -0.0, 1e-38)),
        *(("nvfp4_scales", np.full(4, code, np.uint8)) for code in (0x7F, 0xFF)),
        ("nvfp4_scales_alone", np.full(4, 0x7F, np.uint8)),
    ],
)
def test_what_is_no_finite_number_is_refused(name: str, data: Bytes) -> None:
    with pytest.raises(ValueError, match=f"{name} data holds a code or scale that is not a finite number"):
        native.transcode(name, data, 1, 64)


def test_a_matrix_without_weights_reads_no_factor() -> None:
    behind = np.full(4, 0xFF, np.uint8)  # NaN
    for rows, cols in ((0, 64), (1, 0)):
        native.transcode("nvfp4_factor", behind[:0], rows, cols)


def test_what_cannot_be_transcoded_is_refused() -> None:
    with pytest.raises(ValueError, match="cols is 72, expected a multiple of 16 for nvfp4_quants"):
        native.transcode("nvfp4_quants", np.zeros(36, np.uint8), 1, 72)
    with pytest.raises(ValueError, match="cols is 96, expected a multiple of 64 for NVFP4"):
        native.transcode("NVFP4", np.zeros(54, np.uint8), 1, 96)
    with pytest.raises(ValueError, match="nvfp4 matrices cannot be interleaved"):
        native.transcode("nvfp4_factor", number(1), 1, 64, interleaved=2)
