"""Turn the bytes of a file into matrices: for loading and for packing, for one tensor or for an expert.

    MatrixRef  ->  pieces  ->  readers, which transcode while bytes arrive  ->  Landing.land  ->  matrices

A `Landing` is a way to store a tensor, with a class for each way: it knows the pieces to read, the matrices that they
become, the memory that this takes, and how to do it. No other code distinguishes the ways.

    Landing         floats row after row, or a slot format: the bytes of the file are the matrix
    Transcoded      blocks of a GGUF; or codes, scales and other parts that safetensors holds as separate tensors
    PairedRows      rows of q and k in the order of adjacent rotary pairs
    Widened         blocks that become float32, for encoders
    Exact           the same of codes and scales in separate tensors, for rows that score experts
    Indices         integers that become float32, for tables of experts
    TapsFirst       weights of a convolution
    Strided         values that are not contiguous
    Halves          keys and values in one matrix (`latent_up.py`)

Loading uses asynchronous readers, which read into the matrix's own memory wherever possible. Packing reads with
`read_landed`, a few rows at a time if the file stores rows.

Elsewhere: `native/kernels/transcode.h` does the arithmetic of blocks; `formats.py` lists the formats in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from argosy import _native
from argosy.checkpoint.block_types import RUNNABLE_TYPES, SLOT_FORMATS, TYPE_HINT
from argosy.checkpoint.formats import (
    BYTES_PER_VALUE,
    PANEL_ROWS,
    MatrixShape,
    matrix_bytes,
    order_bytes,
    round_up,
    row_offset,
    rows_together,
)
from argosy.checkpoint.latent_up import KeyValueMatrix, KeyValueRows, passing_bytes, split, split_shapes
from argosy.checkpoint.safetensors import TensorRef
from argosy.checkpoint.untrusted_file import open_regular, quote, read_at
from argosy.config import ACT_ORDER_FORMATS, Format
from argosy.errors import CheckpointError, UnsupportedModel

Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
_Value = TypeVar("_Value", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Transcode:
    """Blocks [rows, cols] that become a slot format while they land; `native/kernels/transcode.h` lists their types.

    A type such as "mxfp4_scales" writes its part of the panels and leaves the rest unchanged. If the rows of
    `interleaved` matrices alternate in the file, each matrix has `rows` rows, and they land one after another.
    """

    block_type: str
    format: Format
    rows: int
    cols: int
    interleaved: int = 1


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes of one read. A transcoded piece holds whole matrices, or all of their quants or scales.

    If quants and scales are two pieces, the second `completes` the first: it lands in the same memory.
    """

    path: Path
    offset: int
    nbytes: int
    checksum: int | None = None  # crc32c_wide of the bytes; packs have one
    transcode: Transcode | None = None
    completes: int | None = None  # an earlier piece of the record

    @classmethod
    def of(cls, tensor: TensorRef, transcode: Transcode | None = None, completes: int | None = None) -> Piece:
        """Make a piece from a checkpoint's tensor."""
        return cls(tensor.path, tensor.offset, tensor.nbytes, transcode=transcode, completes=completes)

    @property
    def landed_bytes(self) -> int:
        """The bytes that the piece takes in memory."""
        if (blocks := self.transcode) is None:
            return self.nbytes
        return blocks.interleaved * matrix_bytes(blocks.format, blocks.rows, blocks.cols)

    def inset(self, alignment: int) -> int:
        """Return the bytes from its place to its first byte: plain reads are rounded outwards to the alignment of
        O_DIRECT.
        """
        return 0 if self.transcode is not None else self.offset % alignment

    def place_bytes(self, alignment: int) -> int:
        """Return the bytes of its place, which begins at a multiple of `alignment` unless the piece is transcoded."""
        if self.transcode is not None:
            return self.landed_bytes
        return round_up(self.inset(alignment) + self.nbytes, alignment)

    def read_into(self, place: int, file_id: int) -> _native.Piece:
        """Return the read for a `_native.Store`."""
        where = (file_id, self.offset, self.nbytes, place)
        if (blocks := self.transcode) is None:
            return where
        return (*where, blocks.block_type, blocks.rows, blocks.cols, blocks.interleaved)


