"""What every Gemma-4 with experts computes; `gemma4.py` reads config.json, `gemma4_gguf.py` reads GGUF files."""

from __future__ import annotations

from typing import Any

from argosy.config import ActivationConfig, AttentionConfig, LayerConfig, ModelConfig, RouterConfig


def make_layer(*, window: int, **heads: Any) -> LayerConfig:
    """A layer with this sliding window, or with none if it is 0; `heads` are arguments of `AttentionConfig`."""
    attention = AttentionConfig(
        sliding_window=window, scale=1.0, qk_norm="head", has_value_norm=True, **heads
    )
    return LayerConfig(mixer=attention, is_moe=True)


def make_config(*, hidden_size: int, has_expert_scale: bool = True, **sizes: Any) -> ModelConfig:
    """A model of this family; `sizes` are arguments of `ModelConfig`."""
    return ModelConfig(
        family="gemma4",
        hidden_size=hidden_size,
        router=RouterConfig(renormalize=True, has_expert_scale=has_expert_scale, has_norm=True),
        activation=ActivationConfig(kind="gelu_tanh"),
        has_post_norms=True,
        has_expert_norms=True,
        has_layer_scale=True,
        embedding_scale=hidden_size**0.5,
        **sizes,
    )
