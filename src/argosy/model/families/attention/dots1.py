"""dots.llm1 (142B-A14B): Qwen3's attention, with a norm of each head of q and k, and the router of DeepSeek-V3.

Layers from `max_window_layers` on have the window, unless `layer_types` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import ModelConfig
from argosy.model.families.attention.sigmoid_moe import open_sigmoid_gguf, read_sigmoid_model
from argosy.model.families.latent.deepseek import LAYOUTS
from argosy.model.families.windows.windowed import read_windows_behind
from argosy.model.reading.common_config import MoeDefaults
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import layers_behind_the_dense, read_sigmoid_router

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "dots1"
GGUF_ARCHITECTURE = "dots1"

_DEFAULTS = MoeDefaults(
    vocab_size=152_064,
    hidden_size=4608,
    num_layers=62,
    num_heads=32,
    num_kv_heads=32,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    context_tokens=2048,
    dense_width=10_944,
    expert_width=1408,
    num_experts=None,
    experts_per_token=None,
    num_shared_experts=None,
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `Dots1Config` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    has_bias = reader.flag("attention_bias", False)
    reader.neutral("use_sliding_window", False)
    reader.neutral("moe_layer_freq", 1)
    config = read_sigmoid_model(
        reader,
        MODEL_TYPE,
        _DEFAULTS,
        # Released files give the method of the choice as the function of the scores.
        read_router=read_sigmoid_router(1.0, 1, 1, renormalize=False, names=("noaux_tc", "sigmoid")),
        read_moe_layers=layers_behind_the_dense(0),
        read_windows=_read_windows,
        has_qkv_bias=has_bias,
        has_o_bias=has_bias,
        qk_norm="head",
    )
    reader.finish()
    return config


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `dots1`. Raises what `open_sigmoid_gguf` raises."""
    return open_sigmoid_gguf(file, GGUF_ARCHITECTURE, MODEL_TYPE)


def _read_windows(reader: ConfigReader, num_layers: int) -> Sequence[int]:
    window = reader.optional_integer("sliding_window", default=4096) or 0
    first = reader.optional_integer("max_window_layers", default=62, least=0)
    missing = "sliding_window", "a number, because layer_types asks for a window"
    return read_windows_behind(reader, num_layers, window, first, missing)
