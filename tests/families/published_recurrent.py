"""The config.json of released models with recurrent layers, and of Step-3.5: facts that other engines' tests state."""

from __future__ import annotations

from typing import Any

RawConfig = dict[str, Any]

# moonshotai/Kimi-K3: 2.8 trillion parameters, and 104 billion active without the embedding table. Layers are counted
# from one.
_FULL_OF_K3 = [*range(4, 93, 4), 93]
KIMI_K3: RawConfig = {
    "architectures": ["KimiK3ForConditionalGeneration"],
    "bos_token_id": 163_584,
    "eos_token_id": 163_586,
    "media_placeholder_token_id": 163_605,
    "model_type": "kimi_k3",
    "tie_word_embeddings": False,
    "text_config": {
        "activation_situ_beta": 4.0,
        "activation_situ_linear_beta": 25.0,
        "attn_res_block_size": 12,
        "eos_token_id": 163_586,
        "first_k_dense_replace": 1,
        "hidden_act": "situ",
        "hidden_size": 7168,
        "intermediate_size": 33_792,
        "kv_lora_rank": 512,
        "latent_moe_use_norm": True,
        "linear_attn_config": {
            "full_attn_layers": _FULL_OF_K3,
            "gate_lower_bound": -5.0,
            "head_dim": 128,
            "kda_layers": [layer for layer in range(1, 94) if layer not in _FULL_OF_K3],
            "num_heads": 96,
            "short_conv_kernel_size": 4,
            "use_full_rank_gate": True,
        },
        "max_position_embeddings": 1_048_576,
        "mla_use_nope": True,
        "mla_use_output_gate": True,
        "model_type": "kimi_linear",
        "moe_intermediate_size": 3072,
        "moe_layer_freq": 1,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "num_attention_heads": 96,
        "num_expert_group": 1,
        "num_experts": 896,
        "num_experts_per_token": 16,
        "num_hidden_layers": 93,
        "num_key_value_heads": 96,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": 2,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-05,
        "routed_expert_hidden_size": 3584,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "use_grouped_topk": True,
        "v_head_dim": 128,
        "vocab_size": 163_840,
    },
}

# moonshotai/Kimi-Linear-48B-A3B-Instruct, which has 49.1 billion parameters. Layers are counted from one.
_FULL = [4, 8, 12, 16, 20, 24, 27]
KIMI_LINEAR_48B: RawConfig = {
    "architectures": ["KimiLinearForCausalLM"],
    "bos_token_id": 163_584,
    "dtype": "bfloat16",
    "eos_token_id": 163_586,
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": _FULL,
        "head_dim": 128,
        "kda_layers": [layer for layer in range(1, 28) if layer not in _FULL],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1_048_576,
    "model_type": "kimi_linear",
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "pad_token_id": 163_839,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "transformers_version": "4.56.1",
    "use_cache": True,
    "use_grouped_topk": True,
    "v_head_dim": 128,
    "vocab_size": 163_840,
}


_GLM_5_3_LATENT = range(3, 45, 4)
GLM_5_3_FLASH: RawConfig = {
    "architectures": ["Glm5NextForConditionalGeneration"],
    "image_token_id": 154_854,
    "model_type": "glm5_next",
    "text_config": {
        "attention_bias": False, "eos_token_id": [154_820, 154_827, 154_829], "first_k_dense_replace": 3,
        "hc_eps": 1e-6, "hc_mult": 4, "hc_sinkhorn_iters": 20, "head_dim": 0, "hidden_act": "silu",
        "hidden_size": 4096, "index_head_dim": 128, "index_kpool": 4, "index_kpool_always_select_tail": True,
        "index_kpool_compress": True, "index_n_heads": 32, "index_share_for_mtp_iteration": True,
        "index_topk": 2048, "indexer_rope_interleave": True, "indexer_types": ["full"] * 45,
        "intermediate_size": 12_288, "kv_lora_rank": 512,
        "layer_types": [
            "deepseek_sparse_attention" if layer in _GLM_5_3_LATENT else "linear_attention" for layer in range(45)
        ],
        "linear_attn_config": {
            "full_attn_layers": list(_GLM_5_3_LATENT), "gate_lower_bound": -5.0, "head_dim": 128,
            "kda_layers": [layer for layer in range(45) if layer not in _GLM_5_3_LATENT], "num_heads": 64,
            "short_conv_kernel_size": 4,
        },
        "max_position_embeddings": 1_048_576, "mhc": True, "mla_use_nope": True,
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 42, "model_type": "glm5_next_text",
        "moe_intermediate_size": 2048, "moe_router_dtype": "float32", "n_group": 1, "n_routed_experts": 288,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 45, "num_key_value_heads": 64, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
        "qk_head_dim": 256, "qk_nope_head_dim": 256, "qk_rope_head_dim": 0, "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "swiglu_limit": 10.0,
        "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc", "v_head_dim": 256,
        "vocab_size": 154_880,
    },
    "tie_word_embeddings": False,
    "video_token_id": 154_855,
    "vision_config": {"model_type": "glm5_next_vision"},
}  # fmt: skip


