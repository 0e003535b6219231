"""What every Gemma 3 computes, and its GGUF files; `gemma3_text.py` describes the model and reads config.json.

llama.cpp takes the scale of scores from the number of layers, which names the released size, and so does this reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import ActivationConfig, AttentionConfig, LayerConfig, ModelConfig, RopeConfig
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout

GGUF_ARCHITECTURE = "gemma3"
SLIDING, FULL = "sliding_attention", "full_attention"
_LAYERS_OF_27B = 62


def kinds_of_layers(num_layers: int, every: int = 6) -> tuple[str, ...]:
    """Return the kinds of layers of which every n-th sees all positions."""
    return tuple(SLIDING if layer % every else FULL for layer in range(1, num_layers + 1))


def make_config(
    kinds: tuple[str, ...],
    ropes: Mapping[str, RopeConfig],
    shape: dict[str, Any],
    *,
    window: int,
    scale: float,
    **sizes: Any,
) -> ModelConfig:
    """A model of this family.

    Args:
        ropes: the rotary embedding of each kind of layer.
        shape: the hidden size, and arguments of `AttentionConfig` that are the same in every layer.
        sizes: more arguments of `ModelConfig`.
    """
    hidden_size = shape.pop("hidden_size")
    heads = AttentionConfig(**shape, rope=None, scale=scale, qk_norm="head")
    layers = {
        kind: LayerConfig(
            mixer=replace(heads, rope=ropes[kind], sliding_window=window if kind == SLIDING else 0),
            is_moe=False,
        )
        for kind in set(kinds)
    }
    return ModelConfig(
        family="gemma3_text",
        hidden_size=hidden_size,
        layers=tuple(layers[kind] for kind in kinds),
        activation=ActivationConfig(kind="gelu_tanh"),
        has_post_norms=True,
        embedding_scale=hidden_size**0.5,
        **sizes,
    )


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `gemma3`; without a window, every layer sees all.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    sizes, heads = reader.common(has_experts=False)
    num_layers, hidden_size, rope = reader.num_layers(), sizes.pop("hidden_size"), heads.pop("rope")
    window = reader.integer("attention.sliding_window", 0, least=0)
    local = RopeConfig(theta=reader.number("rope.freq_base_swa", 10_000.0), rotary_dim=rope.rotary_dim)
    if rope.kind != "yarn":  # only yarn looks at it; config.json has none
        rope = replace(rope, original_context=0)
    config = make_config(
        kinds_of_layers(num_layers) if window else (FULL,) * num_layers,
        {SLIDING: local, FULL: rope},
        heads | {"hidden_size": hidden_size},
        window=window,
        scale=(hidden_size // heads["num_heads"] if num_layers == _LAYERS_OF_27B else heads["head_dim"])
        ** -0.5,
        dense_width=reader.integer("feed_forward_length"),
        logit_cap=reader.number("final_logit_softcapping")
        if reader.is_set("final_logit_softcapping")
        else 0.0,
        **sizes,
    )
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False)
