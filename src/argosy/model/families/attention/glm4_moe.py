"""GLM-4.5, 4.6 and 4.7: grouped-query attention with partial rotary embedding, and the router of DeepSeek-V3.

The first layers have dense networks; the others add a shared expert to the routed ones. The large models norm q and k,
Air does not. The files have a layer for multi-token prediction after the model's own layers, which only drafts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import ModelConfig
from argosy.model.families.attention.sigmoid_moe import open_sigmoid_gguf, read_sigmoid_model
from argosy.model.families.latent.deepseek import LAYOUTS
from argosy.model.reading.common_config import MoeDefaults
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import layers_behind_the_dense, read_sigmoid_router
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
    return read_sigmoid_model(
        reader,
        family,
        MoeDefaults(
            hidden_size=4096,
            num_layers=46,
            num_heads=96,
            num_kv_heads=8,
            rope_theta=10_000.0,
            norm_eps=1e-5,
            dense_width=10_944,
            expert_width=1408,
            num_experts=128,
            experts_per_token=8,
            num_shared_experts=1,
            num_mtp_layers=1,
            partial_rotary_factor=0.5,
            **defaults,
        ),
        read_router=read_sigmoid_router(scale=1.0, num_groups=1, kept_groups=1),
        read_moe_layers=layers_behind_the_dense(1),
        has_qkv_bias=reader.flag("attention_bias", has_bias),
        qk_norm="head" if has_qk_norm else "none",
    )


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `glm4moe`. Raises what `open_sigmoid_gguf` raises."""
    names = {"mlp_norm": "post_attention_norm.weight"}
    return open_sigmoid_gguf(file, GGUF_ARCHITECTURE, MODEL_TYPE, names=names, axes=AXES)
