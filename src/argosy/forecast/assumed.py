"""Describe the pack that `argosy pack` would write for a model of which only the geometry is known, and its tables.

    ModelConfig, format  ->  assume_pack  ->  ModelFiles without files

Dense weights, records and caches have the sizes of a real pack, so the same code plans memory and speed.

Elsewhere: `checkpoint/pack.py` writes packs.
"""

from __future__ import annotations

from pathlib import Path

from argosy.checkpoint.files import ExpertRecord, ExpertRecords, ModelFiles, TableRef
from argosy.checkpoint.formats import matrix_bytes, round_up
from argosy.checkpoint.geometry import (
    count_parameters,
    dense_shapes,
    expert_shapes,
    packed_config,
    packed_format,
    require_countable,
)
from argosy.checkpoint.landing import MatrixRef, Piece
from argosy.checkpoint.manifest import FILE_ALIGNMENT, record_layout
from argosy.checkpoint.safetensors import TensorRef
from argosy.config import Format, ModelConfig, NgramConfig

PACK_FORMATS: tuple[Format, ...] = ("q4", "q8", "bf16")


def assume_pack(config: ModelConfig, format: Format, path: Path) -> ModelFiles:
    """The files of a pack with that geometry.

    Args:
        format: one of PACK_FORMATS.
        path: the file from which the config was read.

    Raises:
        UnsupportedModel: it has more experts than any model.
    """
    require_countable(config)
    config = packed_config(config)
    dense: dict[str, MatrixRef] = {}
    end = 0
    for name, shape in dense_shapes(config):
        rows, cols = shape if len(shape) == 2 else (1, shape[0])
        stored = packed_format(name, format, config)
        nbytes = matrix_bytes(stored, rows, cols)
        dense[name] = MatrixRef(name, path, end, nbytes, stored, rows, cols)
        end += round_up(nbytes, FILE_ALIGNMENT)
    experts = ExpertRecords()
    end = 0
    for layer in config.moe_layers:
        layout = record_layout(config, layer, (format,) * len(expert_shapes(config, layer)))
        first, second = (
            ExpertRecord.laid_out((Piece(path, offset, layout.stride, checksum=0),), layout.matrices)
            for offset in (end, end + layout.stride)
        )
        experts.add_stacked(layer, config.num_experts, first, second)
        end += config.num_experts * layout.stride
    tables = {
        layer: _table(parts.ngrams, path)
        for layer, parts in enumerate(config.layers)
        if parts.ngrams is not None
    }
    return ModelFiles(path, config, dense, experts, is_packed=True, tables=tables)


def _table(ngrams: NgramConfig, path: Path) -> TableRef:
    """A table with rows of bfloat16: those of each checkpoint stay as they are."""
    rows, dim = ngrams.num_rows, ngrams.row_dim
    return TableRef.of([TensorRef("table", path, 0, 2 * rows * dim, "BF16", (rows, dim))], rows, dim)


def active_parameters(config: ModelConfig) -> tuple[int, int]:
    """A model's parameters, and those that a token reads. Of a separate embedding table it reads one row."""
    everything, active = count_parameters(config)
    return everything, active - (0 if config.is_embedding_tied else config.vocab_size * config.hidden_size)
