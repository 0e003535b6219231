"""Describe the files of a model in one form, for a checkpoint in place and for a pack.

    model/families/  (safetensors, GGUF)  ──┐
                                            ├──>  ModelFiles: config, dense matrices, expert records
    checkpoint/pack.py  (a pack)          ──┘

Everything here is a place in a file (path, offset, length), proved to lie inside it; no weights are read. An
expert is one piece in a pack, three pieces in a checkpoint with one tensor per matrix and in the stacked tensors
of a GGUF, and two pieces where gate and up are fused.

A matrix stored as GGUF blocks is transcoded without loss while it lands; its `format` is the format in memory.
All experts of a layer have the same formats of gate, up and down; these three may differ from each other and from
layer to layer, as in Q4_K_M files.

Elsewhere: `native/store/` reads and transcodes; `experts/` decides which experts are resident.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from argosy import _native
from argosy.checkpoint.gguf import SLOT_FORMATS, GgufFile
from argosy.checkpoint.safetensors import TensorRef
from argosy.checkpoint.untrusted_file import quote
from argosy.config import Format, LayerConfig, ModelConfig
from argosy.errors import ArgosyError, CheckpointError, UnsupportedModel

_Value = TypeVar("_Value", bound=np.generic)

BYTES_PER_VALUE = {"f32": 4, "f16": 2, "bf16": 2}

# Layout numbers of native/kernels/formats.h.
PANEL_ROWS = _native.PANEL_ROWS  # quantised: rows that are interleaved
F8_BLOCK = _native.F8_BLOCK  # f8: rows and columns of a block; its weights share a scale

# Safetensors tensors with the quants or the scales of a matrix -> the slot format they are part of.
PART_FORMATS: Mapping[str, Format] = {
    "int4_quants": "int4",
    "int4_scales": "int4",
    "mxfp4_quants": "mxfp4",
    "mxfp4_scales": "mxfp4",
    "f8_codes": "f8",
    "f8_scales": "f8",
    "f8_scales_bf16": "f8",
}


def is_quantised(format: Format) -> bool:
    """Whether converting weights to this format loses precision for good."""
    return format not in BYTES_PER_VALUE


@cache
def matrix_bytes(format: Format, rows: int, cols: int) -> int:
    """Bytes of a matrix in a format.

    Raises:
        UnsupportedModel: it has more rows or columns than a kernel can have.
    """
    if max(rows, cols) > _native.LARGEST_SIZE:
        raise UnsupportedModel(
            f"a matrix of {rows} x {cols} is too large; supported: at most {_native.LARGEST_SIZE} rows and columns"
        )
    return _native.matrix_bytes(format, rows, cols)


def rows_together(format: Format) -> int:
    """How many rows are stored as a unit: a matrix may be split after any multiple of this."""
    if format in BYTES_PER_VALUE:
        return 1
    return F8_BLOCK if format == "f8" else PANEL_ROWS


class KeyValueRows(NamedTuple):
    """Row order of the matrix that turns latent vectors into keys and values: head by head, key first."""

    num_heads: int
    key_rows: int
    value_rows: int


@dataclass(frozen=True, slots=True)
class MatrixRef:
    """One dense matrix or vector (rows = 1) in a file; `name` is its name in the file.

    `format` is its format in memory. If `block_type` is set, the file holds `nbytes` of blocks instead, row after row,
    and the reader transcodes them, or computes their values if `format` is f32; if these are codes alone, `scales` is
    the piece with the scales.
    If `paired_heads` is set, the rows of that many heads are in the order of a rotary kernel that rotates adjacent
    pairs, and the reader puts them in halves (`in_halves`).
    If `turn` is set, the values of two tensors alternate in the file's `nbytes`; this one has the first, third ... (0)
    or the second, fourth ... (1).
    If `taps` is set, it is a convolution's weight with so many values of a channel side by side, and the reader puts
    the channels of each tap side by side (`taps_first`).
    If `key_value_rows` is set, the reader splits the matrix in two (`checkpoint/latent_up.py`).
    """

    name: str
    path: Path
    offset: int
    nbytes: int
    format: Format
    rows: int
    cols: int
    checksum: int | None = None  # crc32c_wide of the bytes; packs have one
    block_type: str | None = None
    paired_heads: int = 0
    turn: int | None = None
    taps: int = 0
    key_value_rows: KeyValueRows | None = None
    scales: Piece | None = None

    @property
    def read_bytes(self) -> int:
        """Bytes that are read."""
        return self.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    @property
    def is_widened(self) -> bool:
        """Whether the reader computes the values of blocks."""
        return self.block_type is not None and self.format == "f32"

    @property
    def landed_bytes(self) -> int:
        """Bytes in memory, before it is split."""
        return matrix_bytes(self.format, self.rows, self.cols)


@dataclass(frozen=True, slots=True)
class Transcode:
    """Blocks that become a slot format while they land: [rows, cols] of a type such as "Q4_0" or "mxfp4_scales".

    A type in `PART_FORMATS` writes its part of the panels and leaves the rest unchanged. If the rows of `interleaved`
    matrices alternate in the file, each matrix has `rows` rows, and the matrices land one after another.
    """

    block_type: str
    rows: int
    cols: int
    interleaved: int = 1

    @property
    def format(self) -> Format:
        """The resulting slot format."""
        return PART_FORMATS.get(self.block_type) or SLOT_FORMATS[self.block_type]


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes of one read. A transcoded piece has whole matrices, or all of their quants or scales.

    If quants and scales are two pieces, the second `completes` the first: it lands in the same memory.
    """

    path: Path
    offset: int
    nbytes: int
    checksum: int | None = None  # crc32c_wide of the bytes; packs have one
    transcode: Transcode | None = None
    completes: int | None = None  # an earlier piece of the record

    @property
    def landed_bytes(self) -> int:
        """Bytes in memory."""
        if (blocks := self.transcode) is None:
            return self.nbytes
        return blocks.interleaved * matrix_bytes(blocks.format, blocks.rows, blocks.cols)


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """The place of an expert's matrix inside one of its pieces, once that has landed.

    If `strides` are set, its rows are not contiguous: they are the distances in values from one row to the next and
    from one column to the next. Kernels cannot use a strided matrix; `pack` puts it in order.
    """

    piece: int
    offset: int
    format: Format
    rows: int
    cols: int
    strides: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """One routed expert: y = down (silu(gate x) * (up x))."""

    pieces: tuple[Piece, ...]
    gate: ExpertMatrix
    up: ExpertMatrix
    down: ExpertMatrix

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def formats(self) -> tuple[Format, Format, Format]:
        """Formats of gate, up and down."""
        return self.gate.format, self.up.format, self.down.format


