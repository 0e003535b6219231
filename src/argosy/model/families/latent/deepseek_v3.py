"""DeepSeek-V3 and R1 (arXiv:2412.19437): latent attention, and sigmoid routing within the best groups of experts.

GigaChat3, Kanana-2 and Moonlight are the same with other sizes, most of them without a query rank; so are
JoyAI-LLM-Flash and Sarvam-105B, under model types of their own.

Hub files have a layer for multi-token prediction after the model's own layers, which only drafts. If `rope_interleave`
is false, rotary dimensions are paired in halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import ModelConfig
from argosy.model.families.latent.deepseek import DEEPSEEK_V3, LAYOUTS, read_latent_model
from argosy.model.families.latent.deepseek_gguf import GGUF_ARCHITECTURE, open_gguf
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import read_sigmoid_router

__all__ = [
    "GGUF_ARCHITECTURE",
    "LAYOUTS",
    "MODEL_TYPE",
    "OTHER_TYPES",
    "open_gguf",
    "parse_config",
    "read_text",
]

MODEL_TYPE = "deepseek_v3"
OTHER_TYPES = ("joyai_llm_flash", "sarvam_mla")

# `SarvamMLAConfig` in transformers 5.24.
_SARVAM = replace(
    DEEPSEEK_V3,
    vocab_size=262_144,
    hidden_size=4096,
    num_layers=32,
    num_heads=64,
    num_kv_heads=None,
    dense_width=16_384,
    num_experts=128,
    first_dense_layers=1,
    query_rank=None,
    num_mtp_layers=0,
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `DeepseekV3Config` in transformers 5.24.

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
    types = (MODEL_TYPE, *OTHER_TYPES)
    is_sarvam = reader.one_of("model_type", MODEL_TYPE, types) == "sarvam_mla"
    groups, kept = (1, 1) if is_sarvam else (8, 4)
    if is_sarvam:
        reader.passed("use_qk_norm")  # their own code does not read it
    return read_latent_model(
        reader,
        family=family,
        defaults=_SARVAM if is_sarvam else DEEPSEEK_V3,
        read_router=read_sigmoid_router(2.5, groups, kept),
    )
