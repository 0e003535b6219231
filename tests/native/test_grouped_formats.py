"""Matrices in grouped formats hold the values that compressed-tensors, GPTQ, AWQ and MLX store, and multiply by them.

`grouped_formats.py` packs by the rules of each; tests/oracle/test_grouped_formats.py by the packers themselves. Every
instruction set writes the same bytes (native/tests/test_kernels_matmul.cpp).
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from argosy import _native as native
from argosy.config.model import ACT_ORDER_FORMATS, GroupedFormat
from tests.native.grouped_formats import Bytes, Stored, packed, raw
from tests.native.test_transcode import instruction_set  # noqa: F401  a fixture

# test_act_order.py has the others.
FORMATS = [name for name in get_args(GroupedFormat) if not name.endswith("_act_order")]
INTS = [name for name in FORMATS if name.startswith("int")]
UINTS = [name for name in FORMATS if name.startswith("uint")]
AFFINES = [name for name in FORMATS if name.startswith("affine")]
SHAPES = [(1, 32), (16, 128), (40, 96), (33, 160), (64, 256)]


def landed(format: str, rows: int, cols: int, parts: dict[str, Bytes]) -> Bytes:
    matrix = np.full(native.matrix_bytes(format, rows, cols), 0xA5, np.uint8)
    for part, data in parts.items():
        assert native.transcode(f"{format}:{part}", data, rows, cols, out=matrix) is matrix
    return matrix


def require_values(stored: Stored, parts: dict[str, Bytes]) -> None:
    rows, cols = stored.codes.shape
    matrix = landed(stored.format, rows, cols, parts)
    assert np.array_equal(native.dequantize(stored.format, matrix, rows, cols), stored.values)


@pytest.mark.parametrize("format", [*INTS, *UINTS])
def test_what_compressed_tensors_packs_keeps_its_values(format: str) -> None:
    for rows, cols in SHAPES:
        stored = Stored.random(format, rows, cols)
        require_values(stored, stored.compressed_tensors())
        if stored.bits == 8:
            require_values(stored, stored.int8())


@pytest.mark.parametrize("format", [*INTS, *UINTS])
def test_what_gptq_packs_keeps_its_values(format: str) -> None:
    for rows, cols in [(32, 32), (64, 160), (96, 256)]:
        for version in (1, 2):
            stored = Stored.random(format, rows, cols, least_zero=2 - version)
            require_values(stored, stored.gptq(version))


@pytest.mark.parametrize("format", [name for name in FORMATS if name.startswith(("int4", "uint4"))])
def test_what_awq_packs_keeps_its_values(format: str) -> None:
    for rows, cols in [(8, 32), (16, 128), (40, 160)]:
        stored = Stored.random(format, rows, cols)
        require_values(stored, stored.awq())


@pytest.mark.parametrize("format", AFFINES)
def test_what_mlx_packs_keeps_its_values(format: str) -> None:
    for rows, cols in SHAPES:
        stored = Stored.random(format, rows, cols)
        require_values(stored, stored.mlx())


@pytest.mark.parametrize("format", [*INTS, *UINTS])
def test_a_scale_of_a_channel_serves_all_its_groups(format: str) -> None:
    stored = Stored.random(format, 64, 352, per_channel=True, least_zero=1)
    require_values(stored, stored.compressed_tensors())
    for version in (1, 2):
        require_values(stored, stored.gptq(version))
    if stored.bits == 8:
        require_values(stored, stored.int8())


def test_parts_land_in_any_order() -> None:
    stored = Stored.random("uint4_64_bf16", 40, 160)
    found = [landed(stored.format, 40, 160, dict(each)) for each in permutations(stored.awq().items())]
    assert len(found) == 6
    assert all(np.array_equal(each, found[0]) for each in found)


@pytest.mark.covering(1)
@pytest.mark.parametrize("format", FORMATS)
def test_products_match_the_values(format: str, instruction_set: str) -> None:  # noqa: F811
    """They are equal up to the rounding of float32 sums, for activations that are integers times their scale.

    A code times the scale, and the min, are summed apart: the bound is that of both.
    """
    rows, cols = 37, 288
    stored = Stored.random(format, rows, cols)
    memory = landed(
        format, rows, cols, stored.mlx() if stored.kind == "affine" else stored.compressed_tensors()
    )
    matrix = native.Matrix(memory, 0, format, rows, cols)
    x = np.random.default_rng(3).integers(-126, 127, (11, cols)).astype(np.float32)
    x[:, ::32] = 127  # makes each group's scale one
    runtime = native.Runtime(2, instruction_set=instruction_set)
    out, alone = np.empty((11, rows), np.float32), np.empty((1, rows), np.float32)
    native.matmul(runtime, [matrix], x, [out])
    values = stored.values.astype(np.float64)
    largest = np.abs(values).max(axis=1) * 2
    assert np.all(np.abs(out - x @ values.T) <= 2e-6 * np.abs(x).sum(axis=1)[:, None] * largest)
    for token in range(11):
        native.matmul(runtime, [matrix], x[token : token + 1], [alone])
        assert np.array_equal(alone[0], out[token])
    runtime.close()


@pytest.mark.parametrize("kind", ["affine8_64_bf16", "int8_128_f16", "uint8_32_bf16"])
def test_eight_bits_take_sixteen_bit_activations(kind: str) -> None:
    """Activations of 8 bits would err by up to 1 / 254 of the group's largest, those of 16 bits by 1 / 65024."""
    rows, cols = 16, 256
    stored = Stored.random(kind, rows, cols)
    memory = landed(
        kind, rows, cols, stored.mlx() if stored.kind == "affine" else stored.compressed_tensors()
    )
    x = np.random.default_rng(3).standard_normal((5, cols)).astype(np.float32)
    out = np.empty((5, rows), np.float32)
    runtime = native.Runtime(1)
    native.matmul(runtime, [native.Matrix(memory, 0, kind, rows, cols)], x, [out])
    runtime.close()
    exact = x.astype(np.float64) @ stored.values.T.astype(np.float64)
    assert np.abs(out - exact).max() < 1e-4 * np.abs(exact).max()


