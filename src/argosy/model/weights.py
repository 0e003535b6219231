"""Read the part that every token needs into private memory, at drive speed.

Dense weights are read, not mapped: mapped pages are the first the system takes back under pressure. Matrices stay in
the format of their file; norms and biases become float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import MatrixRef, check_vector
from argosy.checkpoint.manifest import round_up
from argosy.errors import CorruptRecord, ReadFailed

Vector = NDArray[np.float32]


def is_vector(name: str) -> bool:
    """Norms and biases; everything else is the matrix of a product."""
    return name.endswith(("norm", "_bias"))


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """matrices and float32 vectors by canonical name, and the memory the matrices lie in."""

    matrices: Mapping[str, _native.Matrix]
    vectors: Mapping[str, Vector]
    arena: _native.Arena


def _region_bytes(ref: MatrixRef, alignment: int) -> int:
    # Alignment to spare on both sides: reads are rounded outwards to whole blocks.
    return round_up(ref.offset % alignment + ref.nbytes, alignment)


def dense_footprint(refs: Mapping[str, MatrixRef], alignment: int = 4096) -> int:
    """Bytes of memory that `load_dense` will take."""
    regions = sum(_region_bytes(ref, alignment) for ref in refs.values())
    return regions + sum(4 * ref.rows * ref.cols for name, ref in refs.items() if is_vector(name))


def load_dense(
    store: _native.Store,
    refs: Mapping[str, MatrixRef],
    *,
    open_file: Callable[[str], int],
    progress: Callable[[str, float], None] | None = None,
) -> DenseWeights:
    """Read every dense tensor.

    Raises:
        ReadFailed: the drive refused.   CorruptRecord: a packed tensor does not match its checksum.
        CheckpointError: a norm or bias holds NaN or infinity.
    """
    file_ids = {path: open_file(path) for path in sorted({str(ref.path) for ref in refs.values()})}
    alignment = max(store.info(file_id)[2] for file_id in file_ids.values())
    total = sum(_region_bytes(ref, alignment) for ref in refs.values())
    arena = _native.Arena(max(1, total))
    places: dict[str, int] = {}
    in_flight: dict[int, str] = {}
    waiting = iter(refs.items())
    dest = done_bytes = 0
    matrices: dict[str, _native.Matrix] = {}
    vectors: dict[str, Vector] = {}
    try:
        while len(matrices) + len(vectors) < len(refs):
            while len(in_flight) < 16 and (following := next(waiting, None)) is not None:
                name, ref = following
                piece = (file_ids[str(ref.path)], ref.offset, ref.nbytes, dest)
                checksums = None if ref.checksum is None else [ref.checksum]
                in_flight[store.fetch(arena, [piece], checksums)] = name
                places[name] = dest + ref.offset % alignment
                dest += _region_bytes(ref, alignment)
            for ticket, message, kind in store.wait_any(list(in_flight)):
                name = in_flight.pop(ticket)
                ref = refs[name]
                if message is not None:
                    error = CorruptRecord if kind == "checksum" else ReadFailed
                    raise error(
                        f"{ref.path.name}: {ref.name}: {message}", path=str(ref.path), tensor=ref.name
                    )
                if is_vector(name):
                    raw = arena.array()[places[name] : places[name] + ref.nbytes]
                    values = _native.dequantize(ref.format, raw, ref.rows, ref.cols).reshape(-1)
                    check_vector(ref.name, values)
                    vectors[name] = values
                else:
                    matrices[name] = _native.Matrix(arena, places[name], ref.format, ref.rows, ref.cols)
                done_bytes += ref.nbytes
                if progress is not None:
                    progress("reading dense weights", min(1.0, done_bytes / max(1, total)))
    finally:
        for ticket in in_flight:
            store.cancel(ticket)
    return DenseWeights(matrices, vectors, arena)
