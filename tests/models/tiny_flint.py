"""Tiny configs of Flint and Lara-4-Mini, their tensors, and the same models as families that the NumPy model knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.models.rows import NO_CONVERTER, Row

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FAMILIES = ("flint", "lara_mini")
FULL, SLIDING, DELTA = "full_attention", "sliding_attention", "linear_attention"
_PATTERN = (DELTA, SLIDING, DELTA, FULL, SLIDING)

_COMMON: RawConfig = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 10,
    "hidden_act": "silu",
    "hidden_size": 20,
    "initializer_range": 0.02,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 9,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "pad_token_id": None,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 7,
    "sliding_window": 7,
    "tie_word_embeddings": False,
    "transformers_version": "5.24.0",
    "use_cache": True,
    "vocab_size": 53,
}


def flint(**changes: Any) -> RawConfig:
    """A config.json with the keys of `FlintConfig`."""
    return {
        **_COMMON,
        "architectures": ["FlintForCausalLM"],
        "decoder_sparse_step": 1,
        "intermediate_size": 17,
        "layer_types": [FULL, FULL, SLIDING, SLIDING, FULL],
        "mlp_only_layers": [0, 1],
        "model_type": "flint",
    } | changes


def lara_mini(**changes: Any) -> RawConfig:
    """A config.json with the keys of `LaraMiniConfig`."""
    return {
        **_COMMON,
        "architectures": ["LaraMiniForCausalLM"],
        "layer_types": list(_PATTERN),
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 10,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 9,
        "model_type": "lara_mini",
        "tie_word_embeddings": True,
    } | changes


def kinds(config: RawConfig) -> list[str]:
    num_layers = config["num_hidden_layers"]
    if config["model_type"] == "lara_mini":
        return config.get("layer_types") or [_PATTERN[layer % 5] for layer in range(num_layers)]
    full = {0, 1, num_layers - 1, *range(1, num_layers, 4)}
    return config.get("layer_types") or [FULL if layer in full else SLIDING for layer in range(num_layers)]


def is_moe(config: RawConfig, layer: int) -> bool:
    if config["model_type"] == "lara_mini":
        return True
    is_dense = layer in config.get("mlp_only_layers", [0, 1])
    return not is_dense and (layer + 1) % config.get("decoder_sparse_step", 1) == 0


def flint_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    hidden, vocab, is_flint = config["hidden_size"], config["vocab_size"], config["model_type"] == "flint"
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i, kind in enumerate(kinds(config)):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (hidden,)
        shapes |= _delta_shapes(config, layer) if kind == DELTA else _attention_shapes(config, layer)
        mlp = layer + "mlp."
        if not is_moe(config, i):
            shapes |= _swiglu(mlp, hidden, config["intermediate_size"])
            continue
        num_experts, width = config["num_experts"], config["moe_intermediate_size"]
        shapes[mlp + "gate.weight"] = (num_experts, hidden)
        shapes |= _swiglu(mlp + "shared_expert.", hidden, config["shared_expert_intermediate_size"])
        if is_flint:
            for expert in range(num_experts):
                shapes |= _swiglu(f"{mlp}experts.{expert}.", hidden, width)
        else:
            shapes[mlp + "experts.gate_up_proj"] = (num_experts, 2 * width, hidden)
            shapes[mlp + "experts.down_proj"] = (num_experts, hidden, width)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def as_known(config: RawConfig, tensors: Mapping[str, Any]) -> tuple[RawConfig, dict[str, Any]]:
    """The same model as a GLM-4.5 with sinks, or as a Qwen2-MoE with delta nets, which rotate only in windows."""
    is_flint = config["model_type"] == "flint"
    known = config | {
        "layer_types": kinds(config),
        "model_type": "glm4_moe" if is_flint else "qwen2_moe",
        "rotates_in_windows": True,
        "use_sliding_window": True,
    }
    new_names = {"softmax_offset": "sinks", "shared_expert.": "shared_experts.", "out_norm": "norm"}
    found: dict[str, Any] = {}
    for name, values in tensors.items():
        if name.endswith("linear_attn.in_proj.weight"):
            parts = np.split(values, np.cumsum(_rows(config))[:-1])
            for part, rows in zip(("qkv", "z", "b", "a"), parts, strict=True):
                found[name.replace("in_proj", f"in_proj_{part}")] = rows
        else:
            found[next((name.replace(old, new) for old, new in new_names.items() if old in name), name)] = (
                values
            )
    return known, found


def _attention_shapes(config: RawConfig, layer: str) -> Shapes:
    hidden, dim, attention = config["hidden_size"], config["head_dim"], layer + "self_attn."
    q_rows, kv_rows = (config[f"num_{name}_heads"] * dim for name in ("attention", "key_value"))
    shapes: Shapes = {}
    for name, rows, cols in (
        ("q", q_rows, hidden),
        ("k", kv_rows, hidden),
        ("v", kv_rows, hidden),
        ("o", hidden, q_rows),
    ):
        shapes[f"{attention}{name}_proj.weight"] = (rows, cols)
        if config["attention_bias"]:
            shapes[f"{attention}{name}_proj.bias"] = (rows,)
    shapes[attention + "q_norm.weight"] = shapes[attention + "k_norm.weight"] = (dim,)
    if config["model_type"] == "flint":
        shapes[attention + "softmax_offset"] = (config["num_attention_heads"],)
    return shapes


def _rows(config: RawConfig) -> list[int]:
    """The rows of q, k and v together, of z, of b and of a."""
    heads = config["linear_num_value_heads"]
    values = heads * config["linear_value_head_dim"]
    return [
        2 * config["linear_num_key_heads"] * config["linear_key_head_dim"] + values,
        values,
        heads,
        heads,
    ]


def _delta_shapes(config: RawConfig, layer: str) -> Shapes:
    delta, rows = layer + "linear_attn.", _rows(config)
    return {
        delta + "in_proj.weight": (sum(rows), config["hidden_size"]),
        delta + "conv1d.weight": (rows[0], 1, config["linear_conv_kernel_dim"]),
        delta + "A_log": (rows[2],),
        delta + "dt_bias": (rows[2],),
        delta + "out_norm.weight": (config["linear_value_head_dim"],),
        delta + "out_proj.weight": (config["hidden_size"], rows[1]),
    }


def _swiglu(prefix: str, hidden: int, width: int) -> Shapes:
    shapes: Shapes = {f"{prefix}{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
    return shapes | {f"{prefix}down_proj.weight": (hidden, width)}


ROWS = {
    "flint": Row(
        shapes=flint_shapes,
        has_own_modules=True,
        as_known=as_known,
        without_record=NO_CONVERTER,
        without_mlx="MLX does not know it",
    ),
    "lara_mini": Row(
        shapes=flint_shapes,
        has_own_modules=True,
        has_own_experts=True,
        as_known=as_known,
        without_record=NO_CONVERTER,
        without_mlx="MLX does not know it",
    ),
}
