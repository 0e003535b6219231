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

from collections.abc import Iterator

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
    keeps_panels = is_panelled(ref.format) and _ends_at_panels(heads)
    key_format: Format = "f16" if is_quantised(ref.format) else ref.format
    value_format: Format = ref.format if keeps_panels else key_format
    return (
        (key_format, heads.num_heads * ref.cols, heads.key_rows),
        (value_format, heads.num_heads * heads.value_rows, ref.cols),
    )


def passing_bytes(ref: MatrixRef) -> int:
    """Bytes of memory, beside the matrix and what becomes of it, that `split` takes."""
    heads = _rows(ref)
    rows = (heads.key_rows + heads.value_rows) * (1 if _ends_at_panels(heads) else heads.num_heads)
    return 3 * 4 * rows * ref.cols  # as float32, and numpy's copies of it


def split(ref: MatrixRef, matrix: Bytes, keys: Bytes, values: Bytes) -> None:
    """Write k_up and v_up of a matrix; `matrix` holds it as `ref` says, landed."""
    heads = _rows(ref)
    (key_format, _, _), (value_format, _, _) = split_shapes(ref)
    key_bytes, value_bytes = len(keys) // heads.num_heads, len(values) // heads.num_heads
    for head, (raw, exact) in enumerate(_heads(ref, matrix)):
        key_place = keys[head * key_bytes : (head + 1) * key_bytes].view(exact.dtype)
        key_place.reshape(ref.cols, heads.key_rows)[:] = exact[: heads.key_rows].T
        value_place = values[head * value_bytes : (head + 1) * value_bytes]
        if value_format == key_format:
            value_place.view(exact.dtype).reshape(heads.value_rows, ref.cols)[:] = exact[heads.key_rows :]
        else:
            value_place[:] = raw[len(raw) - value_bytes :]


def _rows(ref: MatrixRef) -> KeyValueRows:
    assert ref.key_value_rows is not None
    return ref.key_value_rows


def _ends_at_panels(heads: KeyValueRows) -> bool:
    return heads.key_rows % PANEL_ROWS == 0 and heads.value_rows % PANEL_ROWS == 0


def _heads(ref: MatrixRef, matrix: Bytes) -> Iterator[tuple[Bytes, NDArray[np.generic]]]:
    """The bytes of each head, and its rows: float formats as whole numbers of their size, all others as float16."""
    heads = _rows(ref)
    rows = heads.key_rows + heads.value_rows
    if not is_quantised(ref.format):
        element = np.uint32 if ref.format == "f32" else np.uint16
        for raw in matrix.reshape(heads.num_heads, -1):
            yield raw, raw.view(element).reshape(rows, ref.cols)
        return
    if is_panelled(ref.format) and _ends_at_panels(heads):
        nbytes = matrix_bytes(ref.format, rows, ref.cols)
        for head in range(heads.num_heads):
            raw = matrix[head * nbytes : (head + 1) * nbytes]
            yield raw, _native.dequantize(ref.format, raw, rows, ref.cols).astype(np.float16)
        return
    whole = _native.dequantize(ref.format, matrix, ref.rows, ref.cols)
    for each in whole.reshape(heads.num_heads, rows, ref.cols):
        yield matrix[:0], each.astype(np.float16)
