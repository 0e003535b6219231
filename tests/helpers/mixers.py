"""The mixers of a model whose layers all have grouped-query attention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from argosy.config import AttentionConfig, ModelConfig


def attentions(config: ModelConfig) -> tuple[AttentionConfig, ...]:
    """Return the attention of every layer; fails if a layer has another mixer."""
    found = [layer.mixer for layer in config.layers if isinstance(layer.mixer, AttentionConfig)]
    assert len(found) == config.num_layers
    return tuple(found)


def windows(config: ModelConfig) -> list[int]:
    return [one.sliding_window for one in attentions(config)]


def in_float32(config: ModelConfig) -> ModelConfig:
    """Return the config with thetas and yarn's attention factors as GGUF files have them."""
    layers = []
    for layer in config.layers:
        mixer = layer.mixer
        if isinstance(mixer, AttentionConfig) and mixer.rope is not None:
            rope = replace(mixer.rope, theta=float(str(np.float32(mixer.rope.theta))))
            if rope.attention_factor:
                rope = replace(rope, attention_factor=float(str(np.float32(rope.attention_factor))))
            mixer = replace(mixer, rope=rope)
        layers.append(replace(layer, mixer=mixer))
    return replace(config, layers=tuple(layers))
