"""Write a safetensors file tensor by tensor, without holding it in memory.

    (name, dtype, shape, read) ...  ->  header from the shapes  ->  one tensor at a time  ->  fsync

The format puts the header first, so all shapes must be known before the first byte of data exists; `read` is
called once for each tensor, in order. Tensors are stored in the given order: list tensors that are read together next
to each other.

Elsewhere: `safetensors.py` reads the format. The caller renames a finished directory to make it visible at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from argosy.checkpoint.safetensors import DTYPE_BITS

Bytes: TypeAlias = bytes | bytearray | memoryview
TensorToWrite: TypeAlias = tuple[str, str, tuple[int, ...], Callable[[], Bytes]]

_NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2"}


def write_safetensors(
    path: Path, tensors: Iterable[TensorToWrite], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` to `path`; return when they are on the drive.

    Args:
        tensors: name, dtype as the format spells it ("F32", "BF16", ...), shape, and a function that returns the
            bytes: little-endian, rows first, exactly dtype times shape.
        metadata: free text for `__metadata__`.

    Raises:
        ValueError: a name appears twice, a dtype is unknown, or `read` returned the wrong number of bytes.
        OSError: the drive failed; the unfinished file remains.
    """
    planned = list(tensors)
    header = safetensors_header(((name, dtype, shape) for name, dtype, shape, _ in planned), metadata)
    with path.open("wb") as stream:
        stream.write(header)
        for name, dtype, shape, read in planned:
            data, nbytes = memoryview(read()).cast("B"), _num_bytes(dtype, shape)
            if data.nbytes != nbytes:
                raise ValueError(f"tensor {name!r} came as {data.nbytes} bytes, expected {nbytes}")
            stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def safetensors_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the bytes of a file before its first tensor; `tensors` are names, dtypes and shapes, in order of their
    bytes.

    Raises:
        ValueError: a name appears twice, or a dtype is unknown.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        if name in header:
            raise ValueError(f"tensor {name!r} is given twice")
        if dtype not in DTYPE_BITS:
            raise ValueError(f"tensor {name!r} has dtype {dtype!r}; known: {', '.join(sorted(DTYPE_BITS))}")
        end = offset + _num_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor starts at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * DTYPE_BITS[dtype] // 8


def encode(values: npt.NDArray[np.floating], dtype: str) -> bytes:
    """Return the bytes of `values` as `dtype`: F32, F16 or BF16, rounded to nearest even.

    Raises:
        ValueError: the dtype is another one, or cannot hold a number.
    """
    if dtype == "BF16":
        encoded: npt.NDArray[np.generic] = to_bfloat16_bits(values)
        is_finite = bool((np.asarray(encoded, dtype=np.uint16) & 0x7F80 != 0x7F80).all())
    elif dtype in _NUMPY_DTYPES:
        with np.errstate(over="ignore"):
            encoded = np.ascontiguousarray(values, dtype=_NUMPY_DTYPES[dtype])
        is_finite = bool(np.isfinite(encoded).all())
    else:
        raise ValueError(f"dtype {dtype!r}; supported: F32, F16, BF16")
    if not is_finite:
        raise ValueError(f"a value is not a finite number, or too large for {dtype}")
    return encoded.tobytes()


def to_bfloat16_bits(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16 bit patterns, to nearest even; NumPy has no bfloat16. NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
