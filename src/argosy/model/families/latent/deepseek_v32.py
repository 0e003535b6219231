"""DeepSeek-V3.2 (arXiv:2512.02556): DeepSeek-V3 whose tokens see only the positions that an indexer chooses.

The indexer's rotary dimensions are paired in halves, those of attention interleaved. The layer for multi-token
prediction sees all positions here: it only drafts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import IndexConfig, ModelConfig
from argosy.errors import CheckpointError
from argosy.model.families.latent.deepseek import (
    DEEPSEEK_V3,
    INDEX_NORM_EPS,
    LAYOUTS,
    MOST_CHOSEN,
    read_latent_model,
)
from argosy.model.families.latent.deepseek_gguf import open_indexed
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import layers_by_type, read_sigmoid_router

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config", "read_indexer"]

MODEL_TYPE = "deepseek_v32"
GGUF_ARCHITECTURE = "deepseek32"

# `layer_types` of files that transformers wrote; it has no other kind.
LAYER_TYPES = ("indexed_attention", "deepseek_sparse_attention")

_DEFAULTS = replace(DEEPSEEK_V3, context_tokens=163_840)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `DeepseekV32Config` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    config = read_latent_model(
        reader,
        family=MODEL_TYPE,
        defaults=_DEFAULTS,
        read_router=read_sigmoid_router(scale=2.5, num_groups=8, kept_groups=4),
        read_moe_layers=layers_by_type(_DEFAULTS.first_dense_layers),
        read_indexers=lambda reader, num_layers: (
            (read_indexer(reader, num_layers, num_heads=64),) * num_layers
        ),
    )
    reader.finish()
    return config


def read_indexer(
    reader: ConfigReader, num_layers: int, *, num_heads: int, is_interleaved: bool = False
) -> IndexConfig:
    """Read the indexer of a layer that has one; the arguments are the family's defaults."""
    reader.layer_types(num_layers, LAYER_TYPES)
    reader.neutral("rope_interleave", True)
    reader.integer("q_lora_rank", default=1)  # an indexer reads the compressed query
    head_dim, rope_dim = (
        reader.integer("index_head_dim", default=128),
        reader.integer("qk_rope_head_dim", default=64),
    )
    if head_dim < rope_dim:
        raise CheckpointError(
            f"config.json: index_head_dim is {head_dim}, less than the {rope_dim} dimensions that rotate "
            "(qk_rope_head_dim)",
            key="index_head_dim",
        )
    return IndexConfig(
        num_chosen=reader.integer("index_topk", default=2048, most=MOST_CHOSEN),
        num_heads=reader.integer("index_n_heads", default=num_heads),
        head_dim=head_dim,
        is_interleaved=reader.flag("indexer_rope_interleave", is_interleaved),
        norm_eps=INDEX_NORM_EPS,
    )


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `deepseek32`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    return open_indexed(file, GGUF_ARCHITECTURE, MODEL_TYPE, is_interleaved=False)