class Landing:
    """The file's bytes are the matrix; the base of all other ways.

    `land` gets the first piece, and the pieces that complete it, as they landed in memory. The matrices begin at the
    same place, unless `needs_scratch` is set.
    """

    __slots__ = ()

    @property
    def needs_scratch(self) -> bool:
        """Whether pieces need memory apart from the matrices, because `land` uses both."""
        return False

    def pieces(self, ref: MatrixRef) -> tuple[Piece, ...]:
        """The pieces to read; those after the first complete it."""
        return (Piece(ref.path, ref.offset, ref.nbytes, ref.checksum),)

    def own_bytes(self, ref: MatrixRef) -> int:
        """The bytes of pieces that belong only to this matrix."""
        return ref.read_bytes

    def shapes(self, name: str, ref: MatrixRef) -> dict[str, MatrixShape]:
        """Return the matrices, by canonical name, that the tensor with the canonical name `name` becomes."""
        return {name: MatrixShape(ref.format, ref.rows, ref.cols)}

    def working_bytes(self, ref: MatrixRef) -> int:
        """The bytes that `land` takes in addition to the landed pieces and the matrices."""
        return 0

    def land(self, ref: MatrixRef, landed: Bytes, places: Sequence[Bytes]) -> None:
        """Write the matrices.

        Raises:
            CheckpointError: the matrices contain values that are not finite numbers.
        """

    def matrices(self, ref: MatrixRef, landed: Bytes) -> list[Bytes]:
        """Return the matrices in their own memory, or the landed bytes if they already are the matrix.

        Raises:
            CheckpointError: as `land`.
        """
        return [landed]

    def slices(self, ref: MatrixRef, most_values: int) -> Iterator[tuple[int, MatrixRef]]:
        """Yield parts of the matrix that can be read separately, about `most_values` values each, with their first
        row's number.
        """
        row_bytes = self._row_bytes(ref)
        if not row_bytes:
            yield 0, ref
            return
        for row, num_rows in _steps(ref, most_values):
            offset, nbytes = ref.offset + row * row_bytes, num_rows * row_bytes
            yield row, replace(ref, offset=offset, nbytes=nbytes, rows=num_rows, checksum=None)

    def _row_bytes(self, ref: MatrixRef) -> int:
        """The bytes of a row in the file; 0 if rows are not separate, as in the panels of a slot format."""
        return ref.cols * BYTES_PER_VALUE.get(ref.format, 0)

    def values(
        self, ref: MatrixRef, landed: Bytes, number: int, most_values: int
    ) -> Iterator[tuple[int, Float32]]:
        """Yield the exact weights of the matrix with this number: some rows at a time, with the number of the first."""
        matrix = self.matrices(ref, landed)[number]
        order = matrix[len(matrix) - order_bytes(ref.format, ref.cols) :]
        for row, num_rows in _steps(ref, most_values):
            start, end = (row_offset(ref.format, count, ref.cols) for count in (row, row + num_rows))
            rows = np.concatenate((matrix[start:end], order)) if len(order) else matrix[start:end]
            yield row, _native.dequantize(ref.format, rows, num_rows, ref.cols)


AS_STORED = Landing()


@dataclass(frozen=True, slots=True)
class MatrixRef:
    """One matrix or vector (rows = 1) in a file; `name` is its name in the file, and `format` its format in memory.

    Path, offset, nbytes and checksum are those of the first piece.
    """

    name: str
    path: Path
    offset: int
    nbytes: int
    format: Format
    rows: int
    cols: int
    checksum: int | None = None  # crc32c_wide of the bytes; packs have one
    landing: Landing = AS_STORED

    @classmethod
    def of(
        cls, tensor: TensorRef, format: Format, rows: int, cols: int, landing: Landing = AS_STORED
    ) -> MatrixRef:
        """Make a reference to the matrix that a tensor holds, or whose codes it holds."""
        where = tensor.name, tensor.path, tensor.offset, tensor.nbytes
        return cls(*where, format, rows, cols, tensor.checksum, landing)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces to read."""
        return self.landing.pieces(self)

    @property
    def read_bytes(self) -> int:
        """The bytes to read."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def landed_bytes(self) -> int:
        """The bytes in memory before a split."""
        return matrix_bytes(self.format, self.rows, self.cols)


