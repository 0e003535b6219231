"""Llama-4 with its vision tower: the text part, a `llama4_text` in `text_config` under `language_model.`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import ModelConfig
from argosy.model.families.attention import llama4_text
from argosy.model.families.attention.llama4_gguf import GGUF_ARCHITECTURE, open_gguf
from argosy.model.reading.common_config import parse_wrapper

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "llama4"

LAYOUTS = tuple(
    replace(
        layout,
        prefix="language_model.model.",
        head_name="language_model.lm_head.weight",
        passed_over=r"(vision_model|multi_modal_projector)\..*",
    )
    for layout in llama4_text.LAYOUTS
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`, as `llama4_text.parse_config` does.

    Raises:
        The same errors as `parse_wrapper`.
    """
    return parse_wrapper(
        raw,
        MODEL_TYPE,
        (llama4_text.MODEL_TYPE,),
        lambda text: llama4_text.read_text(text, MODEL_TYPE),
        "image_token_index",
        "boi_token_index",
        "eoi_token_index",
    )
