"""Split the matrix that turns latent vectors into keys and values, as absorbed attention needs it.

    kv_up [heads * (key + value), rank]  ->  k_up [heads * rank, key]    the key half of each head, transposed
                                             v_up [heads * value, rank]  the value half of each head

Absorbed attention multiplies a query by the transposed key half, so memory holds the transpose instead of the key
half: each weight is stored once, and both products read rows in order.

- Float formats keep their bits.
- f8 has scales for square blocks: it keeps its bits if each half of a head is whole blocks, and otherwise becomes
  float32. The other FP8 formats keep the value half if each half of a head is whole stretches; the rest becomes
  float32.
- Groups of other quantised weights run along the rank and cannot be transposed without requantising. The key half
  becomes float16, which is off by at most a thirtieth of a quantisation step for q8, and by less for other formats.
  The value half is unchanged if each half of a head is whole panels; otherwise, and with act-order, it also becomes
  float16.

Packs store the two halves; for all other sources the split happens while the matrix lands.

Elsewhere: `landing.py` calls this; native/ops/latent_attention.h does the arithmetic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.formats import F8_BLOCK, MatrixShape, is_quantised, matrix_bytes, rows_together
from argosy.config import ACT_ORDER_FORMATS, F8_FORMATS, Format

Bytes = NDArray[np.uint8]


class KeyValueRows(NamedTuple):
    """Row order of the matrix that turns latent vectors into keys and values: head by head, key first."""

    num_heads: int
    key_rows: int
    value_rows: int


class KeyValueMatrix(NamedTuple):
    """The whole kv_up in memory."""

    format: Format
    head: KeyValueRows
    rank: int

    @property
    def num_rows(self) -> int:
        return self.head.num_heads * (self.head.key_rows + self.head.value_rows)


def split_shapes(kv_up: KeyValueMatrix) -> tuple[MatrixShape, MatrixShape]:
    """Return the shapes of k_up and v_up."""
    format, head, rank = kv_up
    whole_format: Format = "f32" if format in F8_FORMATS else "f16"
    value_format: Format = format if _is_cut_between_heads(kv_up) else whole_format
    key_format: Format = value_format if not is_quantised(format) or format == "f8" else whole_format
    return (
        MatrixShape(key_format, head.num_heads * rank, head.key_rows),
        MatrixShape(value_format, head.num_heads * head.value_rows, rank),
    )


def passing_bytes(kv_up: KeyValueMatrix) -> int:
    """Return the bytes that `split` takes in addition to its input and its outputs."""
    key, value = split_shapes(kv_up)
    if key.format == kv_up.format:
        return 0
    rows = kv_up.head.key_rows if value.format == kv_up.format else kv_up.num_rows
    return (4 + 2) * rows * kv_up.rank  # as float32, and as float16 where needed


def split(kv_up: KeyValueMatrix, matrix: Bytes, keys: Bytes, values: Bytes) -> None:
    """Write k_up and v_up of the matrix with the bytes `matrix`."""
    format, head, rank = kv_up
    key_shape, value_shape = split_shapes(kv_up)
    if value_shape.format != format:
        exact = _native.dequantize(format, matrix, kv_up.num_rows, rank)
        exact = exact.astype(np.float32 if value_shape.format == "f32" else np.float16, copy=False)
        _split_whole(exact.reshape(head.num_heads, -1, rank), head.key_rows, keys, values)
        return
    heads = matrix.reshape(head.num_heads, -1)
    if not is_quantised(format):
        bits = heads.view(np.uint32 if format == "f32" else np.uint16)
        _split_whole(bits.reshape(head.num_heads, -1, rank), head.key_rows, keys, values)
        return
    key_bytes = matrix_bytes(format, head.key_rows, rank)
    values.reshape(head.num_heads, -1)[:] = heads[:, key_bytes:]
    for one, place in zip(heads, keys.reshape(head.num_heads, -1), strict=True):
        if key_shape.format == "f8":
            _turn_f8(one[:key_bytes], head.key_rows, rank, place)
        else:
            exact = _native.dequantize(format, one[:key_bytes], head.key_rows, rank)
            number = np.float32 if key_shape.format == "f32" else np.float16
            place.view(number).reshape(rank, head.key_rows)[:] = exact.T


def _split_whole(heads: NDArray[Any], key_rows: int, keys: Bytes, values: Bytes) -> None:
    """Split [heads, key + value, rank] of numbers that have the same size in memory."""
    num_heads, rows, rank = heads.shape
    turned = keys.view(heads.dtype).reshape(num_heads, rank, key_rows)
    turned[:] = heads[:, :key_rows].transpose(0, 2, 1)
    values.view(heads.dtype).reshape(num_heads, rows - key_rows, rank)[:] = heads[:, key_rows:]


def _turn_f8(matrix: Bytes, rows: int, cols: int, out: Bytes) -> None:
    """Transpose an f8 matrix of whole blocks (layout: native/kernels/formats.h)."""
    down, across = rows // F8_BLOCK, cols // F8_BLOCK
    strips, turned = matrix.reshape(down, -1), out.reshape(across, -1)
    codes = strips[:, _native.f8_scales_bytes(cols) :].reshape(down, F8_BLOCK, across, F8_BLOCK)
    places = turned[:, _native.f8_scales_bytes(rows) :].reshape(across, F8_BLOCK, down, F8_BLOCK)
    places[:] = codes.transpose(2, 3, 0, 1)
    turned[:, : _native.f8_scales_bytes(rows)] = 0
    turned[:, : 4 * down].reshape(across, down, 4)[:] = (
        strips[:, : 4 * across].reshape(down, across, 4).transpose(1, 0, 2)
    )


def _is_cut_between_heads(kv_up: KeyValueMatrix) -> bool:
    """Whether the keys and values of each head can be separated without changing weights."""
    together = rows_together(kv_up.format)
    is_turned_whole = kv_up.format != "f8" or kv_up.rank % F8_BLOCK == 0
    if kv_up.format in ACT_ORDER_FORMATS:
        return False
    return kv_up.head.key_rows % together == 0 and kv_up.head.value_rows % together == 0 and is_turned_whole
