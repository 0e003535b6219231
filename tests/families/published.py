"""Geometry of released models, as their config.json has it, and the parameter counts that were published."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.families.hub_configs import RELEASED, RawConfig


class Published(NamedTuple):
    """A released model: what decides its size, and its parameters in billions, without vision and prediction heads."""

    name: str
    config: RawConfig
    billions: float


def mixtral() -> RawConfig:
    return {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rope_theta": 1e6,
        "sliding_window": None,
        "vocab_size": 32_000,
    }


def qwen3_moe(**changes: Any) -> RawConfig:
    return {
        "model_type": "qwen3_moe",
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40_960,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rope_theta": 1e6,
        "vocab_size": 151_936,
    } | changes


def gpt_oss(layers: int, experts: int) -> RawConfig:
    return {
        "model_type": "gpt_oss",
        "attention_bias": True,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "max_position_embeddings": 131_072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150_000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201_088,
    }


def glm4_moe(**changes: Any) -> RawConfig:
    return {
        "model_type": "glm4_moe",
        "attention_bias": True,
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 10_944,
        "max_position_embeddings": 131_072,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 96,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 46,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": False,
        "vocab_size": 151_552,
    } | changes


GLM_46 = {
    "first_k_dense_replace": 3,
    "hidden_size": 5120,
    "intermediate_size": 12_288,
    "max_position_embeddings": 202_752,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "num_hidden_layers": 92,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}


def olmoe() -> RawConfig:
    return {
        "model_type": "olmoe",
        "attention_bias": False,
        "clip_qkv": None,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "vocab_size": 50_304,
    }


def minimax_m2() -> RawConfig:
    return {
        "model_type": "minimax_m2",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "max_position_embeddings": 196_608,
        "num_attention_heads": 48,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 62,
        "num_key_value_heads": 8,
        "num_local_experts": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5_000_000,
        "rotary_dim": 64,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": 200_064,
    }


def qwen3_next() -> RawConfig:
    return {
        "model_type": "qwen3_next",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262_144,
        "mlp_only_layers": [],
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000_000,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
        "vocab_size": 151_936,
    }


def qwen3_5_moe(**changes: Any) -> RawConfig:
    return {
        "model_type": "qwen3_5_moe_text",
        "attention_bias": False,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262_144,
        "moe_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10_000_000,
            "rope_type": "default",
        },
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
        "vocab_size": 248_320,
    } | changes


QWEN35_122B = {
    "hidden_size": 3072,
    "linear_num_value_heads": 64,
    "moe_intermediate_size": 1024,
    "num_attention_heads": 32,
    "num_hidden_layers": 48,
    "shared_expert_intermediate_size": 1024,
}
QWEN35_397B = {
    "hidden_size": 4096,
    "linear_num_value_heads": 64,
    "moe_intermediate_size": 1024,
    "num_attention_heads": 32,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 60,
    "shared_expert_intermediate_size": 1024,
}

PUBLISHED = (
    Published("Mixtral-8x7B", mixtral(), 46.7),
    Published("Qwen3-30B-A3B", qwen3_moe(), 30.5),
    Published(
        "Qwen3-235B-A22B",
        qwen3_moe(
            hidden_size=4096,
            intermediate_size=12_288,
            moe_intermediate_size=1536,
            num_attention_heads=64,
            num_hidden_layers=94,
        ),
        235.1,
    ),
    Published("DeepSeek-V3", RELEASED["DeepSeek-V3"], 671.0),
    Published("Kimi-K2", RELEASED["Kimi-K2-Instruct"], 1025.7),
    Published("gpt-oss-20b", gpt_oss(24, 32), 20.9),
    Published("gpt-oss-120b", gpt_oss(36, 128), 116.8),
    Published("GLM-4.5-Air", glm4_moe(), 106.9),
    Published("GLM-4.6", glm4_moe(**GLM_46), 352.8),
    Published("GLM-4.7-Flash", RELEASED["GLM-4.7-Flash"], 29.9),
    Published("OLMoE-1B-7B", olmoe(), 6.92),
    Published("MiniMax-M2", minimax_m2(), 228.7),
    Published("Qwen3-Next-80B-A3B", qwen3_next(), 79.7),
    Published("Qwen3.6-35B-A3B", qwen3_5_moe(), 34.7),
    Published("Qwen3.5-122B-A10B", qwen3_5_moe(**QWEN35_122B), 122.1),
    Published("Qwen3.5-397B-A17B", qwen3_5_moe(**QWEN35_397B), 396.3),
)
