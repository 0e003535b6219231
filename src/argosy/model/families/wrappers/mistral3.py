"""Mistral-Small-3, Ministral-3 and Mistral-Small-4 with their vision tower, which is in
`model/encoders/pixtral_vision.py`: the text part, a `mistral`, `ministral3` or `mistral4` in `text_config`.

Files of the hub have their text under `language_model.model.`, those that transformers writes under
`model.language_model.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import ModelConfig
from argosy.model.families.attention import ministral3, mistral
from argosy.model.families.latent import deepseek, mistral4
from argosy.model.families.latent.mistral4 import GGUF_ARCHITECTURE, open_gguf
from argosy.model.reading.common_config import parse_wrapper
from argosy.model.reading.config_reader import ConfigReader

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "mistral3"

LAYOUTS = (
    *(
        replace(
            layout,
            prefix=prefix,
            head_name=head_name,
            passed_over=r"(model\.)?(vision_tower|multi_modal_projector)\..*",
        )
        for layout in deepseek.LAYOUTS
        for prefix, head_name in (
            ("language_model.model.", "language_model.lm_head.weight"),
            ("model.language_model.", "lm_head.weight"),
        )
    ),
    mistral4.OWN_LAYOUT,
)

# Keys of the projector.
_MORE_KEYS = (
    "image_token_index", "multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size",
    "vision_feature_layer",
)  # fmt: skip


_TEXTS = {"mistral": mistral.read_text, "ministral3": ministral3.read_text, "mistral4": mistral4.read_text}


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`; an absent key gets the default of its config class in transformers 5.24.

    Raises:
        The same errors as `parse_wrapper`.
    """
    return parse_wrapper(raw, MODEL_TYPE, tuple(_TEXTS), _read_text, *_MORE_KEYS)


def _read_text(text: ConfigReader) -> ModelConfig:
    return _TEXTS[text.one_of("model_type", "mistral", tuple(_TEXTS))](text, MODEL_TYPE)
