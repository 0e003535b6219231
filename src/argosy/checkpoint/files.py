"""What a model is read from: the same description for a checkpoint in place and for a pack.

    model/families/  (safetensors, GGUF)  ──┐
                                            ├──>  ModelFiles: config, dense matrices, expert records
    checkpoint/pack.py  (a pack)          ──┘

Everything here is a place in a file (path, offset, length), proved to lie inside it; no bytes of weights are
read. An expert is read as one piece from a pack, as three from a checkpoint with one tensor per matrix or from
the stacked tensors of a GGUF, as two where gate and up lie fused.

A file may hold a matrix in blocks of GGUF; then it is transcoded without loss while it lands, and `format` is what
it is in memory. Experts of a layer share the formats of gate, of up and of down; these may differ from each other
and from layer to layer, as they do in Q4_K_M files.

Elsewhere: bytes move in `native/store/`, which transcodes; which experts are resident is `experts/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from argosy.checkpoint.json_strict import quote
from argosy.config import Format, ModelConfig
from argosy.errors import CheckpointError, UnsupportedModel

if TYPE_CHECKING:
    from argosy.checkpoint.gguf import GgufFile

_Value = TypeVar("_Value", bound=np.generic)

BYTES_PER_VALUE = {"f32": 4, "f16": 2, "bf16": 2}

GROUP_COLS = 32  # quantised: columns that share a scale
PANEL_ROWS = 16  # quantised: rows that lie interleaved
F8_BLOCK = 128  # f8: rows and columns of a block, whose weights share a scale
_SUPER_COLS = 256  # K formats, iq4_xs: columns that share the scale of the scales
_PANEL_ALIGNMENT = 64

# Bytes of one panel: (columns of a block, bytes of the block's 16 rows: quants and high bits, scales, minima).
_PANEL_BLOCKS: Mapping[str, tuple[int, int]] = {
    "q8": (GROUP_COLS, 512 + 32),
    "q4": (GROUP_COLS, 256 + 32),
    "q4_1": (GROUP_COLS, 256 + 32 + 32),
    "q5_0": (GROUP_COLS, 256 + 64 + 32),
    "q5_1": (GROUP_COLS, 256 + 64 + 32 + 32),
    "q4_k": (_SUPER_COLS, 2048 + 32 + 32 + 128 + 128),
    "q5_k": (_SUPER_COLS, 2048 + 512 + 32 + 32 + 128 + 128),
    "q6_k": (_SUPER_COLS, 2048 + 1024 + 32 + 256),
    "q2_k": (_SUPER_COLS, 1024 + 32 + 32 + 256),
    "q3_k": (_SUPER_COLS, 1024 + 512 + 32 + 256),
    "iq4_nl": (GROUP_COLS, 256 + 32),
    "iq4_xs": (_SUPER_COLS, 2048 + 32 + 128),
    "mxfp4": (GROUP_COLS, 256 + 32),
    "int4": (GROUP_COLS, 256 + 32),
}

# GGUF's name of a block type -> the slot format that holds it without loss.
SLOT_FORMATS: Mapping[str, Format] = {
    "Q8_0": "q8",
    "Q4_0": "q4",
    "Q4_1": "q4_1",
    "Q5_0": "q5_0",
    "Q5_1": "q5_1",
    "Q4_K": "q4_k",
    "Q5_K": "q5_k",
    "Q6_K": "q6_k",
    "Q2_K": "q2_k",
    "Q3_K": "q3_k",
    "IQ4_NL": "iq4_nl",
    "IQ4_XS": "iq4_xs",
    "MXFP4": "mxfp4",
}

# Tensors of safetensors files that hold the quants or the scales of a matrix -> the slot format they are part of.
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
    """Whether weights of this format have lost something that no other format gives back."""
    return format not in BYTES_PER_VALUE


@cache
def matrix_bytes(format: Format, rows: int, cols: int) -> int:
    """Bytes of a matrix in a format; the kernels' own rule, here without the kernels."""
    if format in BYTES_PER_VALUE:
        return rows * cols * BYTES_PER_VALUE[format]
    if format == "f8":
        return -(-rows // F8_BLOCK) * f8_scales_bytes(cols) + rows * cols
    block_cols, block_bytes = _PANEL_BLOCKS[format]
    panel_bytes = -(-cols // block_cols) * block_bytes
    panel_bytes = -(-panel_bytes // _PANEL_ALIGNMENT) * _PANEL_ALIGNMENT
    return -(-rows // PANEL_ROWS) * panel_bytes


def f8_scales_bytes(cols: int) -> int:
    """Bytes of the scales that lie before each 128 rows of codes."""
    return -(-4 * -(-cols // F8_BLOCK) // 64) * 64


def rows_together(format: Format) -> int:
    """How many rows share what lies beside their weights: a matrix may be cut behind each so many."""
    if format in BYTES_PER_VALUE:
        return 1
    return F8_BLOCK if format == "f8" else PANEL_ROWS


class KeyValueRows(NamedTuple):
    """How the rows of the matrix that makes keys and values of a latent vector lie: head by head, key first."""

    num_heads: int
    key_rows: int
    value_rows: int


@dataclass(frozen=True, slots=True)
class MatrixRef:
    """One dense matrix or vector (rows = 1) in a file; `name` is what the file calls it.

    `format` is what it is in memory. Where `block_type` is set, the file holds blocks instead, `nbytes` of them, row
    after row, and whoever reads transcodes; where these are codes alone, `scales` is the piece with the rest.
    Where `paired_heads` is set, rows of so many heads lie in the order of a rotary kernel that turns adjacent pairs,
    and whoever reads puts them in halves (`in_halves`).
    Where `turn` is set, values of two tensors alternate in the `nbytes` of the file, and this one's are the first,
    third ... (0) or the second, fourth ... (1).
    Where `key_value_rows` is set, whoever reads splits the matrix in two (`checkpoint/latent_up.py`).
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
    key_value_rows: KeyValueRows | None = None
    scales: Piece | None = None

    @property
    def read_bytes(self) -> int:
        """Bytes that are read."""
        return self.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    @property
    def landed_bytes(self) -> int:
        """Bytes that it takes in memory, before anything is split."""
        return matrix_bytes(self.format, self.rows, self.cols)


@dataclass(frozen=True, slots=True)
class Transcode:
    """Blocks that become a slot format while they land: [rows, cols] of a type such as "Q4_0" or "mxfp4_scales".

    A type of `PART_FORMATS` writes its part of the panels and leaves the other alone. Where `interleaved` matrices
    take turns row by row in the file, each has `rows` rows, and they land one behind the other.
    """

    block_type: str
    rows: int
    cols: int
    interleaved: int = 1

    @property
    def format(self) -> Format:
        """The slot format they become."""
        return PART_FORMATS.get(self.block_type) or SLOT_FORMATS[self.block_type]


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that one read brings; whole matrices, or all their quants or scales, where they are transcoded.

    Where quants and scales are two pieces, the second `completes` the first: it lands in the same memory.
    """

    path: Path
    offset: int
    nbytes: int
    checksum: int | None = None  # crc32c_wide of the bytes; packs have one
    transcode: Transcode | None = None
    completes: int | None = None  # an earlier piece of the record

    @property
    def landed_bytes(self) -> int:
        """Bytes that it takes in memory."""
        if (blocks := self.transcode) is None:
            return self.nbytes
        return blocks.interleaved * matrix_bytes(blocks.format, blocks.rows, blocks.cols)


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """Where a matrix of an expert lies inside one of its pieces, once that has landed.

    Where `strides` are set, its rows do not lie together: from one row to the next, and from one column to the next,
    it is so many values. Nothing computes with such a matrix; `pack` puts it in order.
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
class ModelFiles:
    """A model on disk. `dense` by canonical name, `experts` by (layer, expert)."""

    path: Path  # its directory, or its GGUF file
    config: ModelConfig
    dense: Mapping[str, MatrixRef]
    experts: Mapping[tuple[int, int], ExpertRecord]
    is_packed: bool = False
    header: GgufFile | None = None  # of the GGUF file, for whoever needs the rest of its metadata

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
                    f"{self.path.name}: {quote(ref.name)} is {ref.format} with {ref.rows // num_heads} rows for each "
                    f"head; supported: a multiple of {rows_together(ref.format)}, or f32, f16, bf16",
                    path=self.path,
                    tensor=ref.name,
                )
        object.__setattr__(self, "dense", dense)

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of everything that each token needs."""
        return sum(ref.read_bytes if ref.turn is None else ref.nbytes // 2 for ref in self.dense.values())

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts together."""
        return sum(record.nbytes for record in self.experts.values())

    def expert_formats(self, layer: int) -> tuple[Format, Format, Format]:
        """Formats of gate, up and down in a layer: `require_one_format_a_layer` has seen to it."""
        return self.experts[layer, 0].formats

    @cached_property
    def has_strided_experts(self) -> bool:
        """Whether rows of its experts do not lie together, so that it has to be packed before it runs."""
        return any(record.gate.strides is not None for record in self.experts.values())

    @cached_property
    def expert_format(self) -> str:
        """All formats of routed experts, for a person: `q4`, or `q4_k+q6_k` in the order they appear."""
        layers = dict.fromkeys(layer for layer, _ in self.experts)
        return "+".join(dict.fromkeys(format for layer in layers for format in self.expert_formats(layer)))


def require_one_format_a_layer(experts: Mapping[tuple[int, int], ExpertRecord], directory: Path) -> None:
    """Prove that the experts of a layer share their formats, because one kernel call runs many experts.

    Raises:
        CheckpointError: they do not; names the first that differs.
    """
    for (layer, expert), record in experts.items():
        for name, found, expected in zip(
            ("gate", "up", "down"), record.formats, experts[layer, 0].formats, strict=True
        ):
            if found != expected:
                raise CheckpointError(
                    f"{directory}: {name} of expert {expert} in layer {layer} is {found}, that of expert 0 is "
                    f"{expected}; the experts of a layer have one format",
                    path=directory,
                    layer=layer,
                    expert=expert,
                )


def in_halves(rows: npt.NDArray[_Value], num_heads: int) -> npt.NDArray[_Value]:
    """Rows [heads * head_dim, ...] of q or k from adjacent rotary pairs to halves: 0 2 4 .. 1 3 5 .. in each head.

    GGUF files of the llama architecture hold them paired; a row may be values, or the bytes of its blocks.
    """
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


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