@dataclass(frozen=True, slots=True)
class Transcoded(Landing):
    """Blocks that readers transcode. If they are codes alone, `others` are the pieces with scales and the like.

    If the rows of `interleaved` matrices alternate in the file, `number` says which of them this is.
    """

    block_type: str
    others: tuple[Piece, ...] = ()
    interleaved: int = 1
    number: int = 0

    def pieces(self, ref: MatrixRef) -> tuple[Piece, ...]:
        blocks = Transcode(self.block_type, ref.format, ref.rows, ref.cols, self.interleaved)
        return (Piece(ref.path, ref.offset, ref.nbytes, transcode=blocks), *self.others)

    def matrices(self, ref: MatrixRef, landed: Bytes) -> list[Bytes]:
        return [landed[self.number * ref.landed_bytes :][: ref.landed_bytes]]

    def _row_bytes(self, ref: MatrixRef) -> int:
        return 0 if self.others or self.interleaved > 1 else ref.nbytes // ref.rows


class Moved(Landing):
    """The base of ways in which `land` does work."""

    __slots__ = ()

    def matrices(self, ref: MatrixRef, landed: Bytes) -> list[Bytes]:
        places = [np.empty(shape.nbytes, np.uint8) for shape in self.shapes("", ref).values()]
        self.land(ref, landed, places)
        return places

    def _row_bytes(self, ref: MatrixRef) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class PairedRows(Moved):
    """Rows of `heads` heads in the order of a rotary kernel that rotates adjacent pairs; `land` reorders them into
    halves.

    Panels interleave rows, so blocks must be reordered before transcoding, which readers cannot do.
    """

    num_heads: int
    block_type: str | None = None

    @property
    def needs_scratch(self) -> bool:
        return self.block_type is not None

    def working_bytes(self, ref: MatrixRef) -> int:
        return ref.nbytes + (ref.landed_bytes if self.block_type is not None else 0)

    def land(self, ref: MatrixRef, landed: Bytes, places: Sequence[Bytes]) -> None:
        rows = in_halves(landed.reshape(ref.rows, -1), self.num_heads).reshape(-1)
        if self.block_type is not None:
            rows = _native.transcode(self.block_type, rows, ref.rows, ref.cols)
        places[0][:] = rows


@dataclass(frozen=True, slots=True)
class Widened(Moved):
    """Blocks whose values become float32. They land unchanged in scratch memory, so readers need no staging."""

    block_type: str

    @property
    def needs_scratch(self) -> bool:
        return True

    def working_bytes(self, ref: MatrixRef) -> int:
        return matrix_bytes(SLOT_FORMATS[self.block_type], ref.rows, ref.cols) + ref.landed_bytes

    def land(self, ref: MatrixRef, landed: Bytes, places: Sequence[Bytes]) -> None:
        panels = _native.transcode(self.block_type, landed, ref.rows, ref.cols)
        values = _native.dequantize(SLOT_FORMATS[self.block_type], panels, ref.rows, ref.cols)
        check_vector(ref.name, values)
        places[0][:] = values.reshape(-1).view(np.uint8)


@dataclass(frozen=True, slots=True)
class Exact(Moved):
    """A quantised matrix whose values become float32, because products round the other factor to multiply quants."""

    quantised: MatrixRef

    @classmethod
    def of(cls, quantised: MatrixRef) -> MatrixRef:
        """Make a reference to the values of a quantised matrix."""
        return replace(quantised, format="f32", landing=cls(quantised))

    @property
    def needs_scratch(self) -> bool:
        return True

    def pieces(self, ref: MatrixRef) -> tuple[Piece, ...]:
        return self.quantised.pieces

    def working_bytes(self, ref: MatrixRef) -> int:
        return ref.landed_bytes

    def land(self, ref: MatrixRef, landed: Bytes, places: Sequence[Bytes]) -> None:
        (matrix,) = self.quantised.landing.matrices(self.quantised, landed)
        values = _native.dequantize(self.quantised.format, matrix, ref.rows, ref.cols)
        places[0][:] = values.reshape(-1).view(np.uint8)


