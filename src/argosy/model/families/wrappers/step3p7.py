"""Step-3.7-Flash: the text part, a Step-3.5 in `text_config`; files of the hub name its tensors as Step-3.5's.

The vision tower is in `model/encoders/step_vision.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.config import ModelConfig
from argosy.model.families.attention import step3p5
from argosy.model.families.attention.step3p5 import GGUF_ARCHITECTURE, LAYOUTS, open_gguf
from argosy.model.reading.common_config import parse_wrapper

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "step3p7"

# Keys of the tower, and copies of the text's.
_MORE_KEYS = (
    "projector_bias", "understand_projector_stride", "image_token_len", "patch_token_len", "hidden_size",
    "max_position_embeddings",
)  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`; absent keys get Step-3.5's defaults.

    Raises:
        The same errors as `parse_wrapper`.
    """
    return parse_wrapper(
        raw, MODEL_TYPE, (step3p5.MODEL_TYPE,), lambda text: step3p5.read_text(text, MODEL_TYPE), *_MORE_KEYS
    )
