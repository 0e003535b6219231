"""Read the tensors of a checkpoint for a pack, some rows at a time, and convert them.

Elsewhere: `landing.py` knows how matrices are stored; `native/kernels/` does the arithmetic of q8 and q4.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from argosy import _native
from argosy.checkpoint.formats import matrix_bytes, row_offset
from argosy.checkpoint.landing import Bytes, Float32, MatrixRef, Piece, read_landed
from argosy.checkpoint.pack_contents import Source, Unit
from argosy.checkpoint.untrusted_file import open_regular, read_at
from argosy.config import Format
from argosy.errors import CheckpointError

_SLICE_VALUES = 1 << 20  # values of a matrix read and converted at once
_COPY_BYTES = 4 << 20  # bytes of a tensor copied at once


class Conversion:
    """Reads and converts; its files and threads stay open until `close`."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._open_files = ExitStack()
        self._runtime = _native.Runtime(len(os.sched_getaffinity(0)))
        self._open_files.callback(self._runtime.close)

    def close(self) -> None:
        self._open_files.close()

    def matrix(self, source: Source, format: Format) -> Iterator[tuple[int, Bytes]]:
        """Yield slices of a matrix in another format, each with its offset in the result."""
        for first, ref in source.ref.landing.slices(source.ref, _SLICE_VALUES):
            landed = read_landed(ref, self._read)
            if format == ref.format:
                yield (
                    row_offset(format, first, ref.cols),
                    ref.landing.matrices(ref, landed)[source.number],
                )
                continue
            for row, values in ref.landing.values(ref, landed, source.number, _SLICE_VALUES):
                start = row_offset(format, first + row, values.shape[1])
                yield start, self._convert_values(ref, values, format)

    def _convert_values(self, ref: MatrixRef, values: Float32, format: Format) -> Bytes:
        """Convert rows of a matrix [rows, cols] to another format.

        Raises:
            CheckpointError: a value is not a number, or is too large for the format.
        """
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{ref.path.name}: {ref.name} holds a value that is not a finite number",
                path=ref.path,
                tensor=ref.name,
            )
        if format == "f32":
            return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        if format == "bf16":
            rounded = round_to_bf16(values)
            if ((rounded & 0x7F80) == 0x7F80).any():
                raise CheckpointError(
                    f"{ref.path.name}: {ref.name} holds {np.abs(values).max():.9g}, too large for bf16",
                    path=ref.path,
                    tensor=ref.name,
                )
            return rounded.reshape(-1).view(np.uint8)
        out = np.zeros(matrix_bytes(format, *values.shape), np.uint8)
        _native.quantize(format, np.ascontiguousarray(values), out, self._runtime)
        return out

    def _read(self, piece: Piece) -> bytes:
        return read_at(self._open_source(piece.path), piece.nbytes, piece.offset, piece.path)

    def _open_source(self, path: Path) -> int:
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            descriptor = self._open_files.enter_context(open_regular(path))[0]
            self._descriptors[path] = descriptor
        return descriptor

    def copied(self, unit: Unit) -> Iterator[tuple[int, Bytes]]:
        """Yield slices of a tensor or a header, each with its offset."""
        if isinstance(unit.copied, bytes):
            yield 0, np.frombuffer(unit.copied, np.uint8)
            return
        path = unit.copied.path
        for start in range(0, unit.nbytes, _COPY_BYTES):
            nbytes = min(_COPY_BYTES, unit.nbytes - start)
            raw = read_at(self._open_source(path), nbytes, unit.copied.offset + start, path)
            yield start, np.frombuffer(raw, np.uint8)


def round_to_bf16(values: Float32) -> npt.NDArray[np.uint16]:
    """Round finite numbers to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits >> 16) & 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    return rounded.astype(np.uint16)
