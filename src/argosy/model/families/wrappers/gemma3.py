"""Gemma 3 in the wrapper of its larger sizes, which also see; `families/attention/gemma3_text.py` is the text model.

The vision tower (`vision_tower.`) is not read. The hub's names of tensors are those of transformers before 4.52; its
later versions may also write `model.language_model.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import ModelConfig
from argosy.model.families.attention import gemma3_text
from argosy.model.families.attention.gemma3_text import GGUF_ARCHITECTURE, open_gguf, read_text
from argosy.model.reading.common_config import parse_wrapper

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "gemma3"
_TOWER = r"(model\.)?(vision_tower|multi_modal_projector)\..*"

LAYOUTS = tuple(
    replace(gemma3_text.LAYOUTS[0], prefix=prefix, head_name=head_name, passed_over=_TOWER)
    for prefix, head_name in (
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
    )
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`, as `Gemma3TextConfig` in transformers 5.24 does.

    Raises:
        The same errors as `parse_wrapper`.
    """
    keys = ("boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image")
    return parse_wrapper(raw, MODEL_TYPE, ("gemma3_text",), read_text, *keys)
