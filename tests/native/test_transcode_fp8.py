"""FP8 matrices with scales of every type and size of block keep the values of their tensors."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native as native
from argosy.checkpoint.formats import fp8_parts

Bytes = NDArray[np.uint8]
Doubles = NDArray[np.float64]


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def e4m3(codes: Bytes) -> Doubles:
    """Return the values of OCP FP8 E4M3 codes (arXiv:2209.05433, table 1)."""
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude[codes & 0x7F == 0x7F] = np.nan
    return np.where(codes < 128, magnitude, -magnitude)


def random_scales(
    dtype: str, count: tuple[int, int], generator: np.random.Generator
) -> tuple[Bytes, Doubles]:
    """Return scales as a file stores them, with both signs where there is a sign, and their values."""
    if dtype in ("U8", "F8_E8M0"):
        powers = generator.integers(0, 246, count, np.uint8)
        powers.reshape(-1)[: powers.size // 2] %= 6  # subnormal as float32, or close to it
        return powers, np.ldexp(1.0, powers.astype(np.int32) - 127)
    scales = (generator.standard_normal(count) * 0.01).astype(np.float32)
    if dtype == "F16":
        halves = scales.astype(np.float16)
        return halves.view(np.uint8), halves.astype(np.float64)
    if dtype == "BF16":
        bits = scales.view(np.uint32) >> 16
        return bits.astype(np.uint16).view(np.uint8), (bits << 16).view(np.float32).astype(np.float64)
    return scales.view(np.uint8), scales.astype(np.float64)


def random_fp8(shape: tuple[int, int], block: tuple[int, int], dtype: str) -> tuple[str, Bytes, Doubles]:
    """Return a format, its matrix, and the weights by the definition of block scales."""
    generator = np.random.default_rng([*shape, *block])
    codes = generator.integers(0, 256, shape, np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x7E
    count = tuple(-(-size // side) for size, side in zip(shape, block, strict=True))
    scales, values = random_scales(dtype, count, generator)
    rows, cols = np.indices(shape)
    weights = e4m3(codes) * values[rows // block[0], cols // block[1]]
    parts = fp8_parts(shape, block, dtype)
    assert parts is not None
    matrix = np.full(native.matrix_bytes(parts.format, *shape), 0xA5, np.uint8)
    native.transcode(parts.codes, codes.reshape(-1), *shape, out=matrix)
    native.transcode(parts.scales, scales.reshape(-1), *shape, out=matrix)
    return parts.format, matrix, weights


FLOATS = ("F32", "BF16", "F16")
# shape, block, dtypes, format
CASES = [
    ((1, 1), (1, 1), FLOATS, "f8"),
    ((40, 200), (40, 200), FLOATS, "f8"),
    ((40, 200), (1, 200), FLOATS, "f8_row"),
    ((290, 300), (128, 128), (*FLOATS, "U8"), "f8"),
    ((290, 520), (128, 256), (*FLOATS, "U8"), "f8"),
    ((290, 300), (512, 128), FLOATS, "f8"),
    ((130, 200), (64, 64), FLOATS, "f8_32"),
    ((130, 200), (64, 200), FLOATS, "f8_32"),
    ((40, 200), (1 << 40, 64), FLOATS, "f8_32"),
    ((40, 200), (16, 1 << 40), ("U8",), "mxfp8"),
    ((37, 300), (1, 128), FLOATS, "f8_32"),
    ((45, 70), (10, 32), FLOATS, "f8_32"),
    ((33, 96), (1, 32), ("U8", "F8_E8M0"), "mxfp8"),
    ((70, 90), (32, 32), ("U8",), "mxfp8"),
    ((70, 90), (1, 90), ("U8",), "mxfp8"),
    ((70, 90), (70, 90), ("U8",), "f8"),
]


@pytest.mark.parametrize(("shape", "block", "dtypes", "format"), CASES)
def test_weights_are_codes_times_the_scale_of_their_block(shape, block, dtypes, format) -> None:
    for dtype in dtypes:
        found_format, matrix, weights = random_fp8(shape, block, dtype)
        assert found_format == format
        found = native.dequantize(found_format, matrix, *shape)
        np.testing.assert_array_equal(found, weights.astype(np.float32))


@pytest.mark.parametrize(
    ("shape", "block", "dtype"),
    [
        ((40, 200), (40, 200), "F32"),
        ((40, 200), (1, 200), "BF16"),
        ((40, 200), (32, 64), "F32"),
        ((40, 200), (32, 32), "U8"),
    ],
)
def test_products_follow_the_definition(shape, block, dtype, instruction_set: str) -> None:
    format, matrix, weights = random_fp8(shape, block, dtype)
    tolerance = 2e-6 if instruction_set != "amx" else 2e-5
    runtime = native.Runtime(2, instruction_set=instruction_set)
    x = np.random.default_rng(1).standard_normal((40, shape[1]), dtype=np.float32)
    whole, alone = np.empty((40, shape[0]), np.float32), np.empty((1, shape[0]), np.float32)
    given = native.Matrix(matrix, 0, format, *shape)
    native.matmul(runtime, [given], x, [whole])
    assert np.all(np.abs(whole - x @ weights.T) <= tolerance * (np.abs(x) @ np.abs(weights).T))
    for token in range(40):
        native.matmul(runtime, [given], x[token : token + 1], [alone])
        assert np.array_equal(alone[0], whole[token])
    runtime.close()


@pytest.mark.parametrize(
    ("block", "dtype"),
    [((1, 16), "F32"), ((64, 48), "F32"), ((1, 16), "U8"), ((0, 32), "F32"), ((128, 128), "I32")],
)
def test_blocks_that_no_format_holds_have_no_parts(block: tuple[int, int], dtype: str) -> None:
    assert fp8_parts((64, 64 * 3), block, dtype) is None


@pytest.mark.parametrize("format", ["f8", "f8_row", "f8_32", "mxfp8"])
def test_what_is_no_finite_number_is_refused(format: str) -> None:
    shape = (20, 64)
    wrong: dict[str, list[tuple[str, Bytes]]] = {
        "f8": [("f8_scale", np.array([np.nan], np.float32).view(np.uint8))],
        "f8_row": [("f8_row_scales", np.full(20, -np.inf, np.float32).view(np.uint8))],
        "f8_32": [("f8_32_scales_bf16", np.full(40, 0x7F80, np.uint16).view(np.uint8))],
        "mxfp8": [("mxfp8_scales", np.full(40, byte, np.uint8)) for byte in (246, 255)],
    }
    codes = np.zeros(20 * 64, np.uint8)
    native.transcode(f"{format}_codes", codes, *shape)
    codes[-1] = 0xFF
    for block_type, data in [(f"{format}_codes", codes), *wrong[format]]:
        with pytest.raises(
            ValueError, match=f"{block_type} data holds a code or scale that is not a finite number"
        ):
            native.transcode(block_type, data, *shape)
    with pytest.raises(ValueError, match=f"{format} matrices cannot be interleaved"):
        native.transcode(f"{format}_codes", np.zeros(2 * 20 * 64, np.uint8), *shape, interleaved=2)


def test_a_size_that_is_no_multiple_of_the_formats_is_no_block_type() -> None:
    for name in (
        "f8_scales_64x128",
        "f8_32_scales_1x16",
        "mxfp8_scales_0x32",
        "f8_scale_1x1",
        "f8_codes_1x1",
    ):
        with pytest.raises(ValueError, match=f"unknown block type '{name}'"):
            native.transcode(name, np.zeros(0, np.uint8), 0, 0)
