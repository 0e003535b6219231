"""Flint (49 layers, 256 experts): Qwen3-MoE with sinks, sigmoid routers, and windows in most layers.

Only layers with a window rotate; without `layer_types`, the first two layers, then every fourth and the last see all
positions. Every head has a sink. Scores are sigmoids without a bias for the choice. Layers with routed experts add a
shared expert without a gate; without `mlp_only_layers`, the first two layers are dense. Files name sinks
`softmax_offset` (`conversion_mapping.py` in transformers).
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.config import ModelConfig, RouterConfig
from argosy.model.families.attention.qwen_moe import make_layouts, read_moe_layers
from argosy.model.families.windows.windowed import FULL, SLIDING, attentions_of, layers_of, read_window
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader

MODEL_TYPE = "flint"
GGUF_ARCHITECTURE = None

LAYOUTS = make_layouts({"sinks": "self_attn.softmax_offset"})

_DEFAULTS = CommonDefaults(
    vocab_size=150_144,
    hidden_size=2048,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    context_tokens=262_144,
    num_experts=256,
    experts_per_token=6,
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `FlintConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    if raw.get("mlp_only_layers") is None:
        raw = {**raw, "mlp_only_layers": [0, 1]}
    reader = ConfigReader(raw, MODEL_TYPE)
    common = read_common(reader, _DEFAULTS)
    num_layers = reader.integer("num_hidden_layers", default=49, most=MOST_LAYERS)
    kinds = reader.layer_types(num_layers) or [
        FULL if layer < 2 or layer % 4 == 1 or layer == num_layers - 1 else SLIDING
        for layer in range(num_layers)
    ]
    # llama.cpp's converter reads this key of the released file, which says the same once more.
    reader.neutral("no_rope_layer_indices", [layer for layer, kind in enumerate(kinds) if kind == FULL], None)
    has_bias = reader.flag("attention_bias", False)
    rope = common.attention.pop("rope")
    attentions = attentions_of(
        {FULL: None, SLIDING: rope},
        read_window(reader, kinds, 513),
        has_qkv_bias=has_bias,
        has_o_bias=has_bias,
        qk_norm="head",
        has_sinks=True,
        **common.attention,
    )
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=layers_of(kinds, read_moe_layers(reader, num_layers), attentions),
        expert_width=reader.integer("moe_intermediate_size", default=512),
        router=RouterConfig(score="sigmoid", renormalize=reader.flag("norm_topk_prob", True)),
        dense_width=reader.integer("intermediate_size", default=6144),
        shared_width=reader.integer("shared_expert_intermediate_size", default=1024),
        **common.model,
    )
    reader.finish()
    return config
