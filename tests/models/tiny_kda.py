"""Tiny configs of families with Kimi Delta Attention, and the tensors of their checkpoints: Kimi-Linear, Ling-3.

Elsewhere: values and files are `tiny.py`.
"""

from __future__ import annotations

from typing import Any

from tests.models.rows import Row

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FAMILIES = ("kimi_linear", "bailing_hybrid")


def kimi_linear(**changes: Any) -> RawConfig:
    """A config.json with the keys of Kimi-Linear-48B-A3B's."""
    return {
        "architectures": ["KimiLinearForCausalLM"],
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "first_k_dense_replace": 1,
        "head_dim": 9,
        "hidden_act": "silu",
        "hidden_size": 28,
        "initializer_range": 0.02,
        "intermediate_size": 26,
        "kv_lora_rank": 18,
        "linear_attn_config": {
            "full_attn_layers": [2],
            "head_dim": 10,
            "kda_layers": [1, 3],
            "num_heads": 3,
            "short_conv_kernel_size": 4,
        },
        "mla_use_nope": True,
        "model_max_length": 128,
        "model_type": "kimi_linear",
        "moe_intermediate_size": 9,
        "moe_layer_freq": 1,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "num_attention_heads": 3,
        "num_expert_group": 1,
        "num_experts": 6,
        "num_experts_per_token": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 3,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": 1,
        "pad_token_id": 0,
        "q_lora_rank": None,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "routed_scaling_factor": 2.446,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "transformers_version": "4.56.1",
        "use_cache": True,
        "use_grouped_topk": True,
        "v_head_dim": 12,
        "vocab_size": 80,
    } | changes


def bailing_hybrid(**changes: Any) -> RawConfig:
    """A config.json with the keys of Ling-3.0-flash's."""
    layers = changes.get("num_hidden_layers", 4)
    return {
        "architectures": ["BailingMoeV3ForCausalLM"],
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "eos_token_id": 2,
        "expert_swiglu_limit_list": [0.0] * layers,
        "first_k_dense_replace": 1,
        "gated_attention_proj_granularity_type": "head_wise",
        "group_norm_size": 1,
        "head_dim": 10,
        "hidden_act": "silu",
        "hidden_size": 28,
        "initializer_range": 0.006,
        "intermediate_size": 26,
        "kda_lower_bound": -5.0,
        "kda_safe_gate": True,
        "kv_lora_rank": 18,
        "layer_group_size": 2,
        "linear_silu": True,
        "max_position_embeddings": 128,
        "model_type": "bailing_hybrid",
        "moe_intermediate_size": 9,
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 9,
        "mtp_loss_scaling_factor": 0,
        "mtp_use_kda": False,
        "n_group": 3,
        "no_kda_lora": True,
        "norm_topk_prob": True,
        "num_attention_heads": 3,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 3,
        "num_kv_heads_for_linear_attn": 0,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": 1,
        "output_dropout": 0.0,
        "pad_token_id": 0,
        "partial_rotary_factor": 0.5,
        "q_lora_rank": None,
        "qk_head_dim": 16,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "rms_norm_eps": 1e-06,
        "rope_interleave": True,
        "rope_scaling": None,
        "rope_theta": 600000,
        "rotary_dim": 6,
        "routed_scaling_factor": 2.5,
        "router_dtype": "fp32",
        "scale_router_input": False,
        "score_function": "sigmoid",
        "scoring_func": "sigmoid",
        "share_expert_swiglu_limit_list": [0.0] * layers,
        "short_conv_kernel_size": 4,
        "tie_word_embeddings": False,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "up_proj_norm": False,
        "use_bias": False,
        "use_cache": True,
        "use_kda_lora": False,
        "use_mla_nope": False,
        "use_nGPT": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "v_head_dim": 12,
        "value_norm": False,
        "vocab_size": 80,
    } | changes


def is_delta(config: RawConfig, layer: int) -> bool:
    """Whether a layer has Kimi Delta Attention."""
    if config["model_type"] == "kimi_linear":
        return layer + 1 in config["linear_attn_config"]["kda_layers"]
    return (layer + 1) % config["layer_group_size"] != 0


def delta_heads(config: RawConfig) -> tuple[int, int]:
    """Return the heads of Kimi Delta Attention, and their dimensions."""
    linear = config.get("linear_attn_config", {})
    return (
        linear.get("num_heads", config["num_attention_heads"]),
        linear.get("head_dim", config["head_dim"]),
    )


