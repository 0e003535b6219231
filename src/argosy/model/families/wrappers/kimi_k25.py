"""Kimi-K2.5 and K2.6: the text part, a Kimi-K2 under `language_model.`.

`config.json` is a wrapper with the text model in `text_config`; its `model_type` is "kimi_k2" on the hub and
"deepseek_v3" in files written by transformers. The wrapper's keys describe images, video and tokens. The vision tower
is in `model/encoders/moon_vit.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import ModelConfig
from argosy.model.families.latent import deepseek, kimi_k2
from argosy.model.families.latent.deepseek_gguf import GGUF_ARCHITECTURE, open_gguf
from argosy.model.reading.common_config import parse_wrapper

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "kimi_k25"

LAYOUTS = tuple(
    replace(
        layout,
        prefix="language_model.model.",
        head_name="language_model.lm_head.weight",
        passed_over=r"(vision_tower|mm_projector)\..*",
    )
    for layout in deepseek.LAYOUTS
)

# Keys of the projector, and more keys of placeholders.
_MORE_KEYS = (
    "media_placeholder_token_id", "video_placeholder", "use_unified_vision_chunk", "ignore_index",
    "projection_hidden_size", "projection_layer_norm_eps",
)  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`; an absent key gets DeepSeek-V3's default.

    Raises:
        The same errors as `parse_wrapper`.
    """
    text_types = ("kimi_k2", "deepseek_v3")
    return parse_wrapper(
        raw, MODEL_TYPE, text_types, lambda text: kimi_k2.read_text(text, MODEL_TYPE), *_MORE_KEYS
    )
