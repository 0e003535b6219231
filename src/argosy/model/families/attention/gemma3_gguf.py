"""What every Gemma 3 computes, and its GGUF files; `gemma3_text.py` describes the model and reads config.json.

llama.cpp takes the scale of scores from the number of layers, which names the released size, and so does this reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import ActivationConfig, ModelConfig, RopeConfig
from argosy.model.families.windows.windowed import FULL, SLIDING, attentions_of, kinds_by_turns, layers_of
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout

GGUF_ARCHITECTURE = "gemma3"
EVERY = 6  # of so many layers, one sees all positions
_LAYERS_OF_27B = 62


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
    attentions = attentions_of(ropes, window, **shape, scale=scale, qk_norm="head")
    return ModelConfig(
        family="gemma3_text",
        hidden_size=hidden_size,
        layers=layers_of(kinds, [False] * len(kinds), attentions),
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
        kinds_by_turns(num_layers, EVERY) if window else (FULL,) * num_layers,
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
