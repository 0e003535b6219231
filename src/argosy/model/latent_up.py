"""Split the matrix that makes keys and values of a latent vector in two, as absorbed attention takes it.

    kv_up [heads * (key + value), rank]  ->  k_up [heads * rank, key]    the key half of each head, transposed
                                             v_up [heads * value, rank]  the value half of each head

Absorbed attention multiplies a query with the transposed key half, so memory holds that and not the key half: each
weight is there once, and both products read rows in order. Weights of float formats keep their bits, and so do those of
f8, whose scales are of square blocks, where halves of a head are whole blocks; elsewhere these become float32. Groups
of other quantised weights lie along the rank and cannot be turned without quantising again: the key half becomes
float16, which is off by a thirtieth of a step of q8's quants at most, and by less of the others'. Their value half
stays as it is where halves of a head are whole panels, and becomes float16, too, where they are not.

Elsewhere: when this happens is `model/weights.py`; the arithmetic is native/ops/latent_attention.h.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import (
    F8_BLOCK,
    KeyValueRows,
    MatrixRef,
    f8_scales_bytes,
    is_quantised,
    matrix_bytes,
    rows_together,
)
from argosy.config import Format

Bytes = NDArray[np.uint8]
Shape = tuple[Format, int, int]  # format, rows, columns


def split_shapes(ref: MatrixRef) -> tuple[Shape, Shape]:
    """What k_up and v_up of a matrix are in memory."""
    num_heads, key_rows, value_rows = _rows(ref)
    whole_format: Format = "f32" if ref.format == "f8" else "f16"
    value_format: Format = ref.format if _is_cut_between_heads(ref) else whole_format
    key_format: Format = "f16" if is_quantised(ref.format) and ref.format != "f8" else value_format
    return (key_format, num_heads * ref.cols, key_rows), (value_format, num_heads * value_rows, ref.cols)


def passing_bytes(ref: MatrixRef) -> int:
    """Bytes of memory, beside the matrix and what becomes of it, that `split` takes."""
    (key_format, _, key_rows), (value_format, _, _) = split_shapes(ref)
    if key_format == ref.format:
        return 0
    rows = key_rows if value_format == ref.format else ref.rows
    return (4 + 2) * rows * ref.cols  # as float32, then as float16 where that is wanted


def split(ref: MatrixRef, matrix: Bytes, keys: Bytes, values: Bytes) -> None:
    """Write k_up and v_up of a matrix; `matrix` holds it as `ref` says, landed."""
    (key_format, _, _), (value_format, _, _) = split_shapes(ref)
    num_heads, key_rows, _ = _rows(ref)
    if value_format != ref.format:
        exact = _native.dequantize(ref.format, matrix, ref.rows, ref.cols)
        exact = exact.astype(np.float32 if value_format == "f32" else np.float16, copy=False)
        _split_whole(exact.reshape(num_heads, -1, ref.cols), key_rows, keys, values)
        return
    heads = matrix.reshape(num_heads, -1)
    if not is_quantised(ref.format):
        bits = heads.view(np.uint32 if ref.format == "f32" else np.uint16)
        _split_whole(bits.reshape(num_heads, -1, ref.cols), key_rows, keys, values)
        return
    key_bytes = matrix_bytes(ref.format, key_rows, ref.cols)
    values.reshape(num_heads, -1)[:] = heads[:, key_bytes:]
    for head, place in zip(heads, keys.reshape(num_heads, -1), strict=True):
        if key_format == "f8":
            _turn_f8(head[:key_bytes], key_rows, ref.cols, place)
        else:
            exact = _native.dequantize(ref.format, head[:key_bytes], key_rows, ref.cols).astype(np.float16)
            place.view(np.float16).reshape(ref.cols, key_rows)[:] = exact.T


def _split_whole(heads: NDArray[Any], key_rows: int, keys: Bytes, values: Bytes) -> None:
    """Split [heads, key + value, rank] of numbers that take so many bytes in memory, too."""
    num_heads, rows, rank = heads.shape
    turned = keys.view(heads.dtype).reshape(num_heads, rank, key_rows)
    turned[:] = heads[:, :key_rows].transpose(0, 2, 1)
    values.view(heads.dtype).reshape(num_heads, rows - key_rows, rank)[:] = heads[:, key_rows:]


def _turn_f8(matrix: Bytes, rows: int, cols: int, out: Bytes) -> None:
    """Transpose an f8 matrix of whole blocks (layout: native/kernels/formats.h)."""
    down, across = rows // F8_BLOCK, cols // F8_BLOCK
    strips, turned = matrix.reshape(down, -1), out.reshape(across, -1)
    codes = strips[:, f8_scales_bytes(cols) :].reshape(down, F8_BLOCK, across, F8_BLOCK)
    places = turned[:, f8_scales_bytes(rows) :].reshape(across, F8_BLOCK, down, F8_BLOCK)
    places[:] = codes.transpose(2, 3, 0, 1)
    turned[:, : f8_scales_bytes(rows)] = 0
    turned[:, : 4 * down].reshape(across, down, 4)[:] = (
        strips[:, : 4 * across].reshape(down, across, 4).transpose(1, 0, 2)
    )


def _rows(ref: MatrixRef) -> KeyValueRows:
    assert ref.key_value_rows is not None
    return ref.key_value_rows


def _is_cut_between_heads(ref: MatrixRef) -> bool:
    """Whether keys and values of a head can be told apart without touching weights."""
    _, key_rows, value_rows = _rows(ref)
    together = rows_together(ref.format)
    is_turned_whole = ref.format != "f8" or ref.cols % F8_BLOCK == 0
    return key_rows % together == 0 and value_rows % together == 0 and is_turned_whole
