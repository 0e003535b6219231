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


def laguna(num_layers: int, heads: int, **sizes: Any) -> RawConfig:
    """The config of a Laguna of version 2.1; `heads` are those of layers with a window."""
    full = [layer % 4 == 0 for layer in range(num_layers)]
    return sizes | {
        "architectures": ["LagunaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "decoder_sparse_step": 1,
        "eos_token_id": [2, 24],
        "gating": "per-head",
        "gating_types": ["per_head"] * num_layers,
        "head_dim": 128,
        "hidden_act": "silu",
        "layer_types": [FULL if one else SLIDING for one in full],
        "mlp_layer_types": ["dense"] + ["sparse"] * (num_layers - 1),
        "mlp_only_layers": [0],
        "model_type": "laguna",
        "moe_apply_router_weight_on_input": False,
        "moe_routed_scaling_factor": 2.5,
        "moe_router_logit_softcapping": 0.0,
        "norm_topk_prob": True,
        "num_attention_heads": 48,
        "num_attention_heads_per_layer": [48 if one else heads for one in full],
        "num_experts": 256,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": 8,
        "pad_token_id": 9,
        "qkv_bias": False,
        "rms_norm_eps": 1e-6,
        "sliding_window": 512,
        "swa_attention_sink_enabled": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 100_352,
    }


def _laguna_ropes(factor: float, beta_fast: float, attention_factor: float) -> RawConfig:
    return {
        FULL: {
            "rope_theta": 500_000.0,
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": 8192,
            "beta_slow": 1.0,
            "beta_fast": beta_fast,
            "attention_factor": attention_factor,
            "partial_rotary_factor": 0.5,
        },
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
    }


LAGUNA_XS_2_1 = laguna(
    40,
    64,
    hidden_size=2048,
    intermediate_size=8192,
    max_position_embeddings=262_144,
    moe_intermediate_size=512,
    num_experts_per_tok=8,
    rope_parameters=_laguna_ropes(32.0, 64.0, 1.3465735902799727),
    shared_expert_intermediate_size=512,
)
LAGUNA_S_2_1 = laguna(
    48,
    72,
    hidden_size=3072,
    intermediate_size=12_288,
    max_position_embeddings=1_048_576,
    moe_intermediate_size=1024,
    num_experts_per_tok=10,
    rope_parameters=_laguna_ropes(128.0, 32.0, 1.4852030263919618),
    shared_expert_intermediate_size=1024,
)


def mimo_v2(**changes: Any) -> RawConfig:
    """The config of MiMo-V2.5, and what differs in another size."""
    sizes = {
        "hidden_size": 4096,
        "hybrid_layer_pattern": [int(layer > 0 and (layer + 1) % 6 > 0) for layer in range(48)],
        "n_routed_experts": 256,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "swa_num_key_value_heads": 8,
    } | changes
    num_layers = len(sizes["hybrid_layer_pattern"])
    return sizes | {
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
        "architectures": ["MiMoV2ForCausalLM"],
        "attention_bias": False,
        "attention_projection_layout": "fused_qkv",
        "attention_value_scale": changes.get("attention_value_scale", 0.707),
        "audio_config": {},
        "head_dim": 192,
        "hidden_act": "silu",
        "intermediate_size": 16_384,
        "layernorm_epsilon": 1e-6,
        "max_position_embeddings": 1_048_576,
        "model_type": "mimo_v2",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": [0, *[1] * (num_layers - 1)],
        "n_group": 1,
        "n_shared_experts": None,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "num_hidden_layers": num_layers,
        "partial_rotary_factor": 0.334,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.334},
        "rope_theta": 10_000_000,
        "routed_scaling_factor": None,
        "scoring_func": "sigmoid",
        "sliding_window": 128,
        "sliding_window_size": 128,
        "swa_head_dim": 192,
        "swa_num_attention_heads": sizes["num_attention_heads"],
        "swa_rope_theta": 10_000,
        "swa_v_head_dim": 128,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vision_config": {},
        "vocab_size": 152_576,
    }


_FULL_OF_PRO = (0, 7, 15, 23, 31, 39, 47, 55, 62, 69)
MIMO_V2_5 = mimo_v2()
MIMO_V2_5_PRO = mimo_v2(
    attention_value_scale=0.612,
    hidden_size=6144,
    hybrid_layer_pattern=[int(layer not in _FULL_OF_PRO) for layer in range(70)],
    n_routed_experts=384,
    num_attention_heads=128,
    num_key_value_heads=8,
)
