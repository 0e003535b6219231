"""Solar-Open (102B-A12B): GLM-4.5's attention over whole heads, without norms, and experts in every layer.

Its GGUF files have GLM-4.5's architecture.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.config import ModelConfig
from argosy.model.families.attention.glm4_moe import GGUF_ARCHITECTURE, LAYOUTS, open_gguf
from argosy.model.families.attention.sigmoid_moe import read_sigmoid_model
from argosy.model.reading.common_config import MoeDefaults
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import read_sigmoid_router

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "solar_open"


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `SolarOpenConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    reader.neutral("first_k_dense_replace", 0)  # transformers has no dense layers, whatever it says
    reader.neutral("use_qk_norm", False)
    config = read_sigmoid_model(
        reader,
        MODEL_TYPE,
        MoeDefaults(
            vocab_size=196_608,
            hidden_size=4096,
            num_layers=48,
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            rope_theta=1_000_000.0,
            partial_rotary_factor=1.0,
            norm_eps=1e-5,
            context_tokens=131_072,
            dense_width=1,  # released files have one, for layers that the model does not have
            expert_width=1280,
            num_experts=128,
            experts_per_token=8,
            num_shared_experts=1,
        ),
        read_router=read_sigmoid_router(scale=1.0, num_groups=1, kept_groups=1),
        read_moe_layers=lambda _, num_layers: [True] * num_layers,
        has_qkv_bias=reader.flag("attention_bias", False),
    )
    reader.finish()
    return config
