"""Granite-3 without experts: Llama's layers with four factors, of embeddings, attention scores, residuals and logits.

GGUF files of this architecture may also hold a Granite-4 with attention in every layer (4.0-micro, 4.0-1b), whose
converter writes sizes of Mamba-2 mixers and experts that are not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig
from argosy.model.families.attention.dense import LAYOUTS, read_dense_model
from argosy.model.reading.common_config import CommonDefaults
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "granite"
GGUF_ARCHITECTURE = "granite"

DEFAULTS = CommonDefaults(
    vocab_size=32_000, hidden_size=4096, num_heads=32, num_kv_heads=None, rope_theta=10_000.0, norm_eps=1e-6,
    context_tokens=2048, bos_id=1, eos_id=2,
)  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `GraniteConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    config = read_dense_model(
        reader, MODEL_TYPE, DEFAULTS, num_layers=32, dense_width=11_008, **attention_of(reader)
    )
    config = replace(config, **factors_of(reader))
    reader.finish()
    return config


def attention_of(reader: ConfigReader) -> dict[str, Any]:
    """Read the scale of attention scores and the biases, as arguments of `AttentionConfig`."""
    has_bias = reader.flag("attention_bias", False)
    return {
        "scale": reader.number("attention_multiplier", 1.0),
        "has_qkv_bias": has_bias,
        "has_o_bias": has_bias,
    }


def factors_of(reader: ConfigReader) -> dict[str, Any]:
    """Read the other factors, as arguments of `ModelConfig`."""
    return {
        "embedding_scale": reader.number("embedding_multiplier", 1.0),
        "residual_scale": reader.number("residual_multiplier", 1.0),
        "logit_scale": 1 / reader.number("logits_scaling", 1.0),
    }


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `granite`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    has_rope = reader.flag("rope.scaling.finetuned", True)
    config = read_dense_gguf(reader, MODEL_TYPE, has_rope=has_rope)
    for name in ("conv_kernel", "group_count", "inner_size", "state_size", "time_step_rank"):
        reader.key(f"ssm.{name}")
    reader.finish()
    return read_gguf_layout(file, config, is_paired=True, has_rope_freqs=False)


def read_dense_gguf(reader: GgufConfigReader, family: str, **changes: Any) -> ModelConfig:
    """Read the metadata of a Granite without experts; `changes` are arguments of `GgufConfigReader.common`."""
    common = reader.common(has_experts=False, **changes)
    for name in ("expert_count", "expert_used_count"):
        reader.neutral(name, 0)
    width = reader.integer("feed_forward_length")
    reader.neutral("expert_shared_feed_forward_length", width)
    attention = AttentionConfig(**common.attention, scale=reader.number("attention.scale", 0.0))
    return ModelConfig(
        family=family,
        layers=(LayerConfig(mixer=attention, is_moe=False),) * reader.num_layers(),
        dense_width=width,
        **gguf_factors_of(reader),
        **common.model,
    )


def gguf_factors_of(reader: GgufConfigReader) -> dict[str, Any]:
    """Read the factors, as arguments of `ModelConfig`; 0 stands for no factor."""
    return {
        "embedding_scale": reader.number("embedding_scale", 0.0) or 1.0,
        "residual_scale": reader.number("residual_scale", 0.0) or 1.0,
        "logit_scale": 1 / reader.number("logit_scale"),
    }
