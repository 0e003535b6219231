"""Laguna XS, S and M (Poolside): heads whose number differs by layer, each gated by the softplus of a projection.

A gate is for a head, or for each of its elements. Layers that see everything rotate half of a head, scaled by yarn, and
have fewer heads than those with a window. The sum of the routed experts is scaled before the shared expert is added,
and the router's logits may be capped. `</assistant>`, an ordinary token of the tokenizer, ends an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from argosy.config import ModelConfig
from argosy.model.families.attention.qwen_moe import make_layouts
from argosy.model.families.windows.laguna_gguf import GGUF_ARCHITECTURE, MODEL_TYPE, make_config, open_gguf
from argosy.model.families.windows.windowed import FULL, SLIDING, read_networks, read_window
from argosy.model.reading.common_config import CommonDefaults, read_sizes
from argosy.model.reading.config_reader import LARGEST_SIZE, MOST_LAYERS, ConfigReader
from argosy.model.reading.rope_config import read_ropes_of_layers

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

LAYOUTS = make_layouts(
    {"attn_gate": "self_attn.g_proj.weight", "choice_bias": "mlp.experts.e_score_correction_bias"}
)

_DEFAULTS = CommonDefaults(
    vocab_size=100_352, hidden_size=2048, num_heads=48, num_kv_heads=8, head_dim=128, rope_theta=5e5,
    norm_eps=1e-6, context_tokens=131_072, num_experts=256, experts_per_token=8,
)  # fmt: skip
_ROPES = {
    FULL: {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
    SLIDING: {"rope_theta": 1e4, "partial_rotary_factor": 1.0},
}
_GATES: Mapping[object, Literal["heads", "elements"]] = {
    True: "heads", "per-head": "heads", "per-element": "elements",
}  # fmt: skip
# Keys of released files that transformers ignores, or that may have one value.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "qkv_bias": (False, None),
    "norm_topk_prob": (True,),
    "moe_apply_router_weight_on_input": (False,),
    "moe_router_score_func": ("sigmoid", None),
    "moe_router_use_sigmoid": (True,),
    "swa_attention_sink_enabled": (False,),
    "swa_rope_parameters": (None,),
}


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `LagunaConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    if raw.get(cap := "moe_router_logit_softcapping") == 0:
        raw = {**raw, cap: None}
    reader = ConfigReader(raw, MODEL_TYPE)
    num_layers = reader.integer("num_hidden_layers", default=40, most=MOST_LAYERS)
    common, kinds = read_sizes(reader, _DEFAULTS), reader.layer_types(num_layers) or (FULL,) * num_layers
    reader.neutral("gating", *_GATES)
    gate = _GATES[raw.get("gating", True)]
    reader.neutral("gating_types", None, *([f"per{mark}{gate[:-1]}"] * num_layers for mark in "_-"))
    for key, accepted in _NEUTRAL.items():
        reader.neutral(key, *accepted)
    reader.passed("rope_theta")  # the default of thetas that must be given
    ropes = read_ropes_of_layers(
        reader,
        dict.fromkeys(kinds, common.attention["head_dim"]),
        _ROPES,
        default_partial=reader.number("partial_rotary_factor", 1.0),
        context_tokens=common.model["context_tokens"],
    )
    num_heads, has_bias = common.attention.pop("num_heads"), reader.flag("attention_bias", False)
    config = make_config(
        kinds,
        reader.integers("num_attention_heads_per_layer", least=1, most=LARGEST_SIZE)
        or (num_heads,) * num_layers,
        read_networks(reader, num_layers, 1),
        ropes,
        common.attention | {"has_qkv_bias": has_bias, "has_o_bias": has_bias, "output_gate": gate},
        window=read_window(reader, kinds, 512),
        scale=reader.number("moe_routed_scaling_factor", 1.0),
        logit_cap=reader.optional_number(cap) or 0.0,
        expert_width=reader.integer("moe_intermediate_size", default=512),
        shared_width=reader.integer("shared_expert_intermediate_size", default=512),
        dense_width=reader.integer("intermediate_size", default=8192),
        **common.model,
    )
    reader.finish()
    return config
