"""The configs of released models that mix layers with a window and layers that see everything, as on the hub."""

from __future__ import annotations

from typing import Any

RawConfig = dict[str, Any]

FULL, SLIDING = "full_attention", "sliding_attention"

MELLUM_2: RawConfig = {
    "architectures": ["MellumForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 28,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 7168,
    "layer_types": [FULL if layer % 4 == 3 else SLIDING for layer in range(28)],
    "max_position_embeddings": 131_072,
    "max_window_layers": 0,
    "mlp_layer_types": ["sparse"] * 28,
    "model_type": "mellum",
    "moe_intermediate_size": 896,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        FULL: {
            "rope_type": "yarn",
            "rope_theta": 500_000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 8192,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "attention_factor": 1.2772588722239782,
        },
        SLIDING: {"rope_type": "default", "rope_theta": 500_000.0},
    },
    "router_aux_loss_coef": 0.001,
    "sliding_window": 1024,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": True,
    "vocab_size": 98_304,
}


def trinity(**changes: Any) -> RawConfig:
    """The config of Trinity-Nano, and what differs in another size."""
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "moe_intermediate_size": 256,
        "num_attention_heads": 8,
        "num_dense_layers": 2,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 56,
        "num_key_value_heads": 2,
        "sliding_window": 2048,
    } | changes
    return sizes | {
        "architectures": ["AfmoeForCausalLM"],
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "global_attn_every_n_layers": 4,
        "head_dim": 128,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "layer_types": [FULL if layer % 4 == 3 else SLIDING for layer in range(sizes["num_hidden_layers"])],
        "max_position_embeddings": 131_072,
        "model_type": "afmoe",
        "mup_enabled": True,
        "n_group": 1,
        "num_expert_groups": 1,
        "num_limited_groups": 1,
        "num_shared_experts": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10_000,
        "route_norm": True,
        "route_scale": 2.826,
        "score_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "use_cache": True,
        "use_grouped_mm": True,
        "vocab_size": 200_192,
    }


TRINITY_MINI = trinity(
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=1024,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=4,
)
TRINITY_LARGE = trinity(
    hidden_size=3072,
    intermediate_size=12_288,
    moe_intermediate_size=3072,
    num_attention_heads=48,
    num_dense_layers=6,
    num_experts=256,
    num_experts_per_tok=4,
    num_hidden_layers=60,
    num_key_value_heads=8,
    sliding_window=4096,
)
