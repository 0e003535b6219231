"""Tiny checkpoints of MiniMax-Text-01 and M1, with lightning attention, and the layers that `numpy_model.py` runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.models.rows import Row
from tests.models.safetensors_file import Array

if TYPE_CHECKING:
    from tests.models.numpy_model import NumpyModel, Places

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FAMILIES = ("minimax",)
_LINEAR, _FULL = "linear_attention", "full_attention"


def minimax(**changes: Any) -> RawConfig:
    """A config.json with the keys that transformers writes for MiniMax-Text-01."""
    return {
        "architectures": ["MiniMaxForCausalLM"],
        "attention_dropout": 0.0,
        "block_size": 4,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "full_attn_alpha_factor": 1.9,
        "full_attn_beta_factor": 1.0,
        "head_dim": 6,
        "hidden_act": "silu",
        "hidden_size": 28,
        "initializer_range": 0.02,
        "intermediate_size": 9,
        "layer_types": [_LINEAR, _FULL, _LINEAR],
        "linear_attn_alpha_factor": 1.9,
        "linear_attn_beta_factor": 1.0,
        "max_position_embeddings": 128,
        "mlp_alpha_factor": 1.9,
        "mlp_beta_factor": 1.0,
        "model_type": "minimax",
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_local_experts": 5,
        "output_router_logits": False,
        "pad_token_id": None,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "5.24.0",
        "use_cache": True,
        "vocab_size": 76,
    } | changes


def by_makers(config: RawConfig, **changes: Any) -> RawConfig:
    """Return the config as MiniMax's own code has it."""
    kinds = config["layer_types"]
    renamed = {
        f"layernorm_{theirs}_{factor}": config[f"{ours}_{factor}_factor"]
        for ours, theirs in (("full_attn", _FULL), ("linear_attn", _LINEAR), ("mlp", "mlp"))
        for factor in ("alpha", "beta")
    }
    kept = {
        key: value
        for key, value in config.items()
        if not key.endswith("_factor")
        and key not in ("block_size", "layer_types", "rope_parameters", "dtype")
    }
    return {
        **kept,
        **renamed,
        "architectures": ["MiniMaxM1ForCausalLM"],
        "attn_type_list": [int(kind == _FULL) for kind in kinds],
        "model_type": "minimax_m1",
        "postnorm": True,
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "rotary_dim": config.get("rotary_dim", 4),
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "torch_dtype": "bfloat16",
        **changes,
    }


def minimax_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    hidden, vocab, width = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i, kind in enumerate(config["layer_types"]):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (hidden,)
        shapes |= {f"{layer}self_attn.{name}.weight": shape for name, shape in _mixer_shapes(config, kind)}
        block = layer + "block_sparse_moe."
        shapes[block + "gate.weight"] = (config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            shapes[f"{block}experts.{expert}.w1.weight"] = (width, hidden)
            shapes[f"{block}experts.{expert}.w3.weight"] = (width, hidden)
            shapes[f"{block}experts.{expert}.w2.weight"] = (hidden, width)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _mixer_shapes(config: RawConfig, kind: str) -> list[tuple[str, tuple[int, ...]]]:
    hidden, dim = config["hidden_size"], config["head_dim"]
    rows, kv_rows = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    if kind == _FULL:
        return [
            ("q_proj", (rows, hidden)),
            ("k_proj", (kv_rows, hidden)),
            ("v_proj", (kv_rows, hidden)),
            ("o_proj", (hidden, rows)),
        ]
    return [
        ("qkv_proj", (3 * rows, hidden)),
        ("output_gate", (rows, hidden)),
        ("norm", (rows,)),
        ("out_proj", (hidden, rows)),
    ]


def run_layer(model: NumpyModel, layer: int, hidden: Array, places: Places) -> Array:
    """Return the hidden state after a layer, in float64."""
    config, prefix = model.config, f"model.layers.{layer}."
    alpha, beta = config["mlp_alpha_factor"], config["mlp_beta_factor"]
    read = model.norm(prefix + "input_layernorm", hidden)
    if config["layer_types"][layer] == _FULL:
        mixed = model.attention(layer, read, places)
    else:
        mixed = _lightning_attention(model, layer, read)
    read = model.norm(prefix + "post_attention_layernorm", alpha * read + beta * mixed)
    return alpha * read + beta * model.feed_forward(layer, read)


def _lightning_attention(model: NumpyModel, layer: int, x: Array) -> Array:
    config, tensors, prefix = model.config, model.tensors, f"model.layers.{layer}.self_attn."
    heads = config["num_attention_heads"]
    y = x @ tensors[prefix + "qkv_proj.weight"].T
    q, k, v = np.split((y / (1 + np.exp(-y))).reshape(len(x), heads, -1), 3, axis=2)
    out = np.empty_like(v)
    for head in range(heads):
        slope = 2.0 ** (-8 * (head + 1) / heads) * (1 - layer / (config["num_hidden_layers"] - 1) + 1e-5)
        distance = np.subtract.outer(np.arange(len(x)), np.arange(len(x)))
        weights = np.where(distance < 0, 0.0, np.exp(-slope * np.maximum(distance, 0)))
        out[:, head] = (q[:, head] @ k[:, head].T * weights) @ v[:, head]
    normed = model.norm(prefix + "norm", out.reshape(len(x), -1), 1e-6)
    gate = 1 / (1 + np.exp(-x @ tensors[prefix + "output_gate.weight"].T))
    result: Array = (gate * normed) @ tensors[prefix + "out_proj.weight"].T
    return result


ROWS = {
    "minimax": Row(
        shapes=minimax_shapes,
        has_own_modules=True,
        gguf="minimax-01",
        released=by_makers,
        chats=("minimax_m1",),
        without_mlx="MLX does not know it",
    )
}
