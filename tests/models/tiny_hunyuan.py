"""A tiny Hunyuan-A13B: its config, its tensors, and the same model as a Qwen3-MoE with a shared expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.rows import Row

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FAMILY = "hunyuan_v1_moe"
_RESPELT = {
    "self_attn.query_layernorm": "self_attn.q_norm",
    "self_attn.key_layernorm": "self_attn.k_norm",
    "mlp.gate.wg": "mlp.gate",
    "mlp.shared_mlp.": "mlp.shared_experts.",
}


def hunyuan(**changes: Any) -> RawConfig:
    """A config.json with the keys of Hunyuan-A13B's that concern text, most of its numbers once per layer."""
    config = {
        "add_classification_head": False,
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.1,
        "attention_head_dim": 10,
        "bos_token_id": 1,
        "cla_share_factor": 2,
        "eod_token_id": 3,
        "eos_token_id": 2,
        "group_limited_greedy": False,
        "head_dim": 10,
        "hidden_act": "silu",
        "hidden_size": 28,
        "intermediate_size": 9,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "model_type": FAMILY,
        "moe_drop_tokens": False,
        "moe_intermediate_size": [9, 9, 9],
        "moe_layer_num_skipped": 0,
        "moe_random_routing_dropped_token": False,
        "moe_topk": [2, 2, 2],
        "norm_topk_prob": True,
        "norm_type": "rms",
        "num_attention_heads": 4,
        "num_experts": 5,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_shared_expert": [1, 1, 1],
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "type": "dynamic",
        },
        "rope_theta": 10000.0,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_cla": False,
        "use_mixed_mlp_moe": True,
        "use_mla": False,
        "use_qk_norm": True,
        "use_rotary_pos_emb": True,
        "vit_type": None,
        "vocab_size": 52,
    }  # fmt: skip
    return config | changes


def hunyuan_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    hidden, width, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_rows, kv_rows = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (hidden,)
        for name, rows, cols in (
            ("q", q_rows, hidden),
            ("k", kv_rows, hidden),
            ("v", kv_rows, hidden),
            ("o", hidden, q_rows),
        ):
            shapes[f"{attention}{name}_proj.weight"] = (rows, cols)
            if config["attention_bias"]:
                shapes[f"{attention}{name}_proj.bias"] = (rows,)
        shapes[attention + "query_layernorm.weight"] = shapes[attention + "key_layernorm.weight"] = (dim,)
        shapes[mlp + "gate.wg.weight"] = (config["num_experts"], hidden)
        for network in ("shared_mlp.", *(f"experts.{expert}." for expert in range(config["num_experts"]))):
            for name in ("gate", "up"):
                shapes[f"{mlp}{network}{name}_proj.weight"] = (width, hidden)
            shapes[f"{mlp}{network}down_proj.weight"] = (hidden, width)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def plain(config: RawConfig) -> RawConfig:
    """The config as a Qwen3-MoE's: one number for all layers, and theta as it is after scaling."""
    dim, topk = config["head_dim"], config["moe_topk"]
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rope_theta")) * rope.get("alpha", 1.0) ** (dim / (dim - 2))
    return {
        **{key: value for key, value in config.items() if key not in ("rope_scaling", "rope_parameters")},
        "is_norm_last": True,
        "model_type": "qwen3_moe",
        "moe_intermediate_size": config["intermediate_size"],
        "num_experts_per_tok": topk[0] if isinstance(topk, list) else topk,
        "rope_theta": theta,
    }


def as_qwen(config: RawConfig, tensors: Mapping[str, Any]) -> tuple[RawConfig, dict[str, Any]]:
    """The same model as a Qwen3-MoE with a shared expert, and norms after the rotation."""

    def respelt(name: str) -> str:
        return next((name.replace(old, new) for old, new in _RESPELT.items() if old in name), name)

    return plain(config), {respelt(name): values for name, values in tensors.items()}


ROWS = {
    FAMILY: Row(
        shapes=hunyuan_shapes, has_own_modules=True, as_known=as_qwen, gguf="hunyuan-moe", chats=("hunyuan",)
    )
}
