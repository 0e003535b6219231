"""Youtu-LLM (2B, Tencent): DeepSeek-V3's latent attention in a model without experts.

GGUF files have the architecture of DeepSeek's, which `deepseek_gguf.py` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import ModelConfig, RouterConfig
from argosy.model.families.latent.deepseek import DEEPSEEK_V3, LAYOUTS, read_latent_model
from argosy.model.families.latent.deepseek_gguf import GGUF_ARCHITECTURE, open_gguf
from argosy.model.reading.config_reader import ConfigReader

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "OTHER_TYPES", "open_gguf", "parse_config"]

MODEL_TYPE = "youtu"
OTHER_TYPES = ("youtu_llm",)  # of files made before transformers had the class

_DEFAULTS = replace(
    DEEPSEEK_V3,
    vocab_size=128_256,
    hidden_size=2048,
    num_layers=32,
    num_heads=16,
    num_kv_heads=16,
    context_tokens=131_072,
    dense_width=6144,
    num_experts=0,
    num_shared_experts=0,
    num_mtp_layers=0,
    eos_id=128_001,
    bos_id=128_000,
    is_embedding_tied=True,
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `YoutuConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    reader.passed("embedding_initializer_range")
    config = read_latent_model(
        reader,
        family=MODEL_TYPE,
        defaults=_DEFAULTS,
        read_router=lambda *_: RouterConfig(),
        read_moe_layers=lambda _, num_layers: [False] * num_layers,
    )
    reader.finish()
    return config
