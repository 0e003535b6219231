"""Describe the files of a model, the same way for a checkpoint in place and for a pack.

    model/families/  (safetensors, GGUF)  ──┐
                                            ├──>  ModelFiles: config, dense matrices, expert records
    checkpoint/pack.py  (a pack)          ──┘

Everything here is a place in a file (path, offset, length), proved to lie inside that file; no weights are read. An
expert is one piece in a pack, three pieces in a checkpoint with one tensor per matrix and in the stacked tensors of a
GGUF, and two pieces if gate and up are fused.

All experts of a layer have the same formats of gate, up and down; these may differ from each other and from
layer to layer, as in Q4_K_M files.

Elsewhere: `landing.py` turns bytes into matrices; `native/store/` reads and transcodes; `experts/` decides which
experts are resident.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from argosy.checkpoint.block_types import SLOT_FORMATS
from argosy.checkpoint.formats import BYTES_PER_VALUE, matrix_bytes, rows_together
from argosy.checkpoint.gguf import GgufFile
from argosy.checkpoint.landing import AS_STORED, Halves, Landing, MatrixRef, Piece, Strided, Transcoded
from argosy.checkpoint.latent_up import KeyValueRows
from argosy.checkpoint.safetensors import TensorRef
from argosy.checkpoint.untrusted_file import quote
from argosy.config import Format, LayerConfig, ModelConfig
from argosy.errors import ArgosyError, CheckpointError, UnsupportedModel

MATRIX_NAMES = ("gate", "up", "down")  # of an expert; some have no gate


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """The place of an expert's matrix inside a landed piece.

    If `strides` are set, the rows are not contiguous: strides are the distances in values from one row to the next and
    from one column to the next. Kernels cannot use a strided matrix; `pack` reorders it.
    """

    piece: int
    offset: int
    format: Format
    rows: int
    cols: int
    strides: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """One routed expert: y = down (silu(gate x) * (up x)), or with another activation, which may have no gate."""

    pieces: tuple[Piece, ...]
    gate: ExpertMatrix | None
    up: ExpertMatrix
    down: ExpertMatrix

    @classmethod
    def of(cls, *matrices: MatrixRef) -> ExpertRecord:
        """Make the record of an expert whose gate, up and down, or up and down, are separate tensors."""
        pieces: list[Piece] = []
        places = []
        for ref in matrices:
            first = len(pieces)
            places.append(ExpertMatrix(first, 0, ref.format, ref.rows, ref.cols))
            pieces += (
                piece if piece.completes is None else replace(piece, completes=first) for piece in ref.pieces
            )
        return cls.laid_out(tuple(pieces), places)

    @classmethod
    def laid_out(cls, pieces: tuple[Piece, ...], matrices: Sequence[ExpertMatrix]) -> ExpertRecord:
        """Make the record from its `matrices`: gate, up and down, or up and down."""
        *gate, up, down = matrices
        return cls(pieces, gate[0] if gate else None, up, down)

    @property
    def matrices(self) -> tuple[ExpertMatrix, ...]:
        """Gate, up and down, or up and down: as `expert_shapes`."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    @property
    def nbytes(self) -> int:
        """The number of bytes to read."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats of its matrices."""
        return tuple(matrix.format for matrix in self.matrices)

    def matrix(self, name: str, label: str) -> MatrixRef:
        """Return the expert's gate, up or down as a separate matrix, named `label`."""
        matrix: ExpertMatrix = getattr(self, name)
        piece = self.pieces[matrix.piece]
        nbytes = matrix_bytes(matrix.format, matrix.rows, matrix.cols)
        offset = piece.offset + matrix.offset
        landing: Landing = AS_STORED
        if (blocks := piece.transcode) is not None:
            others = tuple(other for other in self.pieces if other.completes == matrix.piece)
            landing = Transcoded(blocks.block_type, others, blocks.interleaved, matrix.offset // nbytes)
            offset, nbytes = piece.offset, piece.nbytes
        elif matrix.strides is not None:
            landing = Strided(matrix.strides)
            last = sum(
                stride * (count - 1)
                for stride, count in zip(matrix.strides, (matrix.rows, matrix.cols), strict=True)
            )
            nbytes = (last + 1) * BYTES_PER_VALUE[matrix.format]
        return MatrixRef(
            label, piece.path, offset, nbytes, matrix.format, matrix.rows, matrix.cols, landing=landing
        )


class Run(NamedTuple):
    """Neighbouring experts of a layer whose records differ only in the places of their pieces; `record` is the first.

    Plain pieces also have the same distance from a multiple of `PLACE_BYTES`, so the experts are equal in memory.
    """

    layer: int
    expert: int
    num_experts: int
    record: ExpertRecord


PLACE_BYTES = 1 << 16  # no drive reads in larger units


class ExpertRecords(Mapping[tuple[int, int], ExpertRecord]):
    """The records of routed experts by (layer, expert), in columns: 12 bytes a piece, because giants have half a
    million. Records are made when they are asked for; whoever needs something of all of them asks for `runs`.

    Args:
        records: in the order of their keys.
    """

    def __init__(self, records: Iterable[tuple[tuple[int, int], ExpertRecord]] = ()) -> None:
        self._layers: dict[int, tuple[int, array[int]]] = {}  # the first row, and the experts
        self._forms: list[ExpertRecord] = []  # with the places of some record
        self._numbers: dict[object, int] = {}  # of forms
        self._last: tuple[ExpertRecord | None, tuple[int, ...]] = None, ()  # what the last form was found for
        self._form_of = array("i")
        self._first_piece = array("q")
        self.paths: list[Path] = []  # files with experts
        self._path_numbers: dict[Path, int] = {}
        self._path_of = array("i")
        self._offset_of = array("q")
        self._checksums = array("q")  # of pieces; empty if none has one
        for key, record in records:
            self.add(key, record)

    @classmethod
    def of(cls, records: Mapping[tuple[int, int], ExpertRecord]) -> ExpertRecords:
        """Return records in columns."""
        return records if isinstance(records, cls) else cls(sorted(records.items(), key=lambda item: item[0]))

    def add(self, key: tuple[int, int], record: ExpertRecord) -> None:
        """Append a record; keys must ascend."""
        self.add_like(key, record, [(piece.path, piece.offset, piece.checksum) for piece in record.pieces])

    def add_like(
        self, key: tuple[int, int], record: ExpertRecord, places: Sequence[tuple[Path, int, int | None]]
    ) -> None:
        """Append a record that has the pieces of `record` at other places: (file, offset, checksum)."""
        layer, expert = key
        first, experts = self._layers.setdefault(layer, (len(self._form_of), array("i")))
        assert first + len(experts) == len(self._form_of)
        assert not experts or experts[-1] < expert
        self._form_of.append(self._form(record, places))
        experts.append(expert)
        self._first_piece.append(len(self._offset_of))
        if not self._checksums and any(checksum is not None for _, _, checksum in places):
            self._checksums.extend([-1] * len(self._offset_of))
        for path, offset, checksum in places:
            if (number := self._path_numbers.get(path)) is None:
                number = self._path_numbers[path] = len(self.paths)
                self.paths.append(path)
            self._path_of.append(number)
            self._offset_of.append(offset)
            if self._checksums or checksum is not None:
                self._checksums.append(-1 if checksum is None else checksum)

    def add_stacked(self, layer: int, count: int, first: ExpertRecord, second: ExpertRecord) -> None:
        """Append the experts of a layer that lie in stacks: their places go on as from the first to the second."""
        starts = [(piece.path, piece.offset, piece.checksum) for piece in first.pieces]
        steps = [b.offset - a.offset for a, b in zip(first.pieces, second.pieces, strict=True)]
        for expert in range(count):
            places = [
                (path, offset + expert * step, checksum)
                for (path, offset, checksum), step in zip(starts, steps, strict=True)
            ]
            self.add_like((layer, expert), first, places)

    def _form(self, record: ExpertRecord, places: Sequence[tuple[Path, int, int | None]]) -> int:
        """Return the number of a record's form: all but the places, and for plain pieces their insets."""
        insets = tuple(
            offset % PLACE_BYTES if piece.transcode is None else 0
            for piece, (_, offset, _) in zip(record.pieces, places, strict=True)
        )
        if self._last[0] is record and self._last[1] == insets:
            return self._form_of[-1]
        self._last = record, insets
        alike = tuple(
            (one.nbytes, one.transcode, one.completes, one.checksum is None) for one in record.pieces
        )
        key = (alike, insets, record.gate, record.up, record.down)
        if (number := self._numbers.get(key)) is None:
            number = self._numbers[key] = len(self._forms)
            self._forms.append(record)
        return number

    def runs(self) -> Iterator[Run]:
        """Yield all experts, neighbours that are alike together."""
        for layer, (first, experts) in self._layers.items():
            begin = 0
            for at in range(1, len(experts) + 1):
                if (
                    at < len(experts)
                    and self._form_of[first + at] == self._form_of[first + begin]
                    and experts[at] == experts[begin] + at - begin
                ):
                    continue
                yield Run(layer, experts[begin], at - begin, self._record(first + begin))
                begin = at

    def _record(self, row: int) -> ExpertRecord:
        record = self._forms[self._form_of[row]]
        pieces = []
        for at, piece in enumerate(record.pieces, self._first_piece[row]):
            checksum = self._checksums[at] if self._checksums else -1
            pieces.append(Piece(
                self.paths[self._path_of[at]], self._offset_of[at], piece.nbytes,
                None if checksum < 0 else checksum, piece.transcode, piece.completes,
            ))  # fmt: skip
        return ExpertRecord(tuple(pieces), record.gate, record.up, record.down)

    def __getitem__(self, key: tuple[int, int]) -> ExpertRecord:
        layer, expert = key
        first, experts = self._layers[layer]
        at = bisect_left(experts, expert)
        if at == len(experts) or experts[at] != expert:
            raise KeyError(key)
        return self._record(first + at)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((layer, expert) for layer, (_, experts) in self._layers.items() for expert in experts)

    def __len__(self) -> int:
        return len(self._form_of)


_MOST_ROWS, _MOST_COLS = (1 << 32) - 1, 1 << 18  # of a table (native/ops/table_rows.h)
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
    def of(
        cls, tensors: Sequence[TensorRef], least_rows: int, cols: int, scales: Sequence[TensorRef] = ()
    ) -> TableRef:
        """Make the table whose rows are those of `tensors`, of one type: floats, GGUF's blocks of whole rows, or E4M3
        with a tensor of `scales` for each, in E8M0, for 32 columns.

        Raises:
            CheckpointError: it has fewer rows, or rows of another length, than the config requires.
            UnsupportedModel: its type is not supported.
        """
        first = tensors[0]
        for tensor in tensors:
            if (
                len(tensor.shape) != 2
                or tensor.shape[1] != cols
                or tensor.dtype != first.dtype
                or 0 in tensor.shape
            ):
                raise CheckpointError(
                    f"{tensor.path.name}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}, expected rows of "
                    f"{cols} {first.dtype}",
                    path=tensor.path,
                    tensor=tensor.name,
                )
        num_rows = sum(tensor.shape[0] for tensor in tensors)
        if num_rows < least_rows:
            raise CheckpointError(
                f"{first.path.name}: {first.name} has {num_rows} rows, expected {least_rows}",
                path=first.path,
                tensor=first.name,
            )
        if num_rows > _MOST_ROWS or cols > _MOST_COLS:
            raise UnsupportedModel(
                f"{first.path.name}: {first.name} has {num_rows} rows of {cols} values; supported are at most "
                f"{_MOST_ROWS} rows of {_MOST_COLS}",
                path=first.path,
                tensor=first.name,
            )
        if scales:
            codes = TablePart("mxfp8_codes", tuple(tensors))
            return cls("mxfp8", num_rows, cols, (codes, TablePart("mxfp8_scales", tuple(scales))))
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


@dataclass(frozen=True)
class DraftFiles:
    """The layer with which a checkpoint predicts one more token (DeepSeek-V3, arXiv:2412.19437, section 2.2).

    Its tensors have the names of the layer after the model's last one.
    """

    layer: LayerConfig
    dense: Mapping[str, MatrixRef]
    experts: Mapping[tuple[int, int], ExpertRecord]


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk. `dense` by canonical name, `experts` by (layer, expert); `others` are tensors that text does not
    need, such as those of vision towers, by their name in the files.
    """

    path: Path  # its directory, or its GGUF file
    config: ModelConfig
    dense: Mapping[str, MatrixRef]
    experts: Mapping[tuple[int, int], ExpertRecord]
    is_packed: bool = False
    header: GgufFile | None = None  # the GGUF file's header, for users of its other metadata
    others: Mapping[str, TensorRef] = field(default_factory=dict)
    # The header of a GGUF model's vision tower, whose tensors are `others`; or why the tower is not used.
    mmproj: GgufFile | ArgosyError | None = None
    tables: Mapping[int, TableRef] = field(default_factory=dict)  # n-gram tables by layer
    draft: DraftFiles | ArgosyError | None = None  # why the layer cannot be used; None: there is none
    # Ollama's parameters of the model, if it stores them; or why they are not used.
    ollama_params: Mapping[str, object] | CheckpointError = field(default_factory=dict)
    num_draft_layers: int = 0  # how many of the last `config.layers` only draft

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", ExpertRecords.of(self.experts))
        latent = self.config.latent
        if latent is None:
            return
        num_heads = latent.num_heads
        rows = KeyValueRows(num_heads, latent.nope_dim, latent.value_dim)
        dense = dict(self.dense)
        for name, ref in self.dense.items():
            if name.endswith(".kv_up") and not isinstance(ref.landing, Halves):
                dense[name] = replace(ref, landing=Halves(ref.landing, rows))
            elif name.endswith((".k_up", ".v_up")) and ref.rows // num_heads % rows_together(ref.format):
                raise UnsupportedModel(
                    f"{self.path.name}: {quote(ref.name)} is {ref.format} with {ref.rows // num_heads} rows per "
                    f"head; supported: a multiple of {rows_together(ref.format)}, or f32, f16, bf16",
                    path=self.path,
                    tensor=ref.name,
                )
        object.__setattr__(self, "dense", dense)

    def with_draft_layer(self) -> ModelFiles:
        """Return the model with its draft layer appended to its layers.

        Raises:
            UnsupportedModel: the model has none.   ArgosyError: its tensors cannot be used.
        """
        if isinstance(self.draft, ArgosyError):
            raise self.draft
        if self.draft is None:
            raise UnsupportedModel(
                f"{self.path} has no layer for multi-token prediction that can be used",
                hint="`--speculate lookup` needs none; packs and GGUF files run without theirs",
                path=self.path,
                key="num_nextn_predict_layers",
                value=self.config.num_mtp_layers,
            )
        return replace(
            self,
            config=replace(self.config, layers=(*self.config.layers, self.draft.layer)),
            dense={**self.dense, **self.draft.dense},
            experts=ExpertRecords((*self.experts.items(), *self.draft.experts.items())),
            draft=None,
            num_draft_layers=1,
        )

    @cached_property
    def own_config(self) -> ModelConfig:
        """The configuration without the draft layer."""
        if not self.num_draft_layers:
            return self.config
        return replace(self.config, layers=self.config.layers[: -self.num_draft_layers])

    @property
    def records(self) -> ExpertRecords:
        """`experts`, with neighbours that are alike."""
        assert isinstance(self.experts, ExpertRecords)
        return self.experts

    @cached_property
    def weight_paths(self) -> list[Path]:
        """The files that hold the tensors."""
        paths = {str(piece.path) for ref in self.dense.values() for piece in ref.pieces}
        paths |= {str(path) for path in self.records.paths}
        paths |= {str(ref.path) for ref in self.others.values()}
        paths |= {str(path) for table in self.tables.values() for path in table.paths}
        return [Path(path) for path in sorted(paths)]

    @cached_property
    def dense_bytes(self) -> int:
        """The bytes of all tensors that every token needs."""
        return sum(ref.landing.own_bytes(ref) for ref in self.dense.values())

    @cached_property
    def table_bytes(self) -> int:
        """The bytes of all tables, which stay on the drive."""
        return sum(table.nbytes for table in self.tables.values())

    @cached_property
    def expert_bytes(self) -> int:
        """The bytes of all routed experts together."""
        return sum(run.num_experts * run.record.nbytes for run in self.records.runs())

    def expert_formats(self, layer: int) -> tuple[Format, ...]:
        """Return the formats of an expert's matrices in a layer; `require_one_format_a_layer` has checked that experts
        agree.
        """
        return self.experts[layer, 0].formats

    @cached_property
    def has_strided_experts(self) -> bool:
        """Whether experts' rows are not contiguous, so that the model must be packed before it runs."""
        return any(run.record.up.strides is not None for run in self.records.runs())

    @cached_property
    def expert_format(self) -> str:
        """The formats of routed experts, for display: `q4`, or `q4_k+q6_k` in order of appearance."""
        layers = dict.fromkeys(run.layer for run in self.records.runs())
        return "+".join(dict.fromkeys(format for layer in layers for format in self.expert_formats(layer)))


def require_one_format_a_layer(experts: ExpertRecords, directory: Path) -> None:
    """Prove that all experts of a layer have the same formats, because one kernel call runs many experts.

    Raises:
        CheckpointError: they differ; names the first expert that does.
    """
    for layer, expert, _, record in experts.runs():
        for name, found, expected in zip(
            MATRIX_NAMES[-len(record.formats) :], record.formats, experts[layer, 0].formats, strict=True
        ):
            if found != expected:
                raise CheckpointError(
                    f"{directory}: {name} of expert {expert} in layer {layer} is {found}, but expert 0 is "
                    f"{expected}; all experts of a layer must have the same formats",
                    path=directory,
                    layer=layer,
                    expert=expert,
                )
