"""Llama 1 to 3 (arXiv:2407.21783) without experts, and the many models with its code; Llama-Guard 3 is one.

`attention_bias` adds a bias to q, k, v and o. GGUF files of the architecture `llama` may also hold a Mixtral, which
shares their reader (`mixtral.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.config import ModelConfig
from argosy.model.families.attention.dense import LAYOUTS, read_dense_model
from argosy.model.families.attention.mixtral import GGUF_ARCHITECTURE, open_gguf
from argosy.model.reading.common_config import CommonDefaults
from argosy.model.reading.config_reader import ConfigReader

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "llama"

_DEFAULTS = CommonDefaults(
    vocab_size=32_000,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=None,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    context_tokens=2048,
    eos_id=2,
    bos_id=1,
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `LlamaConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    has_bias = reader.flag("attention_bias", False)
    config = read_dense_model(
        reader,
        MODEL_TYPE,
        _DEFAULTS,
        num_layers=32,
        dense_width=11_008,
        has_qkv_bias=has_bias,
        has_o_bias=has_bias,
    )
    reader.finish()
    return config
