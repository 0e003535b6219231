"""Split the matrix that makes keys and values of a latent vector in two, as absorbed attention takes it.

    kv_up [heads * (key + value), rank]  ->  k_up [heads * rank, key]    the key half of each head, transposed
                                             v_up [heads * value, rank]  the value half of each head

Absorbed attention multiplies a query with the transposed key half, so memory holds that and not the key half: each
weight is there once, and both products read rows in order. Weights of float formats keep their bits. Groups of
quantised weights lie along the rank and cannot be turned without quantising again: the key half becomes float16, which
is off by a thirtieth of a step of q8's quants at most, and by less of the others'. The value half stays as it is where
heads end where panels do.

Elsewhere: when this happens is `model/weights.py`; the arithmetic is native/ops/latent_attention.h.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import (
    PANEL_ROWS,
    KeyValueRows,
    MatrixRef,
    is_panelled,
    is_quantised,
    matrix_bytes,
)
from argosy.config import Format

Bytes = NDArray[np.uint8]
Shape = tuple[Format, int, int]  # format, rows, columns


def split_shapes(ref: MatrixRef) -> tuple[Shape, Shape]:
    """What k_up and v_up of a matrix are in memory."""
    heads = _rows(ref)
    key_format: Format = "f16" if is_quantised(ref.format) else ref.format
    value_format: Format = ref.format if _keeps_panels(ref) else key_format
    return (
        (key_format, heads.num_heads * ref.cols, heads.key_rows),
        (value_format, heads.num_heads * heads.value_rows, ref.cols),
    )


def passing_bytes(ref: MatrixRef) -> int:
    """Bytes of memory, beside the matrix and what becomes of it, that `split` takes."""
    heads = _rows(ref)
    if not is_quantised(ref.format):
        return 0
    rows = heads.key_rows if _keeps_panels(ref) else ref.rows
    return (4 + 2) * rows * ref.cols  # as float32, then as float16


def split(ref: MatrixRef, matrix: Bytes, keys: Bytes, values: Bytes) -> None:
    """Write k_up and v_up of a matrix; `matrix` holds it as `ref` says, landed."""
    num_heads, key_rows, value_rows = _rows(ref)
    if _keeps_panels(ref):
        heads = matrix.reshape(num_heads, -1)
        key_bytes = matrix_bytes(ref.format, key_rows, ref.cols)
        values.reshape(num_heads, -1)[:] = heads[:, key_bytes:]
        turned = keys.view(np.float16).reshape(num_heads, ref.cols, key_rows)
        for head, place in zip(heads, turned, strict=True):
            exact = _native.dequantize(ref.format, head[:key_bytes], key_rows, ref.cols)
            place[:] = exact.astype(np.float16).T
        return
    weights: NDArray[np.generic]
    if is_quantised(ref.format):
        weights = _native.dequantize(ref.format, matrix, ref.rows, ref.cols).astype(np.float16)
    else:
        weights = matrix.view(np.uint32 if ref.format == "f32" else np.uint16)  # their bits, to be moved
    rows = weights.reshape(num_heads, key_rows + value_rows, ref.cols)
    keys.view(weights.dtype).reshape(num_heads, ref.cols, key_rows)[:] = rows[:, :key_rows].transpose(0, 2, 1)
    values.view(weights.dtype).reshape(num_heads, value_rows, ref.cols)[:] = rows[:, key_rows:]


def _rows(ref: MatrixRef) -> KeyValueRows:
    assert ref.key_value_rows is not None
    return ref.key_value_rows


def _keeps_panels(ref: MatrixRef) -> bool:
    """Whether the halves of a head are whole panels."""
    _, key_rows, value_rows = _rows(ref)
    return is_panelled(ref.format) and key_rows % PANEL_ROWS == 0 and value_rows % PANEL_ROWS == 0
