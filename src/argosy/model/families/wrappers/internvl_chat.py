"""InternVL3.5 as OpenGVLab publishes it: the text part, a Qwen3-MoE in `llm_config`.

The wrapper's other keys describe the tower and how pictures are cut; `model/encoders/intern_vit.py` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.config import ModelConfig
from argosy.model.families.attention import qwen3_moe
from argosy.model.families.attention.qwen3_moe import GGUF_ARCHITECTURE, open_gguf
from argosy.model.families.wrappers import internvl
from argosy.model.reading.common_config import parse_wrapper

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "internvl_chat"
LAYOUTS = internvl.layouts(r"(vision_model|mlp1)\..*")

_MORE_KEYS = (
    "downsample_ratio", "dynamic_image_size", "force_image_size", "hidden_size", "image_fold", "max_dynamic_patch",
    "min_dynamic_patch", "pad2square", "ps_version", "select_layer", "system_message", "template", "use_backbone_lora",
    "use_llm_lora", "use_thumbnail",
)  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`, as `Qwen3MoeConfig` in transformers 5.24 does.

    Raises:
        The same errors as `parse_wrapper`.
    """
    named = {"text_config" if key == "llm_config" else key: value for key, value in raw.items()}
    return parse_wrapper(
        named,
        MODEL_TYPE,
        (qwen3_moe.MODEL_TYPE,),
        lambda text: qwen3_moe.read_own(text, MODEL_TYPE),
        *_MORE_KEYS,
    )
