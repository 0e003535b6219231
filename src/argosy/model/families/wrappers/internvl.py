"""InternVL3.5 (30B-A3B, 241B-A28B) as transformers writes it: the text part, a Qwen3-MoE in `text_config`.

The vision tower is in `model/encoders/intern_vit.py`. Files of the hub have their text under `language_model.model.`,
those that transformers writes under `model.language_model.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import ModelConfig
from argosy.model.families.attention import qwen3_moe
from argosy.model.families.attention.qwen3_moe import GGUF_ARCHITECTURE, open_gguf
from argosy.model.families.attention.qwen_moe import make_layouts
from argosy.model.reading.common_config import parse_wrapper
from argosy.model.reading.layout import Layout

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "internvl"


def layouts(tower: str) -> tuple[Layout, ...]:
    """The text's names beside a tower of these names."""
    return tuple(
        replace(layout, prefix=prefix, head_name=head_name)
        for layout in make_layouts(passed_over=tower)
        for prefix, head_name in (
            ("language_model.model.", "language_model.lm_head.weight"),
            ("model.language_model.", "lm_head.weight"),
        )
    )


LAYOUTS = layouts(r"(model\.)?(vision_tower|multi_modal_projector)\..*")

_MORE_KEYS = (
    "downsample_ratio", "image_seq_length", "projector_hidden_act", "vision_feature_layer",
    "vision_feature_select_strategy",
)  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`, as `Qwen3MoeConfig` in transformers 5.24 does.

    Raises:
        The same errors as `parse_wrapper`.
    """
    return parse_wrapper(
        raw,
        MODEL_TYPE,
        (qwen3_moe.MODEL_TYPE,),
        lambda text: qwen3_moe.read_own(text, MODEL_TYPE),
        *_MORE_KEYS,
    )
