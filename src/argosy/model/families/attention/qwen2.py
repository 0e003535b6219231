"""Qwen2 and Qwen2.5 (arXiv:2412.15115) without experts: Qwen3's layers with biases on q, k and v, and without norms of
q and k. Many draft and embedding models are of this family.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import ModelConfig
from argosy.model.families.attention.dense import LAYOUTS, open_dense_gguf, read_dense_model
from argosy.model.families.attention.qwen3 import read_windows
from argosy.model.reading.common_config import CommonDefaults
from argosy.model.reading.config_reader import ConfigReader

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "qwen2"
GGUF_ARCHITECTURE = "qwen2"

_DEFAULTS = CommonDefaults(
    vocab_size=151_936, hidden_size=4096, num_heads=32, num_kv_heads=32, rope_theta=10_000.0, norm_eps=1e-6,
    context_tokens=32_768,
)  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `Qwen2Config` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    config = read_dense_model(
        reader,
        MODEL_TYPE,
        _DEFAULTS,
        num_layers=32,
        dense_width=22_016,
        read_windows=read_windows,
        has_qkv_bias=True,
    )
    reader.finish()
    return config


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `qwen2`: no layer has a window. Raises what `open_dense_gguf` raises."""
    return open_dense_gguf(file, GGUF_ARCHITECTURE, MODEL_TYPE, has_qkv_bias=True)