@dataclass(frozen=True, slots=True)
class Indices(Moved):
    """Integers from 0 to `count` - 1, of a NumPy dtype in the file, whose values become float32."""

    dtype: str
    count: int

    @property
    def needs_scratch(self) -> bool:
        return True

    def working_bytes(self, ref: MatrixRef) -> int:
        return ref.landed_bytes + ref.rows * ref.cols

    def land(self, ref: MatrixRef, landed: Bytes, places: Sequence[Bytes]) -> None:
        values = landed.view(self.dtype)
        wrong = np.flatnonzero((values < 0) | (values >= self.count))
        if wrong.size:
            raise CheckpointError(
                f"{ref.path.name}: {quote(ref.name)} holds {values[wrong[0]]} at position {wrong[0]} of {values.size}; "
                f"expected numbers from 0 to {self.count - 1}",
                path=ref.path,
                tensor=ref.name,
            )
        places[0].view(np.float32)[:] = values


@dataclass(frozen=True, slots=True)
class TapsFirst(Moved):
    """A convolution's weight with `taps` values of a channel side by side; `land` puts the channels of a tap side by
    side.
    """

    num_taps: int

    def working_bytes(self, ref: MatrixRef) -> int:
        return ref.nbytes

    def land(self, ref: MatrixRef, landed: Bytes, places: Sequence[Bytes]) -> None:
        values = landed.view(f"V{BYTES_PER_VALUE[ref.format]}").reshape(ref.rows, -1)
        places[0][:] = taps_first(values, self.num_taps).reshape(-1).view(np.uint8)


@dataclass(frozen=True, slots=True)
class Strided(Moved):
    """Values from `first` on that are not contiguous: `strides` are the distances between rows and between columns.

    Kernels cannot use expert matrices stored this way; `pack` reorders them.
    """

    strides: tuple[int, int]
    first: int = 0

    def own_bytes(self, ref: MatrixRef) -> int:
        return ref.landed_bytes

    def land(self, ref: MatrixRef, landed: Bytes, places: Sequence[Bytes]) -> None:
        size = BYTES_PER_VALUE[ref.format]
        apart = np.lib.stride_tricks.as_strided(
            landed.view(f"V{size}")[self.first :],
            (ref.rows, ref.cols),
            tuple(stride * size for stride in self.strides),
            writeable=False,
        )
        places[0][:] = np.ascontiguousarray(apart).reshape(-1).view(np.uint8)


@dataclass(frozen=True, slots=True)
class Halves(Moved):
    """The matrix that turns latent vectors into keys and values, stored in any of these ways and split in two."""

    whole: Landing
    head: KeyValueRows

    @property
    def needs_scratch(self) -> bool:
        return True

    def pieces(self, ref: MatrixRef) -> tuple[Piece, ...]:
        return self.whole.pieces(ref)

    def shapes(self, name: str, ref: MatrixRef) -> dict[str, MatrixShape]:
        layer = name.removesuffix("kv_up")
        key, value = split_shapes(self._matrix(ref))
        return {f"{layer}k_up": key, f"{layer}v_up": value}

    def working_bytes(self, ref: MatrixRef) -> int:
        return passing_bytes(self._matrix(ref))

    def land(self, ref: MatrixRef, landed: Bytes, places: Sequence[Bytes]) -> None:
        (whole,) = self.whole.matrices(ref, landed)
        split(self._matrix(ref), whole, *places)

    def values(
        self, ref: MatrixRef, landed: Bytes, number: int, most_values: int
    ) -> Iterator[tuple[int, Float32]]:
        (whole,) = self.whole.matrices(ref, landed)
        heads = _native.dequantize(ref.format, whole, ref.rows, ref.cols)
        for index, head in enumerate(heads.reshape(self.head.num_heads, -1, ref.cols)):
            half = head[self.head.key_rows :] if number else head[: self.head.key_rows].T
            yield index * len(half), np.ascontiguousarray(half)

    def _matrix(self, ref: MatrixRef) -> KeyValueMatrix:
        return KeyValueMatrix(ref.format, self.head, ref.cols)