@dataclass(frozen=True)
class DraftFiles:
    """The layer with which a checkpoint predicts one token more (DeepSeek-V3, arXiv:2412.19437, section 2.2).

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
    # The header of the file with the vision tower of a GGUF model, whose tensors are `others`; or why it is not used.
    mmproj: GgufFile | ArgosyError | None = None
    draft: DraftFiles | ArgosyError | None = None  # why it cannot be used; None: there is none
    # Ollama's parameters of the model, if it keeps them; or why they are not used.
    ollama_params: Mapping[str, object] | CheckpointError = field(default_factory=dict)
    num_draft_layers: int = 0  # the last of `config.layers` that only draft

    def __post_init__(self) -> None:
        latent, num_heads = self.config.latent, self.config.num_heads
        if latent is None:
            return
        rows = KeyValueRows(num_heads, latent.nope_dim, latent.value_dim)
        dense = dict(self.dense)
        for name, ref in self.dense.items():
            if name.endswith(".kv_up"):
                dense[name] = replace(ref, key_value_rows=rows)
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
            UnsupportedModel: it has none.   ArgosyError: its tensors cannot be used.
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
            experts={**self.experts, **self.draft.experts},
            draft=None,
            num_draft_layers=1,
        )

    @cached_property
    def own_config(self) -> ModelConfig:
        """The configuration without the draft layer."""
        if not self.num_draft_layers:
            return self.config
        return replace(self.config, layers=self.config.layers[: -self.num_draft_layers])

    @cached_property
    def weight_paths(self) -> list[Path]:
        """The files that hold its tensors."""
        pieces = [piece for record in self.experts.values() for piece in record.pieces]
        paths = {str(ref.path) for ref in self.dense.values()} | {str(piece.path) for piece in pieces}
        paths |= {str(ref.path) for ref in self.others.values()}
        return [Path(path) for path in sorted(paths)]

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of all tensors that every token needs."""
        return sum(ref.read_bytes if ref.turn is None else ref.nbytes // 2 for ref in self.dense.values())

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts together."""
        return sum(record.nbytes for record in self.experts.values())

    def expert_formats(self, layer: int) -> tuple[Format, Format, Format]:
        """Formats of gate, up and down in a layer; `require_one_format_a_layer` has checked that experts agree."""
        return self.experts[layer, 0].formats

    @cached_property
    def has_strided_experts(self) -> bool:
        """Whether the rows of its experts are not contiguous, so that it must be packed before it runs."""
        return any(record.gate.strides is not None for record in self.experts.values())

    @cached_property
    def expert_format(self) -> str:
        """All formats of routed experts, for display: `q4`, or `q4_k+q6_k` in order of appearance."""
        layers = dict.fromkeys(layer for layer, _ in self.experts)
        return "+".join(dict.fromkeys(format for layer in layers for format in self.expert_formats(layer)))


def require_one_format_a_layer(experts: Mapping[tuple[int, int], ExpertRecord], directory: Path) -> None:
    """Prove that all experts of a layer have the same formats, because one kernel call runs many experts.

    Raises:
        CheckpointError: they do not; names the first expert that differs.
    """
    for (layer, expert), record in experts.items():
        for name, found, expected in zip(
            ("gate", "up", "down"), record.formats, experts[layer, 0].formats, strict=True
        ):
            if found != expected:
                raise CheckpointError(
                    f"{directory}: {name} of expert {expert} in layer {layer} is {found}, but expert 0 is "
                    f"{expected}; all experts of a layer must have the same formats",
                    path=directory,
                    layer=layer,
                    expert=expert,
                )


def in_halves(rows: npt.NDArray[_Value], num_heads: int) -> npt.NDArray[_Value]:
    """Reorder rows [heads * head_dim, ...] of q or k from adjacent rotary pairs to halves: 0 2 4 .. 1 3 5 .. per head.

    GGUF files of the llama architecture store them paired; a row may be values, or the bytes of its blocks.
    """
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def taps_first(rows: npt.NDArray[_Value], num_taps: int) -> npt.NDArray[_Value]:
    """Reorder the columns of a convolution's weight [rows, channels * taps] to [rows, taps * channels].

    Frames and pixels have their channels side by side, so what lies under a kernel is then copied in long runs.
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
