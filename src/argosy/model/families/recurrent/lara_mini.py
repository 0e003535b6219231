"""Lara-4-Mini (34 layers, 128 experts): gated delta nets, attention in a window, and attention to all positions.

The delta nets are Qwen3.5's, but norms hold their weight, attention has no output gate, and the shared expert no gate.
Only layers with a window rotate. The files store a delta net's projections as one tensor, with the rows of q, k, v, z,
b and a.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import LayerConfig, Mixer, ModelConfig, RouterConfig
from argosy.model.families.attention.qwen_moe import make_layouts
from argosy.model.families.recurrent.qwen_delta import DELTA_NAMES, read_delta
from argosy.model.families.windows.windowed import FULL, SLIDING, attentions_of, read_window
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader

MODEL_TYPE = "lara_mini"
GGUF_ARCHITECTURE = None

_JOINED = ("delta_qkv", "delta_z", "delta_b", "delta_a")
LAYOUTS = tuple(
    replace(layout, joined=_JOINED)
    for layout in make_layouts(
        {
            **DELTA_NAMES,
            "delta_norm": "linear_attn.out_norm.weight",
            **dict.fromkeys(_JOINED, "linear_attn.in_proj.weight"),
        }
    )
)

_DELTA = "linear_attention"
_PATTERN = (_DELTA, SLIDING, _DELTA, FULL, SLIDING)
_DEFAULTS = CommonDefaults(
    vocab_size=151_936,
    hidden_size=1024,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    context_tokens=131_072,
    num_experts=128,
    experts_per_token=4,
    eos_id=151_643,
    is_embedding_tied=True,
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `LaraMiniConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    common = read_common(reader, _DEFAULTS)
    num_layers = reader.integer("num_hidden_layers", default=34, most=MOST_LAYERS)
    kinds = reader.layer_types(num_layers, (_DELTA, SLIDING, FULL)) or [
        _PATTERN[layer % len(_PATTERN)] for layer in range(num_layers)
    ]
    has_bias = reader.flag("attention_bias", False)
    rope = common.attention.pop("rope")
    attentions = attentions_of(
        {FULL: None, SLIDING: rope},
        read_window(reader, kinds, 512),
        has_qkv_bias=has_bias,
        has_o_bias=has_bias,
        qk_norm="head",
        **common.attention,
    )
    delta = read_delta(reader, num_key_heads=8, num_value_heads=16)
    mixers: dict[str, Mixer] = {**attentions, _DELTA: delta}
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=tuple(LayerConfig(mixer=mixers[kind], is_moe=True) for kind in kinds),
        expert_width=reader.integer("moe_intermediate_size", default=512),
        router=RouterConfig(renormalize=reader.flag("norm_topk_prob", True)),
        shared_width=reader.integer("shared_expert_intermediate_size", default=512),
        **common.model,
    )
    reader.finish()
    return config
