"""Tables of a checkpoint that stay on the drive: where their rows lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from argosy.checkpoint.block_types import SLOT_FORMATS
from argosy.checkpoint.safetensors import TensorRef
from argosy.config import Format
from argosy.errors import CheckpointError, UnsupportedModel

_FLOATS: dict[str, Format] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}

# Block type, None for plain values; then first row, file and offset of each segment.
NativePart = tuple[str | None, list[tuple[int, int, int]]]


@dataclass(frozen=True, slots=True)
class TablePart:
    """The tensors, one after another, that hold all rows, or one part of each."""

    block_type: str | None
    tensors: tuple[TensorRef, ...]


@dataclass(frozen=True, slots=True)
class TableRef:
    """A table of `num_rows` rows with `cols` values, decoded in `format` (native/ops/table_rows.h)."""

    format: Format
    num_rows: int
    cols: int
    parts: tuple[TablePart, ...]

    @classmethod
    def of(cls, tensors: Sequence[TensorRef], least_rows: int, cols: int) -> TableRef:
        """Make the table whose rows are those of `tensors`, of one type: floats, or GGUF's blocks of whole rows.

        Raises:
            CheckpointError: it has fewer rows, or rows of another length, than the config requires.
            UnsupportedModel: its type is not supported.
        """
        first, num_rows = tensors[0], sum(tensor.shape[0] for tensor in tensors)
        for tensor in tensors:
            if len(tensor.shape) != 2 or tensor.shape[1] != cols or tensor.dtype != first.dtype:
                raise CheckpointError(
                    f"{tensor.path.name}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}, expected rows of "
                    f"{cols} {first.dtype}",
                    path=tensor.path,
                    tensor=tensor.name,
                )
        if num_rows < least_rows:
            raise CheckpointError(
                f"{first.path.name}: {first.name} has {num_rows} rows, expected {least_rows}",
                path=first.path,
                tensor=first.name,
            )
        format = _FLOATS.get(first.dtype) or SLOT_FORMATS.get(first.dtype)
        if format is None:
            raise UnsupportedModel(
                f"{first.path.name}: {first.name} is {first.dtype}; supported for rows on the drive: "
                f"{', '.join((*_FLOATS, *SLOT_FORMATS))}",
                path=first.path,
                tensor=first.name,
            )
        block_type = None if first.dtype in _FLOATS else first.dtype
        return cls(format, num_rows, cols, (TablePart(block_type, tuple(tensors)),))

    @property
    def nbytes(self) -> int:
        """The bytes on the drive."""
        return sum(tensor.nbytes for part in self.parts for tensor in part.tensors)

    @property
    def row_bytes(self) -> int:
        """The bytes of a row on the drive, rounded up."""
        return -(-self.nbytes // self.num_rows)

    @property
    def paths(self) -> set[Path]:
        return {tensor.path for part in self.parts for tensor in part.tensors}

    def native_parts(self, open_file: Callable[[str], int]) -> list[NativePart]:
        """Describe the parts to `_native.TableRows`."""
        described: list[NativePart] = []
        for part in self.parts:
            row, segments = 0, []
            for tensor in part.tensors:
                segments.append((row, open_file(str(tensor.path)), tensor.offset))
                row += tensor.shape[0]
            described.append((part.block_type, segments))
        return described