def minimax_text_01(m1: RawConfig) -> RawConfig:
    """MiniMaxAI/MiniMax-Text-01, of which M1 is a further trained one."""
    return m1 | {
        "architectures": ["MiniMaxText01ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_minimax_text_01.MiniMaxText01Config",
            "AutoModelForCausalLM": "modeling_minimax_text_01.MiniMaxText01ForCausalLM",
        },
        "model_type": "minimax_text_01",
    }


def qwen3_5_35b(text: RawConfig) -> RawConfig:
    """Qwen/Qwen3.5-35B-A3B and 3.6, without most keys of the tower."""
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "image_token_id": 248_056,
        "model_type": "qwen3_5_moe",
        "text_config": text | {"attn_output_gate": True, "mtp_num_hidden_layers": 1},
        "tie_word_embeddings": False,
        "vision_config": {"model_type": "qwen3_5_moe"},
    }


def step_3_5_flash(text: RawConfig) -> RawConfig:
    """stepfun-ai/Step-3.5-Flash, where Step-3.7's text part differs: only the last layer's shared expert is limited."""
    return {key: value for key, value in text.items() if key != "rms_norm_eps"} | {
        "auto_map": {
            "AutoConfig": "configuration_step3p5.Step3p5Config",
            "AutoModelForCausalLM": "modeling_step3p5.Step3p5ForCausalLM",
        },
        "swiglu_limits_shared": [16.0 if layer == 44 else 0.0 for layer in range(48)],
        "tie_word_embeddings": False,
    }


# Qwen/Qwen3.8-Flash-Next: 125 billion parameters, and 51 billion in its table.
QWEN3_8_FLASH_NEXT: RawConfig = {
    "architectures": ["Qwen4ExpForConditionalGeneration"],
    "model_type": "qwen4_exp",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 248_044,
        "eos_token_id": 248_044,
        "hc_count": 4,
        "hc_lowrank": 320,
        "head_dim": 256,
        "heads_per_ngram": 8,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 4,
        "indexer_head_dim": 128,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 4,
        "intermediate_size": 12_288,
        "layer_types": ["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(48)],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_value_head_dim": 128,
        "make_ngram_vocab_size_divisible_by": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262_144,
        "model_type": "qwen4_exp_text",
        "moe_intermediate_size": 640,
        "mtp": {
            "hybrid": True,
            "layer_types": ["full_attention"],
            "mtp_use_hidden_state_from_layer": None,
            "num_hidden_layers": 1,
            "rope_theta": 10_000_000,
        },
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "ngram_size": 3,
        "ngram_vocab_size_base": 20_000_000,
        "num_attention_heads": 24,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "output_gate_type": "sigmoid",
        "ple_conv_kernel_size": 4,
        "ple_embed_dim": 2560,
        "ple_layer_ids": [2],
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10_000_000,
            "rope_type": "default",
        },
        "shared_expert_intermediate_size": 640,
        "split_ngram_parts": 128,
        "tie_word_embeddings": False,
        "vocab_size": 248_320,
    },
}