def read_landed(ref: MatrixRef, read: Callable[[Piece], bytes]) -> Bytes:
    """Read a tensor's pieces synchronously, and return them as they land in memory, for `Landing.matrices`.

    Raises:
        CheckpointError: a code or a scale is refused.
    """
    landed: Bytes | None = None
    try:
        for piece in ref.pieces:
            data = np.frombuffer(read(piece), np.uint8)
            if (blocks := piece.transcode) is None:
                return data
            if landed is None:
                landed = np.zeros(piece.landed_bytes, np.uint8)
            _native.transcode(blocks.block_type, data, blocks.rows, blocks.cols, blocks.interleaved, landed)
        assert landed is not None
        if ref.format in ACT_ORDER_FORMATS:
            _native.put_in_act_order(ref.format, landed, ref.rows, ref.cols)
    except ValueError as error:
        raise CheckpointError(
            f"{piece.path.name}: {ref.name}: {error}", path=piece.path, tensor=ref.name
        ) from error
    return landed


def read_values(ref: TensorRef) -> npt.NDArray[np.float32]:
    """Return a tensor's values as float32, in its shape. bfloat16 and float16 widen exactly; blocks are dequantised.

    Raises:
        CheckpointError: the file has changed.   UnsupportedModel: no kernel reads the tensor's type.
    """
    with open_regular(ref.path) as (descriptor, _):
        raw = np.frombuffer(read_at(descriptor, ref.nbytes, ref.offset, ref.path), np.uint8)
    match ref.dtype:
        case "F32":
            return raw.view("<f4").astype(np.float32).reshape(ref.shape)
        case "F16":
            return raw.view("<f2").astype(np.float32).reshape(ref.shape)
        case "BF16":
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(ref.shape)
    if ref.dtype not in SLOT_FORMATS:
        raise UnsupportedModel(
            f"{ref.path.name}: {quote(ref.name)} is {ref.dtype}; supported: {', '.join(RUNNABLE_TYPES)}",
            hint=TYPE_HINT,
            path=ref.path,
            tensor=ref.name,
            key="type",
            value=ref.dtype,
            supported=RUNNABLE_TYPES,
        )
    rows, cols = prod(ref.shape[:-1]), ref.shape[-1]
    slots = _native.transcode(ref.dtype, raw, rows, cols)
    return _native.dequantize(SLOT_FORMATS[ref.dtype], slots, rows, cols).reshape(ref.shape)


def _steps(ref: MatrixRef, most_values: int) -> Iterator[tuple[int, int]]:
    """Yield rows of a matrix, about `most_values` values at a time: the first row, and how many.

    Only the last step may contain part of a panel, so that concatenated slices equal the matrix converted at once.
    """
    together = max(PANEL_ROWS, rows_together(ref.format))
    step = max(together, most_values // max(1, ref.cols) // together * together)
    for row in range(0, ref.rows, step):
        yield row, min(step, ref.rows - row)


def in_halves(rows: npt.NDArray[_Value], num_heads: int) -> npt.NDArray[_Value]:
    """Reorder rows [heads * head_dim, ...] of q or k from adjacent rotary pairs to halves: 0 2 4 .. 1 3 5 .. per head.

    GGUF files of the llama architecture store them paired; a row may be values, or the bytes of its blocks.
    """
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def taps_first(rows: npt.NDArray[_Value], num_taps: int) -> npt.NDArray[_Value]:
    """Reorder the columns of a convolution's weight [rows, channels * taps] to [rows, taps * channels].

    Frames and pixels store their channels side by side, so the values under a kernel are then copied in long runs.
    """
    return np.ascontiguousarray(rows.reshape(len(rows), -1, num_taps).swapaxes(1, 2)).reshape(rows.shape)


def check_vector(name: str, values: npt.NDArray[np.floating], path: Path | None = None) -> None:
    """Refuse weights that would turn every token into NaN.

    Raises:
        CheckpointError: a value is NaN or infinite; gives the tensor, the position and the value.
    """
    flat = values.reshape(-1)
    wrong = np.flatnonzero(~np.isfinite(flat))
    if wrong.size:
        where = f"{path.name}: " if path is not None else ""
        raise CheckpointError(
            f"{where}{quote(name)} holds {flat[wrong[0]]} at position {wrong[0]} of {flat.size}; "
            "expected finite numbers",
            hint="the file is damaged, or the model was already broken when it was saved",
            path=path,
            tensor=name,
        )
