"""Mellum2 (12B-A2.5B, JetBrains): Qwen3-MoE with windows in most layers, and a rotary embedding for each kind of layer.

Only layers that see all positions may be scaled by yarn. llama.cpp rotates layers with a window by the theta of the
others; here they have their own, as in transformers, and in the released files both are the same. The layer for
multi-token prediction (`mtp.`) is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import ModelConfig, RouterConfig
from argosy.model.families.attention.qwen_moe import make_layouts
from argosy.model.families.windows.windowed import (
    FULL,
    SLIDING,
    attentions_of,
    layers_of,
    read_gguf_kinds,
    read_gguf_ropes,
    read_networks,
    read_window,
)
from argosy.model.reading.common_config import CommonDefaults, read_sizes
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import SOFTMAX, GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout
from argosy.model.reading.rope_config import read_ropes_of_layers

MODEL_TYPE = "mellum"
GGUF_ARCHITECTURE = "mellum"

LAYOUTS = make_layouts(passed_over=r"mtp\..*")

_DEFAULTS = CommonDefaults(
    vocab_size=98_304,
    hidden_size=2304,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    rope_theta=500_000.0,
    norm_eps=1e-6,
    context_tokens=131_072,
    num_experts=64,
    experts_per_token=8,
)
_ROPES = {FULL: {"rope_theta": _DEFAULTS.rope_theta}, SLIDING: {"rope_theta": 10_000.0}}


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `MellumConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    num_layers = reader.integer("num_hidden_layers", default=28, most=MOST_LAYERS)
    common = read_sizes(reader, _DEFAULTS)
    kinds = reader.layer_types(num_layers) or (FULL,) * num_layers
    reader.neutral("use_sliding_window", True, SLIDING in kinds)
    reader.passed("max_window_layers", "mtp_layer_types", "mtp_mlp_layer_types")
    reader.passed("num_nextn_predict_layers", "num_mtp_layers")
    ropes = read_ropes_of_layers(
        reader,
        dict.fromkeys(kinds, common.attention["head_dim"]),
        _ROPES,
        default_partial=1.0,
        context_tokens=common.model["context_tokens"],
    )
    has_bias = reader.flag("attention_bias", False)
    attentions = attentions_of(
        ropes,
        read_window(reader, kinds, 1024),
        has_qkv_bias=has_bias,
        has_o_bias=has_bias,
        qk_norm="head",
        **common.attention,
    )
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=layers_of(kinds, read_networks(reader, num_layers, 0), attentions),
        expert_width=reader.integer("moe_intermediate_size", default=896),
        router=RouterConfig(renormalize=reader.flag("norm_topk_prob", True)),
        dense_width=reader.integer("intermediate_size", default=7168),
        **common.model,
    )
    reader.finish()
    return config


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `mellum`; all its layers have experts.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    common, kinds = reader.common(), read_gguf_kinds(reader)
    heads = common.attention | {"qk_norm": "head"}
    del heads["rope"]
    ropes = read_gguf_ropes(reader, heads["head_dim"], common.model["context_tokens"])
    attentions = attentions_of(ropes, reader.integer("attention.sliding_window", 0, least=0), **heads)
    reader.neutral("expert_gating_func", 0, SOFTMAX)
    reader.neutral("expert_weights_norm", True)  # llama.cpp always does
    reader.integer("feed_forward_length", 0, least=0)  # for layers without experts, which there are not
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=layers_of(kinds, [True] * len(kinds), attentions),
        expert_width=reader.integer("expert_feed_forward_length"),
        router=RouterConfig(renormalize=True),
        **common.model,
    )
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False)
