"""GLM-4.5, 4.6 and 4.7: grouped-query attention with partial rotary embedding, and the router of DeepSeek-V3.

The first layers have dense networks; the others add a shared expert to the routed ones. The large models norm q and k,
Air does not. The files have a layer for multi-token prediction after the model's own layers, which only drafts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig
from argosy.model.families.latent.deepseek import LAYOUTS
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.experts_config import (
    layers_behind_the_dense,
    read_dense_layers,
    read_grouped_router,
    read_mtp_layers,
    read_sigmoid_router,
    require_groups,
)
from argosy.model.reading.gguf_config import SIGMOID, GgufConfigReader
from argosy.model.reading.gguf_layout import dense_name, read_gguf_layout
from argosy.model.reading.rope_config import Axes

__all__ = ["AXES", "GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config", "read_text"]

MODEL_TYPE = "glm4_moe"
GGUF_ARCHITECTURE = "glm4moe"
AXES = Axes(is_mixed=False, sections=(8, 12, 12))  # for GLM-4.5V, whose GGUF files have the same architecture


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `Glm4MoeConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    has_qk_norm = reader.flag("use_qk_norm", False)
    config = read_text(
        reader,
        MODEL_TYPE,
        has_qk_norm=has_qk_norm,
        has_bias=False,
        vocab_size=151_552,
        context_tokens=131_072,
    )
    reader.finish()
    return config


def read_text(
    reader: ConfigReader, family: str, *, has_qk_norm: bool, has_bias: bool, **defaults: Any
) -> ModelConfig:
    """Read the text model of this family or of its vision-language sibling; the caller calls `finish()`.

    Args:
        has_bias: the default of `attention_bias`.
        defaults: the defaults of `read_common` that differ between the two.
    """
    common = read_common(
        reader,
        CommonDefaults(
            hidden_size=4096,
            num_heads=96,
            num_kv_heads=8,
            rope_theta=10_000.0,
            norm_eps=1e-5,
            num_experts=128,
            experts_per_token=8,
            partial_rotary_factor=0.5,
            **defaults,
        ),
    )
    num_layers = reader.integer("num_hidden_layers", default=46, most=MOST_LAYERS)
    is_moe = layers_behind_the_dense(1)(reader, num_layers)
    expert_width = reader.integer("moe_intermediate_size", default=1408)
    read_router = read_sigmoid_router(scale=1.0, num_groups=1, kept_groups=1)
    attention = AttentionConfig(
        **common.attention,
        has_qkv_bias=reader.flag("attention_bias", has_bias),
        qk_norm="head" if has_qk_norm else "none",
    )
    return ModelConfig(
        family=family,
        layers=tuple(LayerConfig(mixer=attention, is_moe=moe) for moe in is_moe),
        expert_width=expert_width,
        router=read_router(reader, common.model["num_experts"], common.model["experts_per_token"]),
        dense_width=reader.integer("intermediate_size", default=10_944),
        shared_width=reader.integer("n_shared_experts", default=1) * expert_width,
        num_mtp_layers=read_mtp_layers(reader, 1),
        **common.model,
    )


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `glm4moe`; its tensors show whether q and k have norms and biases.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    common = reader.common(has_partial_rope=True, axes=AXES)
    num_layers = reader.num_layers()
    num_dense = read_dense_layers(reader, num_layers)
    reader.neutral("expert_gating_func", 0, SIGMOID)
    router = read_grouped_router(
        reader, is_sigmoid=True, has_choice_bias=dense_name(f"layers.{num_dense}.choice_bias") in file.tensors
    )
    expert_width = reader.integer("expert_feed_forward_length")
    attention = AttentionConfig(
        **common.attention,
        has_qkv_bias=dense_name("layers.0.q_bias") in file.tensors,
        qk_norm="head" if dense_name("layers.0.q_norm") in file.tensors else "none",
    )
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=tuple(LayerConfig(mixer=attention, is_moe=layer >= num_dense) for layer in range(num_layers)),
        expert_width=expert_width,
        router=require_groups(router, common.model["num_experts"], common.model["experts_per_token"]),
        dense_width=reader.integer("feed_forward_length"),
        shared_width=reader.integer("expert_shared_count", 0, least=0) * expert_width,
        num_mtp_layers=reader.num_mtp_layers(),
        **common.model,
    )
    reader.finish()
    return read_gguf_layout(
        file, config, is_paired=False, has_rope_freqs=False, names={"mlp_norm": "post_attention_norm.weight"}
    )
