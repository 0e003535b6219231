"""GLM-5, 5.1 and 5.2: DeepSeek-V3.2 with other sizes, and layers that share the positions an earlier one chose.

GLM-5.2 has an indexer in every fourth layer (arXiv:2603.12201): `indexer_types`, or a pattern or a schedule in older
files, say in which. The indexer's rotary dimensions are interleaved, like those of attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import IndexConfig, ModelConfig
from argosy.errors import CheckpointError
from argosy.model.families.latent.deepseek import LAYOUTS, Defaults, read_latent_model
from argosy.model.families.latent.deepseek_gguf import open_indexed
from argosy.model.families.latent.deepseek_v32 import read_indexer
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import layers_by_type, read_sigmoid_router

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "glm_moe_dsa"
GGUF_ARCHITECTURE = "glm-dsa"

_DEFAULTS = Defaults(
    vocab_size=154_880,
    hidden_size=6144,
    num_layers=78,
    num_heads=64,
    num_kv_heads=64,
    dense_width=12_288,
    expert_width=2048,
    num_experts=256,
    experts_per_token=8,
    num_shared_experts=1,
    first_dense_layers=3,
    context_tokens=202_752,
    query_rank=2048,
    nope_dim=192,
    value_dim=256,
    norm_eps=1e-5,
    eos_id=1,
    bos_id=0,
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `GlmMoeDsaConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    reader.neutral("moe_router_dtype", "float32")
    reader.passed("index_share_for_mtp_iteration")  # about drafts alone
    config = read_latent_model(
        reader,
        family=MODEL_TYPE,
        defaults=_DEFAULTS,
        read_router=read_sigmoid_router(scale=2.5, num_groups=1, kept_groups=1),
        read_moe_layers=layers_by_type(_DEFAULTS.first_dense_layers),
        read_indexers=_read_indexers,
    )
    reader.finish()
    return config


def _read_indexers(reader: ConfigReader, num_layers: int) -> tuple[IndexConfig, ...]:
    own = read_indexer(reader, num_layers, num_heads=32, is_interleaved=True)
    shared = replace(own, kind="shared")
    return tuple(own if kind == "full" else shared for kind in read_index_kinds(reader, num_layers))


def read_index_kinds(reader: ConfigReader, num_layers: int, spacing: int = 1) -> tuple[str, ...]:
    """Read whether each layer has an indexer of its own, "full", or sees what the last one chose, "shared".

    Args:
        spacing: the family's default of `index_topk_freq`.

    Raises:
        CheckpointError: the list is too short, has other words, or its first layer shares.
    """
    spacing = reader.integer("index_topk_freq", default=spacing, least=0) or 1
    first = reader.integer("index_skip_topk_offset", default=2, least=0)
    pattern = reader.optional_text("index_topk_pattern")
    kinds = reader.texts("indexer_types")
    if kinds is None and pattern is not None:
        kinds = tuple({"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern)
    if kinds is None:
        kinds = tuple(
            "shared" if max(layer - first + 1, 0) % spacing else "full" for layer in range(num_layers)
        )
    # Lists may go on for the layers of multi-token prediction.
    if len(kinds) < num_layers or not set(kinds) <= {"full", "shared"} or kinds[0] != "full":
        raise CheckpointError(
            f"config.json: indexer_types or index_topk_pattern has {len(kinds)} entries, expected 'full' or 'shared' "
            f"for each of {num_layers} layers, and 'full' for the first",
            key="indexer_types",
        )
    return kinds[:num_layers]


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `glm-dsa`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    return open_indexed(file, GGUF_ARCHITECTURE, MODEL_TYPE, is_interleaved=True, is_own=_is_own)


def _is_own(layer: int, context_tokens: int) -> bool:
    """Whether a layer of a file that does not say has its own indexer: GLM-5.2 is the first with such a context."""
    return context_tokens < 1 << 20 or max(layer - 2, 0) % 4 == 0
