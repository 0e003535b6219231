"""The config.json of released models of Ling's family: facts of the hub's files."""

from __future__ import annotations

from tests.families.hub_configs import RawConfig

# inclusionAI/Ling-mini-2.0
LING_MINI_2: RawConfig = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "eos_token_id": 156_892,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "max_position_embeddings": 32_768,
    "max_window_layers": 20,
    "model_type": "bailing_moe",
    "moe_intermediate_size": 512,
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 512,
    "mtp_loss_scaling_factor": 0,
    "n_group": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 20,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "pad_token_id": 156_892,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600_000,
    "rotary_dim": 64,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.3",
    "use_bias": False,
    "use_cache": True,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "vocab_size": 157_184,
}
# inclusionAI/Ling-flash-2.0
LING_FLASH_2: RawConfig = LING_MINI_2 | {
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "moe_shared_expert_intermediate_size": 1024,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
}
# inclusionAI/Ring-1T, whose file does not give the width of the shared expert
RING_1T: RawConfig = {
    **{key: value for key, value in LING_MINI_2.items() if key != "moe_shared_expert_intermediate_size"},
    "first_k_dense_replace": 4,
    "hidden_size": 8192,
    "intermediate_size": 18_432,
    "max_position_embeddings": 65_536,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
}
# sarvamai/sarvam-30b
SARVAM_30B: RawConfig = {
    **{
        key: value for key, value in LING_MINI_2.items() if key not in ("partial_rotary_factor", "rotary_dim")
    },
    "architectures": ["SarvamMoEForCausalLM"],
    "eos_token_id": 1,
    "head_dim": 64,
    "hidden_size": 4096,
    "intermediate_size": 8192,
    "max_position_embeddings": 131_072,
    "max_window_layers": 19,
    "model_type": "sarvam_moe",
    "moe_intermediate_size": 1024,
    "moe_shared_expert_intermediate_size": 1024,
    "n_group": 1,
    "num_attention_heads": 64,
    "num_experts": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 19,
    "pad_token_id": 0,
    "rope_theta": 8_000_000,
    "topk_group": 1,
    "vocab_size": 262_144,
}
