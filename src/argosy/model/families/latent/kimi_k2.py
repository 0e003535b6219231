"""Kimi-K2 (arXiv:2507.20534): a DeepSeek-V3 with more experts, fewer heads and no groups.

The text part of Kimi-K2.5 and K2.6 has the same config, so the wrapper `kimi_k25` reads it with `read_text`.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.config import ModelConfig
from argosy.model.families.latent.deepseek import DEEPSEEK_V3, LAYOUTS, read_latent_model
from argosy.model.families.latent.deepseek_gguf import GGUF_ARCHITECTURE, open_gguf
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import read_sigmoid_router

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config", "read_text"]

MODEL_TYPE = "kimi_k2"


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets DeepSeek-V3's default.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    config = read_text(reader, MODEL_TYPE)
    reader.finish()
    return config


def read_text(reader: ConfigReader, family: str) -> ModelConfig:
    """The text model that a config describes; the caller calls `finish()`."""
    return read_latent_model(
        reader,
        family=family,
        defaults=DEEPSEEK_V3,
        read_router=read_sigmoid_router(scale=2.5, num_groups=8, kept_groups=4),
    )