def kda_tensor_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    hidden, vocab, is_kimi = (
        config["hidden_size"],
        config["vocab_size"],
        config["model_type"] == "kimi_linear",
    )
    embedding = "embed_tokens" if is_kimi else "word_embeddings"
    shapes: Shapes = {f"model.{embedding}.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        layer, is_mtp = f"model.layers.{i}.", i >= config["num_hidden_layers"]
        mixer = layer + ("self_attn." if is_kimi else "attention.")
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        of_mixer = _delta_shapes if is_delta(config, i) and not is_mtp else latent_shapes
        shapes |= {mixer + name: shape for name, shape in of_mixer(config).items()}
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        if i < config["first_k_dense_replace"]:
            shapes |= _swiglu_shapes(layer + "mlp.", hidden, config["intermediate_size"])
        else:
            shapes |= _moe_shapes(config, layer)
        if is_mtp:
            shapes |= {
                layer + "eh_proj.weight": (hidden, 2 * hidden),
                layer + "enorm.weight": (hidden,),
                layer + "hnorm.weight": (hidden,),
                layer + "final_layernorm.weight": (hidden,),
            }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _delta_shapes(config: RawConfig) -> Shapes:
    hidden, (heads, dim) = config["hidden_size"], delta_heads(config)
    rows = heads * dim
    shapes: Shapes = {f"{name}_proj.weight": (rows, hidden) for name in "qkv"}
    if config["model_type"] == "kimi_linear":
        width = config["linear_attn_config"]["short_conv_kernel_size"]
        for name in "fg":
            shapes |= {f"{name}_a_proj.weight": (dim, hidden), f"{name}_b_proj.weight": (rows, dim)}
        shapes["A_log"] = (1, 1, heads, 1)
    else:
        width = config["short_conv_kernel_size"]
        shapes |= {f"{name}_proj.weight": (rows, hidden) for name in "fg"}
        shapes["A_log"] = (heads,)
    return shapes | {
        **{f"{name}_conv1d.weight": (rows, 1, width) for name in "qkv"},
        "dt_bias": (rows,),
        "b_proj.weight": (heads, hidden),
        "o_norm.weight": (dim,),
        "o_proj.weight": (hidden, rows),
    }


def latent_shapes(config: RawConfig) -> Shapes:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    shapes: Shapes = {
        "kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (heads * (nope + value), rank),
    }
    if (query_rank := config["q_lora_rank"]) is None:
        shapes["q_proj.weight"] = (heads * (nope + rope), hidden)
    else:
        shapes |= {
            "q_a_proj.weight": (query_rank, hidden),
            "q_a_layernorm.weight": (query_rank,),
            "q_b_proj.weight": (heads * (nope + rope), query_rank),
        }
    if config["model_type"] == "kimi_linear":
        return shapes | {"o_proj.weight": (hidden, heads * value)}
    return shapes | {"g_proj.weight": (heads, hidden), "dense.weight": (hidden, heads * value)}


def _moe_shapes(config: RawConfig, layer: str) -> Shapes:
    hidden, experts, width = config["hidden_size"], config["num_experts"], config["moe_intermediate_size"]
    if config["model_type"] == "kimi_linear":
        block, bias, names = layer + "block_sparse_moe.", "e_score_correction_bias", ("w1", "w3", "w2")
    else:
        block, bias, names = layer + "mlp.", "expert_bias", ("gate_proj", "up_proj", "down_proj")
    shapes: Shapes = {block + "gate.weight": (experts, hidden), f"{block}gate.{bias}": (experts,)}
    for expert in range(experts):
        shapes |= _swiglu_shapes(f"{block}experts.{expert}.", hidden, width, names)
    return shapes | _swiglu_shapes(block + "shared_experts.", hidden, width * config["num_shared_experts"])


def _swiglu_shapes(
    prefix: str, hidden: int, width: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Shapes:
    gate, up, down = names
    return {
        f"{prefix}{gate}.weight": (width, hidden),
        f"{prefix}{up}.weight": (width, hidden),
        f"{prefix}{down}.weight": (hidden, width),
    }


ROWS = {
    "kimi_linear": Row(
        shapes=kda_tensor_shapes,
        has_own_modules=True,
        has_own_experts=True,
        gguf="kimi-linear",
    ),
}
