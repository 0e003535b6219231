"""Qwen3-MoE (arXiv:2505.09388): routed experts only; each head of q and k is normed before rotation.

`attention_bias` adds a bias to q, k, v and o. With `use_sliding_window`, the window applies to every layer
(Qwen3MoeModel in transformers 5.24); `max_window_layers`, which released files still have, has no effect there.
Qwen3-VL-MoE and the thinker of Qwen3-Omni have the same text model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig, RouterConfig
from argosy.model.families.attention.qwen_moe import LAYOUTS, read_moe_layers
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout
from argosy.model.reading.rope_config import Axes

__all__ = [
    "GGUF_ARCHITECTURE",
    "LAYOUTS",
    "MODEL_TYPE",
    "open_gguf",
    "open_qwen3_gguf",
    "parse_config",
    "read_own",
    "read_text",
    "read_window",
]

MODEL_TYPE = "qwen3_moe"
GGUF_ARCHITECTURE = "qwen3moe"


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `Qwen3MoeConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    config = read_own(reader, MODEL_TYPE)
    reader.finish()
    return config


def read_own(reader: ConfigReader, family: str) -> ModelConfig:
    """Read a model of this family, perhaps in the wrapper of another; the caller calls `finish()`."""
    return read_text(
        reader,
        family,
        read_window,
        num_layers=24,
        renormalize=False,
        expert_width=768,
        dense_width=6144,
        vocab_size=151_936,
        hidden_size=2048,
        num_heads=32,
        num_kv_heads=4,
        rope_theta=10_000.0,
        norm_eps=1e-6,
        context_tokens=32_768,
        num_experts=128,
        experts_per_token=8,
    )


def read_text(
    reader: ConfigReader,
    family: str,
    read_window: Callable[[ConfigReader, int], int] | None = None,
    *,
    num_layers: int,
    renormalize: bool,
    expert_width: int,
    dense_width: int,
    qk_norm: Literal["none", "head", "flat"] = "head",
    **defaults: Any,
) -> ModelConfig:
    """Read the text model of this family or of its multimodal siblings; the caller calls `finish()`.

    Args:
        read_window: given the number of layers, reads their sliding window; None means that the family has none.
        qk_norm: as `AttentionConfig.qk_norm`.
        num_layers and the following: defaults of absent keys; `defaults` are those of `read_common`.
    """
    num_layers = reader.integer("num_hidden_layers", default=num_layers, most=MOST_LAYERS)
    if read_window is None:
        reader.layer_types(num_layers, ("full_attention",))
        reader.neutral("sliding_window", None)
        reader.neutral("use_sliding_window", False)
    window = read_window(reader, num_layers) if read_window is not None else 0
    common = read_common(reader, CommonDefaults(**defaults))
    is_moe = read_moe_layers(reader, num_layers)
    has_bias = reader.flag("attention_bias", False)
    # Released files of Qwen3-Coder and Qwen3-Omni repeat these keys of sibling models.
    reader.neutral("qkv_bias", False)
    reader.neutral("use_qk_norm", qk_norm != "none")
    reader.neutral("shared_expert_intermediate_size", 0, None)
    attention = AttentionConfig(
        **common.attention,
        sliding_window=window,
        has_qkv_bias=has_bias,
        has_o_bias=has_bias,
        qk_norm=qk_norm,
    )
    return ModelConfig(
        family=family,
        layers=tuple(LayerConfig(mixer=attention, is_moe=moe) for moe in is_moe),
        expert_width=reader.integer("moe_intermediate_size", default=expert_width),
        router=RouterConfig(renormalize=reader.flag("norm_topk_prob", renormalize)),
        dense_width=reader.integer("intermediate_size", default=dense_width),
        **common.model,
    )


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `qwen3moe`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    return open_qwen3_gguf(GgufConfigReader(file, GGUF_ARCHITECTURE), MODEL_TYPE)


def open_qwen3_gguf(reader: GgufConfigReader, family: str, *, axes: Axes | None = None) -> ModelFiles:
    """The model of this family, or the text part of a vision-language model. `expert_weights_norm` defaults to true."""
    common = reader.common(axes=axes)
    window = reader.integer("attention.sliding_window", 0, least=0)
    # For layers without experts, and all layers have experts.
    reader.integer("feed_forward_length", 0, least=0)
    attention = AttentionConfig(**common.attention, sliding_window=window, qk_norm="head")
    config = ModelConfig(
        family=family,
        layers=(LayerConfig(mixer=attention, is_moe=True),) * reader.num_layers(),
        expert_width=reader.integer("expert_feed_forward_length"),
        router=RouterConfig(renormalize=reader.flag("expert_weights_norm", True)),
        **common.model,
    )
    reader.finish()
    return read_gguf_layout(reader.file, config, is_paired=False, has_rope_freqs=False)


def read_window(reader: ConfigReader, num_layers: int) -> int:
    """The sliding window of all layers, 0 for full attention."""
    is_used = reader.flag("use_sliding_window", False)
    window = reader.optional_integer("sliding_window", default=4096, least=0)
    reader.optional_integer("max_window_layers", least=0)
    active = (window or 0) if is_used else 0
    kinds = reader.layer_types(num_layers)
    expected = "sliding_attention" if active else "full_attention"
    if kinds is not None and any(kind != expected for kind in kinds):
        raise reader.unsupported("layer_types", f"{expected} in every layer, as the other keys say")
    return active
