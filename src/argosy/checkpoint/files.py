"""What a model is read from: the same description for a checkpoint in place and for a pack.

    model/families/  (safetensors)  ──┐
                                      ├──>  ModelFiles: config, dense matrices, expert records
    checkpoint/pack.py  (a pack)    ──┘

Everything here is a place in a file (path, offset, length), proved to lie inside it; no bytes of weights are
read. An expert is read as one piece from a pack, as three from a checkpoint with one tensor per matrix, as
two where gate and up lie fused.

Elsewhere: bytes move in `native/store/`; which experts are resident is `experts/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from argosy.checkpoint.json_strict import quote
from argosy.config import Format, ModelConfig
from argosy.errors import CheckpointError

BYTES_PER_VALUE = {"f32": 4, "f16": 2, "bf16": 2}

GROUP_COLS = 32  # quantised: columns that share a scale
PANEL_ROWS = 16  # quantised: rows that lie interleaved
_PANEL_ALIGNMENT = 64


def matrix_bytes(format: Format, rows: int, cols: int) -> int:
    """Bytes of a matrix in a format; the kernels' own rule, here without the kernels."""
    if format in BYTES_PER_VALUE:
        return rows * cols * BYTES_PER_VALUE[format]
    groups = -(-cols // GROUP_COLS)
    quant_bytes = groups * GROUP_COLS * PANEL_ROWS // (1 if format == "q8" else 2)
    scale_bytes = groups * PANEL_ROWS * 2
    panel_bytes = -(-(quant_bytes + scale_bytes) // _PANEL_ALIGNMENT) * _PANEL_ALIGNMENT
    return -(-rows // PANEL_ROWS) * panel_bytes


@dataclass(frozen=True, slots=True)
class MatrixRef:
    """One dense matrix or vector (rows = 1) in a file; `name` is what the file calls it."""

    name: str
    path: Path
    offset: int
    nbytes: int
    format: Format
    rows: int
    cols: int
    checksum: int | None = None  # crc32c_wide of the bytes; packs have one


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that one read brings."""

    path: Path
    offset: int
    nbytes: int
    checksum: int | None = None  # crc32c_wide of the bytes; packs have one


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """Where a matrix of an expert lies inside one of its pieces."""

    piece: int
    offset: int
    format: Format
    rows: int
    cols: int


@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """One routed expert: y = down (silu(gate x) * (up x))."""

    pieces: tuple[Piece, ...]
    gate: ExpertMatrix
    up: ExpertMatrix
    down: ExpertMatrix

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk. `dense` by canonical name, `experts` by (layer, expert)."""

    directory: Path
    config: ModelConfig
    dense: Mapping[str, MatrixRef]
    experts: Mapping[tuple[int, int], ExpertRecord]
    is_packed: bool = False

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of everything that each token needs."""
        return sum(ref.nbytes for ref in self.dense.values())

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts together."""
        return sum(record.nbytes for record in self.experts.values())

    @cached_property
    def expert_format(self) -> Format:
        """The format of every routed expert: `require_one_expert_format` has seen to it."""
        return next(iter(self.experts.values())).gate.format


def require_one_expert_format(experts: Mapping[tuple[int, int], ExpertRecord], directory: Path) -> None:
    """Prove that all expert matrices share one format, because one kernel call runs many experts.

    Raises:
        CheckpointError: they do not; names the first that differs.
    """
    expected: str | None = None
    for (layer, expert), record in experts.items():
        for name in ("gate", "up", "down"):
            found = getattr(record, name).format
            expected = expected or found
            if found != expected:
                raise CheckpointError(
                    f"{directory}: {name} of expert {expert} in layer {layer} is {found}, the experts before "
                    f"it are {expected}; one model has one expert format",
                    path=directory,
                    layer=layer,
                    expert=expert,
                )


def check_vector(name: str, values: npt.NDArray[np.floating], path: Path | None = None) -> None:
    """Refuse a norm or bias that would turn every token into NaN.

    Raises:
        CheckpointError: a value is NaN or infinite; names the tensor, the position and the value.
    """
    flat = values.reshape(-1)
    wrong = np.flatnonzero(~np.isfinite(flat))
    if wrong.size:
        where = f"{path.name}: " if path is not None else ""
        raise CheckpointError(
            f"{where}{quote(name)} holds {flat[wrong[0]]} at position {wrong[0]} of {flat.size}; "
            "expected finite numbers",
            hint="the file is damaged, or the model was saved broken",
            path=path,
            tensor=name,
        )
