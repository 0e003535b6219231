"""The configs of released models with sparse attention, as on the hub."""

from __future__ import annotations

from typing import Any

RawConfig = dict[str, Any]

_SPARSE_LAYERS = [0] * 3 + [1] * 57
MINIMAX_M3: RawConfig = {
    "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
    "image_token_index": 200_025,
    "model_type": "minimax_m3_vl",
    "text_config": {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "attention_output_gate": False,
        "dense_intermediate_size": 12_288,
        "head_dim": 128,
        "hidden_act": "swigluoai",
        "hidden_size": 6144,
        "intermediate_size": 3072,
        "max_position_embeddings": 1_048_576,
        "moe_layer_freq": _SPARSE_LAYERS,
        "n_shared_experts": 1,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 60,
        "num_key_value_heads": 4,
        "num_local_experts": 128,
        "num_mtp_modules": 7,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5,
        "qk_norm_type": "per_head",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5_000_000,
        "rotary_dim": 64,
        "routed_scaling_factor": 2.0,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 3072,
        "sparse_attention_config": {
            "sparse_attention_freq": _SPARSE_LAYERS,
            "sparse_block_size": 128,
            "sparse_disable_index_value": _SPARSE_LAYERS,
            "sparse_index_dim": 128,
            "sparse_init_block": 0,
            "sparse_local_block": 1,
            "sparse_num_index_heads": 4,
            "sparse_score_type": "max",
            "sparse_topk_blocks": 16,
            "use_sparse_attention": True,
        },
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": 200_064,
    },
    "video_token_index": 200_026,
    "vision_config": {
        "hidden_size": 1280,
        "image_size": 2016,
        "intermediate_size": 5120,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 32,
        "patch_size": 14,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}

_FULL = {0, *range(1, 78, 4)}
HY4: RawConfig = {
    "architectures": ["HYV4ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bitwise_backward_align": True, "bos_token_id": 120_000, "enable_ihc": True, "enable_lm_head_fp32": True,
    "eos_token_id": 120_025, "gated_mla": True, "gating_type": "elementwise", "hc_eps": 1e-6, "hc_magnitude": 2.0,
    "hc_mult": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 6144, "index_head_dim": 128, "index_n_heads": 32,
    "index_topk": 2048, "indexer_types": ["full" if layer in _FULL else "shared" for layer in range(78)],
    "intermediate_size": 18_432, "kv_lora_rank": 512, "layer_types": ["deepseek_sparse_attention"] * 78,
    "learnable_sink": True, "learnable_sink_init": 0.0, "max_position_embeddings": 1_048_576,
    "mlp_layer_types": ["dense"] + ["sparse"] * 77, "model_type": "hy_v4", "moe_intermediate_size": 2048, "n_group": 1,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 64,
    "num_experts_per_tok": 8, "num_hidden_layers": 78, "num_key_value_heads": 8, "num_nextn_predict_layers": 1,
    "q_lora_rank": 2048, "qk_head_dim": 256, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10_000_000.0, "rope_type": "default"}, "routed_scaling_factor": 2.827,
    "swiglu_limit": 10.0, "tie_word_embeddings": False, "topk_group": 1, "use_dsa": True, "use_mla": True,
    "v_head_dim": 256, "vocab_size": 120_832,
}  # fmt: skip
