"""Qwen3.5-MoE and Qwen3.6-MoE as the hub has them: the text part of a vision-language model.

`config.json` is a wrapper with the text model in `text_config`; its own keys are about images and video. The vision
tower (`model.visual.*`) is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import ModelConfig
from argosy.model.families.common_config import parse_wrapper
from argosy.model.families.qwen3_5_moe_text import GGUF_ARCHITECTURE, TEXT_LAYOUTS, open_gguf, read_text

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "qwen3_5_moe"

# As the hub has it, and without the prefix, as tools that only keep the text model may write it.
LAYOUTS = (*(replace(layout, prefix="model.language_model.") for layout in TEXT_LAYOUTS), *TEXT_LAYOUTS)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`, as `Qwen3_5MoeTextConfig` in transformers 5.24 does.

    Raises:
        What `parse_wrapper` does.
    """
    return parse_wrapper(raw, MODEL_TYPE, ("qwen3_5_moe_text",), lambda text: read_text(text, MODEL_TYPE))
