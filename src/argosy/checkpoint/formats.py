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
