"""Tiny configs of families that mix layers with a window and layers that see everything, and their tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.models.rows import Row
from tests.models.safetensors_file import Array

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FULL, SLIDING = "full_attention", "sliding_attention"

_COMMON: RawConfig = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 10,
    "hidden_act": "silu",
    "hidden_size": 20,
    "initializer_range": 0.02,
    "intermediate_size": 17,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 9,
    "num_attention_heads": 4,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "sliding_window": 7,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 53,
}
YARN: RawConfig = {
    "rope_type": "yarn",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


def mellum(**changes: Any) -> RawConfig:
    """A config.json with the keys of Mellum2-12B-A2.5B's."""
    num_layers = changes.get("num_hidden_layers", 4)
    return {
        **_COMMON,
        "architectures": ["MellumForCausalLM"],
        "layer_types": [FULL if layer % 4 == 3 else SLIDING for layer in range(num_layers)],
        "max_window_layers": 0,
        "mlp_layer_types": ["sparse"] * num_layers,
        "model_type": "mellum",
        "norm_topk_prob": True,
        "output_router_logits": False,
        "rope_parameters": {
            FULL: YARN | {"attention_factor": 1.2772588722239782},
            SLIDING: {"rope_type": "default", "rope_theta": 500000.0},
        },
        "router_aux_loss_coef": 0.001,
        "use_sliding_window": True,
    } | changes


def afmoe(**changes: Any) -> RawConfig:
    """A config.json with the keys of Trinity-Mini's."""
    return {
        **_COMMON,
        "architectures": ["AfmoeForCausalLM"],
        "global_attn_every_n_layers": 4,
        "model_type": "afmoe",
        "mup_enabled": True,
        "n_group": 1,
        "num_dense_layers": 1,
        "num_expert_groups": 1,
        "num_limited_groups": 1,
        "num_shared_experts": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000,
        "route_norm": True,
        "route_scale": 2.826,
        "score_func": "sigmoid",
        "topk_group": 1,
        "use_grouped_mm": True,
    } | changes


