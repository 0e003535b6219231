"""Kimi-VL: the text part, a Moonlight (DeepSeek-V3 without a compressed query) under `language_model.`.

The vision tower is in `model/encoders/moon_vit.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import ModelConfig
from argosy.model.families.latent import deepseek_v3
from argosy.model.families.latent.deepseek_gguf import GGUF_ARCHITECTURE, open_gguf
from argosy.model.families.wrappers import kimi_k25
from argosy.model.reading.common_config import parse_wrapper

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "kimi_vl"

LAYOUTS = tuple(
    replace(layout, passed_over=r"(vision_tower|multi_modal_projector)\..*") for layout in kimi_k25.LAYOUTS
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`; an absent key gets DeepSeek-V3's default.

    Raises:
        The same errors as `parse_wrapper`.
    """
    return parse_wrapper(
        raw,
        MODEL_TYPE,
        (deepseek_v3.MODEL_TYPE,),
        lambda text: deepseek_v3.read_text(text, MODEL_TYPE),
        "media_placeholder_token_id",
        "ignore_index",
        "vocab_size",
    )
