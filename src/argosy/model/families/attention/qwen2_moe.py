"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): routed experts, and a shared expert with a sigmoid gate.

q, k and v have biases unless `qkv_bias` is false. With `use_sliding_window`, the window applies to the even
layers below `max_window_layers`, or where `layer_types` says so: the rule of Qwen2MoeConfig in transformers
5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig, RouterConfig
from argosy.errors import CheckpointError
from argosy.model.families.attention.qwen_moe import make_layouts, read_moe_layers
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import dense_name, read_gguf_layout

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "qwen2_moe"
GGUF_ARCHITECTURE = "qwen2moe"
LAYOUTS = make_layouts(passed_over=r"(audio_tower|multi_modal_projector|visual)\..*")


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `Qwen2MoeConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    common = read_common(
        reader,
        CommonDefaults(
            vocab_size=151_936,
            hidden_size=2048,
            num_heads=16,
            num_kv_heads=16,
            rope_theta=10_000.0,
            norm_eps=1e-6,
            context_tokens=32_768,
            num_experts=60,
            experts_per_token=4,
        ),
    )
    num_layers = reader.integer("num_hidden_layers", default=24, most=MOST_LAYERS)
    windows = _read_windows(reader, num_layers)
    is_moe = read_moe_layers(reader, num_layers)
    attention = AttentionConfig(**common.attention, has_qkv_bias=reader.flag("qkv_bias", True))
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=tuple(
            LayerConfig(mixer=replace(attention, sliding_window=window), is_moe=moe)
            for moe, window in zip(is_moe, windows, strict=True)
        ),
        expert_width=reader.integer("moe_intermediate_size", default=1408),
        router=RouterConfig(renormalize=reader.flag("norm_topk_prob", False)),
        dense_width=reader.integer("intermediate_size", default=5632),
        shared_width=reader.integer("shared_expert_intermediate_size", default=5632),
        shared_is_gated=True,
        **common.model,
    )
    # The demo model's ear and eye use these keys (`model/encoders/table.py`).
    reader.passed("audio_config", "audio_token_id", "image_token_id", "vision_config")
    reader.finish()
    return config


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `qwen2moe`.

    `config.json` may give some layers a sliding window. GGUF metadata cannot express that, so a window is refused.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    common = reader.common()
    width = reader.integer("feed_forward_length", 0, least=0)
    if window := reader.integer("attention.sliding_window", 0, least=0):
        raise reader.unsupported("attention.sliding_window", window, "0")
    has_bias = dense_name("layers.0.q_bias") in file.tensors
    attention = AttentionConfig(**common.attention, has_qkv_bias=has_bias)
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=(LayerConfig(mixer=attention, is_moe=True),) * reader.num_layers(),
        expert_width=reader.integer("expert_feed_forward_length", width // common.model["experts_per_token"]),
        router=RouterConfig(renormalize=reader.flag("expert_weights_norm", False)),
        shared_width=reader.integer("expert_shared_feed_forward_length", width),
        shared_is_gated=True,
        **common.model,
    )
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False)


def _read_windows(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """The sliding window of each layer, 0 for full attention."""
    is_used = reader.flag("use_sliding_window", False)
    window = reader.optional_integer("sliding_window", default=4096, least=0)
    most_layers = reader.integer("max_window_layers", default=28, least=0)
    kinds = reader.layer_types(num_layers)
    if kinds is None:
        is_sliding = tuple(is_used and layer % 2 == 0 and layer < most_layers for layer in range(num_layers))
    else:
        is_sliding = tuple(kind == "sliding_attention" for kind in kinds)
    if not any(is_sliding):
        return (0,) * num_layers
    if not is_used or not window:
        raise CheckpointError(
            f"config.json asks for sliding attention in layer {is_sliding.index(True)}, but its window is "
            f"{'off (use_sliding_window is false)' if not is_used else window}",
            key="sliding_window",
        )
    return tuple(window if sliding else 0 for sliding in is_sliding)
