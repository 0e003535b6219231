"""DeepSeek-V3 and R1 (arXiv:2412.19437): latent attention, and sigmoid routing within the best groups of experts.

Hub files have a layer for multi-token prediction after the model's own layers, which only drafts. If `rope_interleave`
is false, rotary dimensions are paired in halves.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.config import ModelConfig
from argosy.model.families.latent.deepseek import DEEPSEEK_V3, LAYOUTS, read_latent_model
from argosy.model.families.latent.deepseek_gguf import GGUF_ARCHITECTURE, open_gguf
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import read_sigmoid_router

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "deepseek_v3"


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `DeepseekV3Config` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    config = read_latent_model(
        reader,
        family=MODEL_TYPE,
        defaults=DEEPSEEK_V3,
        read_router=read_sigmoid_router(scale=2.5, num_groups=8, kept_groups=4),
    )
    reader.finish()
    return config
