"""Granite-3 MoE with a shared expert."""

from __future__ import annotations

from collections.abc import Mapping

from argosy.config import ModelConfig
from argosy.model.families.attention.granitemoe import GGUF_ARCHITECTURE, LAYOUTS, open_gguf, read_granite
from argosy.model.reading.config_reader import ConfigReader

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "granitemoeshared"


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `GraniteMoeSharedConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    return read_granite(ConfigReader(raw, MODEL_TYPE), MODEL_TYPE, shared=0)
