"""The mixers of a model whose layers all have grouped-query attention."""

from __future__ import annotations

from argosy.config import AttentionConfig, ModelConfig


def attentions(config: ModelConfig) -> tuple[AttentionConfig, ...]:
    """Return the attention of every layer; fails if a layer has another mixer."""
    found = [layer.mixer for layer in config.layers if isinstance(layer.mixer, AttentionConfig)]
    assert len(found) == config.num_layers
    return tuple(found)


def windows(config: ModelConfig) -> list[int]:
    return [one.sliding_window for one in attentions(config)]
