"""The formats of matrices in memory, and their sizes.

`docs/internals/formats.md` describes each, and says how to add one.

Elsewhere: `native/kernels/formats.h` describes their layouts; `block_types.py` says which formats hold the blocks of
files; `landing.py` converts the bytes of files.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from argosy import _native
from argosy.config import Format
from argosy.errors import UnsupportedModel

BYTES_PER_VALUE = {"f32": 4, "f16": 2, "bf16": 2}

# Layout numbers of native/kernels/formats.h.
PANEL_ROWS = _native.PANEL_ROWS  # quantised: number of interleaved rows
F8_BLOCK = _native.F8_BLOCK  # f8: rows and columns of a block, whose weights share a scale


def is_quantised(format: Format) -> bool:
    """Whether converting weights to this format loses precision for good."""
    return format not in BYTES_PER_VALUE


@cache
def matrix_bytes(format: Format, rows: int, cols: int) -> int:
    """Return the bytes of a matrix in a format.

    Raises:
        UnsupportedModel: the matrix has more rows or columns than kernels support.
    """
    if max(rows, cols) > _native.LARGEST_SIZE:
        raise UnsupportedModel(
            f"a matrix of {rows} x {cols} is too large; supported: at most {_native.LARGEST_SIZE} rows and columns"
        )
    return _native.matrix_bytes(format, rows, cols)


def order_bytes(format: Format, cols: int) -> int:
    """Return the bytes behind a matrix's panels that say which columns they hold: none without act-order."""
    return matrix_bytes(format, 0, cols)


def row_offset(format: Format, row: int, cols: int) -> int:
    """Return where a row begins in a matrix, if rows can be split there (`rows_together`)."""
    return matrix_bytes(format, row, cols) - order_bytes(format, cols)


class MatrixShape(NamedTuple):
    """A matrix in memory."""

    format: Format
    rows: int
    cols: int

    @property
    def nbytes(self) -> int:
        return matrix_bytes(*self)


def rows_together(format: Format) -> int:
    """Return how many rows are stored as a unit: a matrix may be split after any multiple of this."""
    if format in BYTES_PER_VALUE:
        return 1
    return F8_BLOCK if format == "f8" else PANEL_ROWS


def round_up(count: int, multiple: int) -> int:
    """Round `count` up to a multiple of `multiple`."""
    return -(-count // multiple) * multiple


class Fp8Parts(NamedTuple):
    """The format of an FP8 matrix, and the block types of its two tensors."""

    format: Format
    codes: str
    scales: str


# dtype of scales -> the end of their block type.
_FP8_SCALES = {"F32": "", "BF16": "_bf16", "F16": "_f16", "F8_E8M0": "_e8m0", "U8": "_e8m0"}
_FP8_GROUP = 32  # columns that share a scale, in the formats with a scale for each row


def fp8_parts(shape: tuple[int, int], block: tuple[int, int], scale_dtype: str) -> Fp8Parts | None:
    """Return how to hold an E4M3 matrix whose scales, of safetensors dtype `scale_dtype`, each cover a block.

    The block has `block` rows and columns: (1, cols) with a scale for each row, `shape` with a single one. None: no
    format holds them exactly.
    """
    end = _FP8_SCALES.get(scale_dtype)
    if end is None or min(block) < 1:
        return None
    is_power = end == "_e8m0"
    # A block that reaches the edge covers as many rows or columns as we like.
    rows, cols = (
        size if size < whole else round_up(whole, F8_BLOCK) for size, whole in zip(block, shape, strict=True)
    )
    if not is_power and block[1] >= shape[1]:
        if block[0] >= shape[0]:
            return Fp8Parts("f8", "f8_codes", "f8_scale" + end)
        if block[0] == 1:
            return Fp8Parts("f8_row", "f8_row_codes", "f8_row_scales" + end)
    if rows % F8_BLOCK == 0 and cols % F8_BLOCK == 0:
        return Fp8Parts("f8", "f8_codes", f"f8_scales{end}_{rows}x{cols}")
    if cols % _FP8_GROUP:
        return None
    if is_power:
        return Fp8Parts("mxfp8", "mxfp8_codes", f"mxfp8_scales_{rows}x{cols}")
    return Fp8Parts("f8_32", "f8_32_codes", f"f8_32_scales{end}_{rows}x{cols}")
