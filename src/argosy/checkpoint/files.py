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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

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
    draft: DraftFiles | ArgosyError | None = None  # why the layer cannot be used; None: there is none
    # Ollama's parameters of the model, if it stores them; or why they are not used.
    ollama_params: Mapping[str, object] | CheckpointError = field(default_factory=dict)
    num_draft_layers: int = 0  # how many of the last `config.layers` only draft

    def __post_init__(self) -> None:
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
        """The files that hold the tensors."""
        stored: list[MatrixRef | ExpertRecord] = [*self.dense.values(), *self.experts.values()]
        paths = {str(piece.path) for one in stored for piece in one.pieces}
        paths |= {str(ref.path) for ref in self.others.values()}
        return [Path(path) for path in sorted(paths)]

    @cached_property
    def dense_bytes(self) -> int:
        """The bytes of all tensors that every token needs."""
        return sum(ref.landing.own_bytes(ref) for ref in self.dense.values())

    @cached_property
    def expert_bytes(self) -> int:
        """The bytes of all routed experts together."""
        return sum(record.nbytes for record in self.experts.values())

    def expert_formats(self, layer: int) -> tuple[Format, ...]:
        """Return the formats of an expert's matrices in a layer; `require_one_format_a_layer` has checked that experts
        agree.
        """
        return self.experts[layer, 0].formats

    @cached_property
    def has_strided_experts(self) -> bool:
        """Whether experts' rows are not contiguous, so that the model must be packed before it runs."""
        return any(record.up.strides is not None for record in self.experts.values())

    @cached_property
    def expert_format(self) -> str:
        """The formats of routed experts, for display: `q4`, or `q4_k+q6_k` in order of appearance."""
        layers = dict.fromkeys(layer for layer, _ in self.experts)
        return "+".join(dict.fromkeys(format for layer in layers for format in self.expert_formats(layer)))


def require_one_format_a_layer(experts: Mapping[tuple[int, int], ExpertRecord], directory: Path) -> None:
    """Prove that all experts of a layer have the same formats, because one kernel call runs many experts.

    Raises:
        CheckpointError: they differ; names the first expert that does.
    """
    for (layer, expert), record in experts.items():
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
