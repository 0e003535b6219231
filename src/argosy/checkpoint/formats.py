"""The formats of matrices in memory, and their sizes.

`docs/internals/formats.md` describes each, and says how to add one.

Elsewhere: `native/kernels/formats.h` has their layouts; `block_types.py` says which of them hold the blocks of files;
`landing.py` turns the bytes of files into them.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from argosy import _native
from argosy.config import Format
from argosy.errors import UnsupportedModel

BYTES_PER_VALUE = {"f32": 4, "f16": 2, "bf16": 2}

# Layout numbers of native/kernels/formats.h.
PANEL_ROWS = _native.PANEL_ROWS  # quantised: rows that are interleaved
F8_BLOCK = _native.F8_BLOCK  # f8: rows and columns of a block; its weights share a scale


def is_quantised(format: Format) -> bool:
    """Whether converting weights to this format loses precision for good."""
    return format not in BYTES_PER_VALUE


@cache
def matrix_bytes(format: Format, rows: int, cols: int) -> int:
    """Bytes of a matrix in a format.

    Raises:
        UnsupportedModel: it has more rows or columns than a kernel can have.
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
    """How many rows are stored as a unit: a matrix may be split after any multiple of this."""
    if format in BYTES_PER_VALUE:
        return 1
    return F8_BLOCK if format == "f8" else PANEL_ROWS


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple
