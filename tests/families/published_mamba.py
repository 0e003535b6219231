"""The configs of released models with Mamba-2 mixers, as on the hub.

Granite-4.0-H: ibm-granite/granite-4.0-h-tiny and -small; Nemotron-3: nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 and
nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16; without experts, nvidia/NVIDIA-Nemotron-Nano-9B-v2 (its sizes).
"""

from __future__ import annotations

from typing import Any

RawConfig = dict[str, Any]

_MAMBA_OF_GRANITE = {
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
}


def granitemoehybrid(**changes: Any) -> RawConfig:
    """Granite-4.0-H-Tiny's."""
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_multiplier": 0.0078125,
        "bos_token_id": 100_257,
        "embedding_multiplier": 12,
        "eos_token_id": 100_257,
        "hidden_act": "silu",
        "hidden_size": 1536,
        "initializer_range": 0.1,
        "intermediate_size": 512,
        "layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
        "logits_scaling": 6,
        **_MAMBA_OF_GRANITE,
        "mamba_n_heads": 48,
        "max_position_embeddings": 131_072,
        "model_type": "granitemoehybrid",
        "normalization_function": "rmsnorm",
        "num_attention_heads": 12,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 40,
        "num_key_value_heads": 4,
        "num_local_experts": 64,
        "output_router_logits": False,
        "pad_token_id": 100_256,
        "position_embedding_type": "nope",
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10_000,
        "router_aux_loss_coef": 0.0,
        "shared_intermediate_size": 1024,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.56.0",
        "use_cache": True,
        "vocab_size": 100_352,
    } | changes


GRANITE_40_H_SMALL = {
    "hidden_size": 4096,
    "intermediate_size": 768,
    "logits_scaling": 16,
    "mamba_n_heads": 128,
    "num_attention_heads": 32,
    "num_experts_per_tok": 10,
    "num_key_value_heads": 8,
    "num_local_experts": 72,
    "shared_intermediate_size": 1536,
}


# Without routed experts; the sizes are those of GGUF files and IBM's table, and h-350m has attention in as many layers.
_WITHOUT_EXPERTS = {
    "num_experts_per_tok": 0,
    "num_local_experts": 0,
    "attention_multiplier": 0.015625,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "logits_scaling": 8,
    "mamba_n_heads": 64,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "shared_intermediate_size": 8192,
}
GRANITE_40_H_MICRO = granitemoehybrid(**_WITHOUT_EXPERTS)
GRANITE_40_H_350M = GRANITE_40_H_MICRO | {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "layer_types": ["attention" if i in (10, 13, 17, 27) else "mamba" for i in range(32)],
    "logits_scaling": 3,
    "mamba_d_head": 32,
    "mamba_n_heads": 48,
    "num_attention_heads": 12,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
    "residual_multiplier": 0.246,
    "shared_intermediate_size": 2048,
}
GRANITE_40_MICRO = GRANITE_40_H_MICRO | {
    "hidden_size": 2560,
    "layer_types": ["attention"] * 40,
    "logits_scaling": 10,
    "mamba_d_head": 40,
    "mamba_d_state": 256,
    "mamba_n_heads": 128,
    "num_attention_heads": 40,
    "position_embedding_type": "rope",
    "rope_theta": 10_000_000,
}
GRANITE_40_1B = GRANITE_40_MICRO | {
    "attention_multiplier": 0.0078125,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "logits_scaling": 8,
    "mamba_d_head": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "shared_intermediate_size": 4096,
}


def nemotron_h(**changes: Any) -> RawConfig:
    """Nemotron-3-Nano's."""
    return {
        "architectures": ["NemotronHForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "chunk_size": 128,
        "conv_kernel": 4,
        "eos_token_id": 2,
        "expand": 2,
        "head_dim": 128,
        "hidden_dropout": 0.0,
        "hidden_size": 2688,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "initializer_range": 0.02,
        "intermediate_size": 1856,
        "layer_norm_epsilon": 1e-05,
        "mamba_head_dim": 64,
        "mamba_hidden_act": "silu",
        "mamba_num_heads": 64,
        "mamba_proj_bias": False,
        "mamba_ssm_cache_dtype": "float32",
        "max_position_embeddings": 262_144,
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "model_type": "nemotron_h",
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "n_group": 1,
        "n_groups": 8,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_eps": 1e-05,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 52,
        "num_key_value_heads": 2,
        "num_logits_to_keep": 1,
        "pad_token_id": 0,
        "partial_rotary_factor": 1.0,
        "rescale_prenorm_residual": True,
        "residual_in_fp32": False,
        "rope_theta": 10_000,
        "routed_scaling_factor": 2.5,
        "sliding_window": None,
        "ssm_state_size": 128,
        "tie_word_embeddings": False,
        "time_step_floor": 0.0001,
        "time_step_max": 0.1,
        "time_step_min": 0.001,
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.55.4",
        "use_bias": False,
        "use_cache": True,
        "use_conv_bias": True,
        "use_mamba_kernels": True,
        "vocab_size": 131_072,
    } | changes


NEMOTRON_3_SUPER = {
    "eos_token_id": [2, 11],
    "hidden_size": 4096,
    "hybrid_override_pattern": (
        "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
    ),
    "intermediate_size": 2688,
    "mamba_num_heads": 128,
    "moe_intermediate_size": 2688,
    "moe_latent_size": 1024,
    "moe_shared_expert_intermediate_size": 5376,
    "moe_shared_expert_overlap": False,
    "mtp_hybrid_override_pattern": "*E",
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "num_hidden_layers": 88,
    "num_nextn_predict_layers": 1,
    "routed_scaling_factor": 5.0,
}

_OF_EXPERTS = (
    "moe_",
    "n_routed",
    "n_shared",
    "n_group",
    "norm_topk",
    "num_experts",
    "routed_scaling",
    "topk_group",
)
NEMOTRON_NANO_9B_V2 = {
    key: value for key, value in nemotron_h().items() if key == "n_groups" or not key.startswith(_OF_EXPERTS)
} | {
    "hidden_size": 4480,
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    "intermediate_size": 15_680,
    "mamba_head_dim": 80,
    "mamba_num_heads": 128,
    "num_attention_heads": 40,
    "num_hidden_layers": 56,
    "num_key_value_heads": 8,
}
