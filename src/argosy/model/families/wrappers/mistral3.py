"""Mistral-Small-4 with its vision tower: the text part, a `mistral4` in `text_config`. The tower is in
`model/encoders/pixtral_vision.py`.

Mistral's dense models have the same wrapper, and are refused. Files of the hub have their text under
`language_model.model.`, those that transformers writes under `model.language_model.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import ModelConfig
from argosy.model.families.latent import deepseek, mistral4
from argosy.model.families.latent.mistral4 import GGUF_ARCHITECTURE, open_gguf
from argosy.model.reading.common_config import parse_wrapper

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


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`; an absent key gets the default of `Mistral4Config` in transformers 5.24.

    Raises:
        The same errors as `parse_wrapper`.
    """
    return parse_wrapper(
        raw,
        MODEL_TYPE,
        (mistral4.MODEL_TYPE,),
        lambda text: mistral4.read_text(text, MODEL_TYPE),
        *_MORE_KEYS,
    )
