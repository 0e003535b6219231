"""Qwen3.8-Flash-Next as on the hub: the text part of a vision-language model.

`config.json` is a wrapper with the text model in `text_config`; its own keys describe images and video. The vision
tower is in `model/encoders/qwen_vision.py`; n-grams take the placeholders of a picture as its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import ModelConfig
from argosy.model.families.recurrent.qwen4_exp_text import (
    GGUF_ARCHITECTURE,
    TEXT_LAYOUTS,
    open_gguf,
    read_text,
)
from argosy.model.reading.common_config import parse_wrapper

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "qwen4_exp"

# The hub's prefix, and no prefix, for tools that keep only the text model.
LAYOUTS = (*(replace(layout, prefix="model.language_model.") for layout in TEXT_LAYOUTS), *TEXT_LAYOUTS)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`, as `Qwen4ExpTextConfig` in transformers 5.24 does.

    Raises:
        The same errors as `parse_wrapper`.
    """
    return parse_wrapper(raw, MODEL_TYPE, ("qwen4_exp_text",), lambda text: read_text(text, MODEL_TYPE))
