"""GLM-4.5V and GLM-4.6V: the text part, a GLM-4.5-Air under `model.language_model.`.

`config.json` is a wrapper with the text model in `text_config`; its own keys describe images and video. The vision
tower (`model.visual.*`) is in `model/encoders/glm_vision.py`. q and k have no norm. Image positions have three axes,
each of which rotates a section of a head's pairs; text has the same position on all axes, which is ordinary rotary
embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import ModelConfig
from argosy.model.families.attention import glm4_moe
from argosy.model.families.attention.glm4_moe import GGUF_ARCHITECTURE, open_gguf
from argosy.model.reading.common_config import parse_wrapper
from argosy.model.reading.config_reader import ConfigReader

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "glm4v_moe"

LAYOUTS = tuple(
    replace(layout, prefix="model.language_model.", passed_over=r"model\.visual\..*")
    for layout in glm4_moe.LAYOUTS
)

# Placeholders of images and video, which released files repeat in the text part.
_TOKEN_KEYS = ("image_start_token_id", "image_end_token_id", "video_start_token_id", "video_end_token_id")


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`, as `Glm4vMoeTextConfig` in transformers 5.24 does.

    Raises:
        The same errors as `parse_wrapper`.
    """
    return parse_wrapper(raw, MODEL_TYPE, ("glm4v_moe_text",), _read_text, *_TOKEN_KEYS)


def _read_text(text: ConfigReader) -> ModelConfig:
    text.neutral("use_qk_norm", False)
    text.passed("image_token_id", "video_token_id", *_TOKEN_KEYS)
    return glm4_moe.read_text(
        text,
        MODEL_TYPE,
        has_qk_norm=False,
        has_bias=True,
        vocab_size=151_424,
        context_tokens=65_536,
        axes=glm4_moe.AXES,
    )