def laguna(**changes: Any) -> RawConfig:
    """A config.json with the keys of Laguna-XS-2.1's."""
    num_layers = changes.get("num_hidden_layers", 4)
    return {
        **_COMMON,
        "architectures": ["LagunaForCausalLM"],
        "bos_token_id": 2,
        "decoder_sparse_step": 1,
        "eos_token_id": [2, 24],
        "gating": "per-head",
        "gating_types": ["per_head"] * num_layers,
        "head_dim": 12,
        "layer_types": [SLIDING if layer % 4 else FULL for layer in range(num_layers)],
        "mlp_layer_types": ["dense"] + ["sparse"] * (num_layers - 1),
        "mlp_only_layers": [0],
        "model_type": "laguna",
        "moe_apply_router_weight_on_input": False,
        "moe_routed_scaling_factor": 2.5,
        "moe_router_logit_softcapping": 0.0,
        "norm_topk_prob": True,
        "num_attention_heads_per_layer": [6 if layer % 4 else 4 for layer in range(num_layers)],
        "num_experts": 4,
        "qkv_bias": False,
        "rope_parameters": {
            FULL: YARN | {"attention_factor": 1.2772588722239782, "partial_rotary_factor": 0.5},
            SLIDING: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
        "router_aux_loss_coef": 0.0,
        "shared_expert_intermediate_size": 7,
        "swa_attention_sink_enabled": False,
        "vocab_size": 43,
    } | changes


FAMILIES = ("mellum", "afmoe", "laguna")


def kinds(config: RawConfig) -> list[str]:
    every = config.get("global_attn_every_n_layers", 4)
    by_turns = [SLIDING if (layer + 1) % every else FULL for layer in range(config["num_hidden_layers"])]
    return config.get("layer_types") or by_turns


def is_moe(config: RawConfig, layer: int) -> bool:
    if config["model_type"] == "afmoe":
        return bool(layer >= config["num_dense_layers"])
    return bool(config["mlp_layer_types"][layer] == "sparse")


def num_heads(config: RawConfig, layer: int) -> int:
    of_layers = config.get("num_attention_heads_per_layer")
    return int(of_layers[layer] if of_layers else config["num_attention_heads"])


def windows(config: RawConfig) -> list[int]:
    """Return each layer's window; 0 is full attention."""
    return [config["sliding_window"] if kind == SLIDING else 0 for kind in kinds(config)]


def rope_of(config: RawConfig, layer: int) -> RawConfig:
    """Return the rotary embedding of a layer."""
    if config["model_type"] == "afmoe":
        return {"rope_theta": config["rope_theta"]}
    rope: RawConfig = config["rope_parameters"][kinds(config)[layer]]
    return rope


def frequencies(config: RawConfig, layer: int) -> Array:
    """Return the angle per position of each dimension pair, before yarn."""
    rope = rope_of(config, layer)
    dim = int(config["head_dim"] * rope.get("partial_rotary_factor", 1.0))
    frequency: Array = rope["rope_theta"] ** -(np.arange(0, dim, 2) / dim)
    is_still = config["model_type"] == "afmoe" and kinds(config)[layer] == FULL
    return 0 * frequency if is_still else frequency


def window_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        norms = [
            "input",
            "post_attention",
            *(["pre_mlp", "post_mlp"] if config["model_type"] == "afmoe" else []),
        ]
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in norms}
        shapes |= _attention_shapes(config, layer, prefix + "self_attn.")
        if is_moe(config, layer):
            shapes |= _moe_shapes(config, prefix + "mlp.")
        else:
            shapes |= _swiglu(prefix + "mlp.", hidden, config["intermediate_size"])
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _attention_shapes(config: RawConfig, layer: int, prefix: str) -> Shapes:
    hidden, dim = config["hidden_size"], config["head_dim"]
    q_rows, kv_rows = num_heads(config, layer) * dim, config["num_key_value_heads"] * dim
    shapes: Shapes = {}
    for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
        shapes[f"{prefix}{name}_proj.weight"] = (rows, hidden)
        if config["attention_bias"]:
            shapes[f"{prefix}{name}_proj.bias"] = (rows,)
    shapes[prefix + "o_proj.weight"] = (hidden, q_rows)
    if config["attention_bias"]:
        shapes[prefix + "o_proj.bias"] = (hidden,)
    if config["model_type"] == "afmoe":
        shapes[prefix + "gate_proj.weight"] = (q_rows, hidden)
    if config["model_type"] == "laguna":
        rows = q_rows if config["gating"] == "per-element" else num_heads(config, layer)
        shapes[prefix + "g_proj.weight"] = (rows, hidden)
    shapes[prefix + "q_norm.weight"] = shapes[prefix + "k_norm.weight"] = (dim,)
    return shapes


def _moe_shapes(config: RawConfig, mlp: str) -> Shapes:
    hidden, num_experts = config["hidden_size"], config["num_experts"]
    is_trinity, width = config["model_type"] == "afmoe", config["moe_intermediate_size"]
    shapes: Shapes = {mlp + ("router.gate.weight" if is_trinity else "gate.weight"): (num_experts, hidden)}
    if is_trinity:
        shapes[mlp + "expert_bias"] = (num_experts,)
        shapes |= _swiglu(mlp + "shared_experts.", hidden, config["num_shared_experts"] * width)
    if config["model_type"] == "laguna":
        shapes[mlp + "experts.e_score_correction_bias"] = (num_experts,)
        shapes |= _swiglu(mlp + "shared_expert.", hidden, config["shared_expert_intermediate_size"])
    for expert in range(num_experts):
        shapes |= _swiglu(f"{mlp}experts.{expert}.", hidden, width)
    return shapes


def _swiglu(prefix: str, hidden: int, width: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }


ROWS = {
    "mellum": Row(shapes=window_shapes, has_own_modules=True, gguf="mellum"),
    "afmoe": Row(shapes=window_shapes, has_own_modules=True, gguf="afmoe"),
    "laguna": Row(shapes=window_shapes, has_own_modules=True, gguf="laguna", chats=("laguna", "laguna_s")),
}
