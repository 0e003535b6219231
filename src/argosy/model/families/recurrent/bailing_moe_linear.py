"""Ring-linear 2.0 (mini 16B-A1.6B, flash 104B-A7.4B): Ling 2.x with lightning attention in most layers.

Layer 0 forgets faster than any other, as in the makers' code, where the slopes of layer l have the factor
1 - (l - 1) / (layers - 1) + 1e-5; mlx-lm gives it layer 1's slopes, and SGLang has l instead of l - 1.
Ling-2.5, whose other layers have latent attention, is in `bailing_lightning.py`, and is refused here by its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import ModelConfig
from argosy.model.families.attention.bailing_moe import DEFAULTS, read_ling
from argosy.model.families.attention.bailing_moe import LAYOUTS as _OF_LING
from argosy.model.families.recurrent.lightning import (
    JOINED_LIGHTNING,
    LIGHTNING_NAMES,
    with_lightning_layers,
)
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import read_sigmoid_router

MODEL_TYPE = "bailing_moe_linear"
GGUF_ARCHITECTURE = None  # llama.cpp has none

LAYOUTS = tuple(
    replace(
        layout,
        layer_names={**layout.layer_names, **LIGHTNING_NAMES},
        joined=(*layout.joined, *JOINED_LIGHTNING),
    )
    for layout in _OF_LING
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets Ling's default.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    config = read_ling(reader, MODEL_TYPE, DEFAULTS, read_sigmoid_router(1.0, 8, 4))
    attention = config.attention
    assert attention.rope is not None
    config = with_lightning_layers(
        reader,
        config,
        num_heads=attention.num_heads,
        head_dim=attention.head_dim,
        rope=attention.rope,
        has_qk_norm=attention.qk_norm == "head",
        numbered_from=-1,
    )
    reader.finish()
    return config
