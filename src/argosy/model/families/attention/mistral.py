"""Mistral-7B (arXiv:2310.06825) and its successors without experts: Llama's layers, all with the same window if
`sliding_window` is set.

Its GGUF files are of the architecture `llama` (`llama.py`). Mistral-Small-3 is one inside a wrapper that sees
(`families/wrappers/mistral3.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from argosy.config import ModelConfig
from argosy.model.families.attention.dense import LAYOUTS, read_dense_model
from argosy.model.families.attention.mixtral import GGUF_ARCHITECTURE, open_gguf
from argosy.model.reading.common_config import CommonDefaults
from argosy.model.reading.config_reader import ConfigReader

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "mistral"

_DEFAULTS = CommonDefaults(
    vocab_size=32_000,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    context_tokens=131_072,
    eos_id=2,
    bos_id=1,
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `MistralConfig` in transformers 5.24.

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
    reader.neutral("attention_bias", False)
    return read_dense_model(
        reader,
        family,
        _DEFAULTS,
        num_layers=32,
        dense_width=14_336,
        read_windows=partial(read_windows, default=4096),
    )


def read_windows(reader: ConfigReader, num_layers: int, default: int | None) -> Sequence[int]:
    """Read the window of all layers; `default` is that of a config without the key."""
    window = reader.optional_integer("sliding_window", default=default) or 0
    reader.layer_types(num_layers, ("sliding_attention",) if window else ("full_attention",))
    reader.neutral("use_sliding_window", window > 0)
    return [window] * num_layers
