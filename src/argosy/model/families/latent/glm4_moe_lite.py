"""GLM-4.7-Flash: a small GLM-4 mixture of experts with the latent attention and the router of DeepSeek-V3.

Files written by transformers list the dense layers in `mlp_layer_types`; hub files give `first_k_dense_replace`. The
files have a layer for multi-token prediction after the model's own layers, which only drafts.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.config import ModelConfig
from argosy.model.families.latent.deepseek import LAYOUTS, Defaults, read_latent_model
from argosy.model.families.latent.deepseek_gguf import GGUF_ARCHITECTURE, open_gguf
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import layers_by_type, read_sigmoid_router

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "glm4_moe_lite"

_DEFAULTS = Defaults(
    vocab_size=154_880,
    hidden_size=2048,
    num_layers=47,
    num_heads=20,
    num_kv_heads=20,
    dense_width=10_240,
    expert_width=1536,
    num_experts=64,
    experts_per_token=4,
    num_shared_experts=1,
    first_dense_layers=1,
    context_tokens=202_752,
    query_rank=768,
    nope_dim=192,
    value_dim=256,
    norm_eps=1e-5,
    eos_id=1,
    bos_id=0,
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `Glm4MoeLiteConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    config = read_latent_model(
        reader,
        family=MODEL_TYPE,
        defaults=_DEFAULTS,
        read_router=read_sigmoid_router(scale=1.8, num_groups=1, kept_groups=1),
        read_moe_layers=layers_by_type(_DEFAULTS.first_dense_layers),
    )
    reader.finish()
    return config
