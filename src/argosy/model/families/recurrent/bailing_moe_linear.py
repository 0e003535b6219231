"""Ring-linear 2.0 (mini 16B-A1.6B, flash 104B-A7.4B): Ling 2.x with lightning attention in most layers.

The last layer of a group has softmax attention, and so have layers behind the last whole group. Layer 0 forgets faster
than any other, as in the makers' code, where the slopes of layer l have the factor 1 - (l - 1) / (layers - 1) + 1e-5;
mlx-lm gives it layer 1's slopes, and vLLM's class for Ling-2.5 has l instead of l - 1. Ring-2.5, whose other layers
have latent attention, is refused by its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import LightningConfig, ModelConfig
from argosy.model.families.attention.bailing_moe import DEFAULTS, read_ling
from argosy.model.families.attention.bailing_moe import LAYOUTS as _OF_LING
from argosy.model.families.recurrent.lightning import slopes_of_heads
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import read_sigmoid_router

MODEL_TYPE = "bailing_moe_linear"
GGUF_ARCHITECTURE = None  # llama.cpp has none

_NAMES = {
    **dict.fromkeys(("lightning_q", "lightning_k", "lightning_v"), "attention.query_key_value.weight"),
    "lightning_q_norm": "attention.query_layernorm.weight",
    "lightning_k_norm": "attention.key_layernorm.weight",
    "lightning_gate": "attention.g_proj.weight",
    "lightning_norm": "attention.g_norm.weight",
    "lightning_out": "attention.dense.weight",
}
LAYOUTS = tuple(
    replace(
        layout,
        layer_names={**layout.layer_names, **_NAMES},
        joined=(*layout.joined, "lightning_q", "lightning_k", "lightning_v"),
    )
    for layout in _OF_LING
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets Ling's default.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    reader.neutral("use_qkv_bias", False)
    for key in ("linear_rope", "linear_scale"):
        reader.neutral(key, True)
    config = read_ling(reader, MODEL_TYPE, DEFAULTS, read_sigmoid_router(1.0, 8, 4))
    attention, num_layers = config.attention, config.num_layers
    reader.neutral("num_kv_heads_for_linear_attn", 0, None, attention.num_heads)
    channels = attention.num_heads * attention.head_dim
    groups = reader.integer("group_norm_size", default=1, most=channels)
    if channels % groups:
        raise reader.unsupported("group_norm_size", f"a divisor of {channels}, the rows of all heads")
    lightning = LightningConfig(
        slopes=(),
        head_dim=attention.head_dim,
        norm_eps=config.norm_eps,
        num_groups=groups,
        rope=attention.rope,
        has_qk_norm=attention.qk_norm == "head",
        has_silu=reader.flag("linear_silu", False),
        scale=attention.head_dim**-0.5,
    )
    size = reader.integer("layer_group_size", default=None)
    reader.finish()

    def mixer(layer: int) -> LightningConfig | None:
        if (layer + 1) % size == 0 or layer >= num_layers // size * size:
            return None
        factor = 1 - (layer - 1) / max(num_layers - 1, 1) + 1e-5
        return replace(lightning, slopes=slopes_of_heads(attention.num_heads, factor))

    return replace(
        config,
        layers=tuple(
            replace(one, mixer=mixer(layer) or one.mixer) for layer, one in enumerate(config.layers)
        ),
    )