@pytest.mark.parametrize("scale", ["f16", "bf16"])
def test_scales_and_biases_are_finite(scale: str) -> None:
    for value in (np.inf, -np.inf, np.nan):
        for part in ("scales", "channel_scales", "scales_by_group"):
            require_refused(f"uint4_32_{scale}", part, value)
        require_refused(f"affine4_32_{scale}", "biases", value)


def require_refused(format: str, part: str, value: float) -> None:
    rows, cols = 17, 64
    values = np.ones(rows if part == "channel_scales" else rows * 2, np.float32)
    for place in (0, -1):
        damaged = values.copy()
        damaged[place] = value
        bits = (
            damaged.astype(np.float16).view(np.uint16)
            if format.endswith("_f16")
            else damaged.view(np.uint32) >> 16
        )
        with pytest.raises(ValueError, match="not a finite number"):
            native.transcode(f"{format}:{part}", raw(bits.astype(np.uint16)), rows, cols)


@pytest.mark.parametrize("format", UINTS)
def test_a_stored_zero_of_all_ones_is_refused_in_the_first_version_of_gptq(format: str) -> None:
    """AutoGPTQ reads it as 0, others as 2^bits."""
    stored = Stored.random(format, 32, 64)
    for part, groups in (("gptq_zeros", stored.zeros.shape[1]), ("gptq_channel_zeros", 1)):
        zeros = np.zeros((groups, 32), np.int64)
        for place in (0, -1):
            damaged = zeros.copy()
            damaged.reshape(-1)[place] = (1 << stored.bits) - 1
            with pytest.raises(ValueError, match="a stored zero with all bits set"):
                native.transcode(f"{format}:{part}", raw(packed(damaged, stored.bits, 1)), 32, 64)


def test_columns_whose_groups_are_not_in_order_are_refused() -> None:
    cols = np.arange(192, dtype=np.int32)
    for part, groups in (("g_idx", cols // 64), ("channel_g_idx", cols * 0)):
        before = np.full(native.matrix_bytes("uint4_64_f16", 8, 192), 0xA5, np.uint8)
        found = native.transcode(f"uint4_64_f16:{part}", raw(groups), 8, 192, out=before)
        assert np.all(found == 0xA5)
        for place in (0, 63, 64, 191):
            for wrong in (-1, 3, groups[place] + 1):
                damaged = groups.copy()
                damaged[place] = wrong
                with pytest.raises(ValueError, match="groups are not in order"):
                    native.transcode(f"uint4_64_f16:{part}", raw(damaged), 8, 192)


@pytest.mark.parametrize(
    ("name", "rows", "cols", "reason"),
    [
        ("uint4_32_f16:awq_codes", 12, 32, "whole words"),
        ("uint3_32_f16:gptq_zeros", 16, 32, "whole words"),
        ("uint4_128_f16:codes", 16, 48, "multiple of 32"),
        ("uint4_48_f16:codes", 16, 48, "unknown block type"),
        ("uint4_32_f32:codes", 16, 32, "unknown block type"),
        ("int4_32_f16:zeros", 16, 32, "unknown block type"),
        ("int4_32_f16:biases", 16, 32, "unknown block type"),
        ("affine4_32_f16:gptq_codes", 16, 32, "unknown block type"),
        ("affine5_32_f16:", 16, 32, "unknown block type"),
        ("uint2_32_f16:awq_codes", 16, 32, "unknown block type"),
    ],
)
def test_impossible_parts_are_refused(name: str, rows: int, cols: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        native.transcode(name, np.zeros(rows * cols // 2, np.uint8), rows, cols)


def test_grouped_parts_are_not_interleaved() -> None:
    with pytest.raises(ValueError, match="cannot be interleaved"):
        native.transcode("uint4_32_f16:codes", np.zeros(512, np.uint8), 16, 32, 2)


PACKED = Path(__file__).with_name("packed_weights.npz")


def packed_by_others() -> dict[str, dict[str, np.ndarray]]:
    """Return the arrays of `make_packed_weights.py` by format and packer."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(PACKED) as arrays:
        for name in arrays.files:
            format, packer, part = name.split("/")
            found.setdefault(f"{format}/{packer}", {})[part] = arrays[name]
    return found


@pytest.mark.parametrize("name", packed_by_others())
def test_what_other_programs_pack_has_the_values_that_they_read(name: str) -> None:
    parts = packed_by_others()[name]
    values, format = parts.pop("values"), name.partition("/")[0]
    rows, cols = values.shape
    matrix = landed(format, rows, cols, {part: raw(each) for part, each in parts.items()})
    if format in ACT_ORDER_FORMATS:
        native.put_in_act_order(format, matrix, rows, cols)
    found = native.dequantize(format, matrix, rows, cols)
    # mlx adds a bias in a fused multiply-add, or after it has rounded the product, which is exact here.
    assert np.array_equal(found, values)
