"""The tiny models with recurrent layers that llama.cpp's own converter writes for `tests/oracle/test_converted.py`."""

from __future__ import annotations

from tests.models.tiny import RawConfig
from tests.models.tiny_delta import qwen3_5_moe, qwen3_5_moe_text, qwen3_next
from tests.models.tiny_glm5 import glm5_next
from tests.models.tiny_kda import bailing_hybrid, kimi_linear
from tests.models.tiny_minimax import minimax
from tests.models.tiny_qwen4 import qwen4_exp, qwen4_exp_text
from tests.models.tiny_recurrent import lfm2_moe

_LINEAR, _FULL = "linear_attention", "full_attention"

# llama.cpp's delta nets have keys and values of one width.
RECURRENT_CONVERTED: dict[str, tuple[str, RawConfig]] = {
    "lfm2_moe_plain": ("lfm2moe", lfm2_moe()),
    "lfm2_moe_dense_layers": (
        "lfm2moe",
        lfm2_moe(
            conv_L_cache=4,
            hidden_size=24,
            layer_types=[_FULL, "conv", "conv", _FULL],
            moe_intermediate_size=7,
            num_attention_heads=6,
            num_dense_layers=2,
            num_hidden_layers=4,
            num_key_value_heads=3,
        ),
    ),
    "qwen3_next_plain": ("qwen3next", qwen3_next(linear_key_head_dim=16, linear_value_head_dim=16)),
    "qwen3_next_one_value_head_each": (
        "qwen3next",
        qwen3_next(
            full_attention_interval=3,
            head_dim=12,
            linear_conv_kernel_dim=3,
            linear_key_head_dim=12,
            linear_num_key_heads=3,
            linear_num_value_heads=3,
            linear_value_head_dim=12,
            num_attention_heads=6,
            num_experts_per_tok=5,
            num_hidden_layers=4,
            num_key_value_heads=3,
            partial_rotary_factor=0.5,
        ),
    ),
    "qwen3_5_moe_text_plain": (
        "qwen35moe",
        qwen3_5_moe_text(linear_key_head_dim=16, linear_num_value_heads=6, linear_value_head_dim=16),
    ),
    "qwen3_5_moe_text_tied": (
        "qwen35moe",
        qwen3_5_moe_text(
            layer_types=[_LINEAR, _LINEAR, _FULL],
            linear_conv_kernel_dim=3,
            linear_key_head_dim=12,
            linear_num_key_heads=1,
            linear_num_value_heads=3,
            linear_value_head_dim=12,
            num_experts_per_tok=5,
            tie_word_embeddings=True,
        ),
    ),
    "qwen4_exp_text_plain": (
        "qwen4exp",
        qwen4_exp_text(linear_key_head_dim=12, linear_value_head_dim=12, ple_embed_dim=20),
    ),
    "qwen4_exp_plain": (
        "qwen4exp",
        qwen4_exp(
            hc_count=2,
            hc_lowrank=4,
            heads_per_ngram=1,
            layer_types=[_LINEAR, _LINEAR, _FULL],
            linear_key_head_dim=8,
            linear_num_value_heads=6,
            linear_value_head_dim=8,
            num_experts_per_tok=5,
            ple_conv_kernel_size=3,
            ple_embed_dim=20,
            ple_layer_ids=[2],
            split_ngram_parts=1,
            tie_word_embeddings=True,
        ),
    ),
    "qwen3_5_moe_plain": (
        "qwen35moe",
        qwen3_5_moe(
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            moe_intermediate_size=5,
            num_experts=7,
            num_experts_per_tok=3,
        ),
    ),
    "qwen3_5_moe_tied": (
        "qwen35moe",
        qwen3_5_moe(
            full_attention_interval=3,
            linear_key_head_dim=8,
            linear_num_value_heads=2,
            linear_value_head_dim=8,
            num_experts_per_tok=5,
            num_hidden_layers=4,
            tie_word_embeddings=True,
        ),
    ),
    "kimi_linear_plain": ("kimi-linear", kimi_linear(num_experts=4, vocab_size=64)),
    "kimi_linear_dense_layers": (
        "kimi-linear",
        kimi_linear(
            first_k_dense_replace=2,
            linear_attn_config={
                "full_attn_layers": [1, 4],
                "head_dim": 6,
                "kda_layers": [2, 3],
                "num_heads": 5,
                "short_conv_kernel_size": 3,
            },
            num_attention_heads=5,
            num_experts_per_token=6,
            num_hidden_layers=4,
            num_key_value_heads=5,
            num_shared_experts=2,
        ),
    ),
    # llama.cpp has four streams; its converter wants Kimi Delta Attention's heads to be as many as attention's.
    "glm5_next_plain": ("glm5-next", glm5_next()),
    # With fewer heads of the indexer, whole scores are zero and tie.
    "glm5_next_chosen_pools": ("glm5-next", glm5_next(index_kpool=4, index_topk=8, index_n_heads=8)),
    "glm5_next_dense_layers": (
        "glm5-next",
        glm5_next(
            first_k_dense_replace=2,
            hc_sinkhorn_iters=2,
            hidden_size=24,
            linear_head_dim=7,
            linear_num_heads=4,
            layer_types=["indexed_attention", _LINEAR, _LINEAR],
            linear_lower_bound=-2.0,
            mlp_layer_types=["dense", "dense", "sparse"],
            n_shared_experts=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            swiglu_limit=0.4,
        ),
    ),
    "bailing_hybrid_plain": ("bailingmoe3", bailing_hybrid()),
    "bailing_hybrid_query_rank": (
        "bailingmoe3",
        bailing_hybrid(layer_group_size=3, num_hidden_layers=3, q_lora_rank=11),
    ),
    # The converter wants alphas that are equal, and betas of 1; llama.cpp sees all positions in every eighth layer.
    "minimax_plain": (
        "minimax-01",
        minimax(layer_types=[_LINEAR] * 7 + [_FULL], num_hidden_layers=8, rotary_dim=6),
    ),
    "minimax_factors": (
        "minimax-01",
        minimax(
            full_attn_alpha_factor=0.8,
            head_dim=4,
            hidden_size=20,
            layer_types=[*[_LINEAR] * 7, _FULL, _LINEAR],
            linear_attn_alpha_factor=0.8,
            mlp_alpha_factor=0.8,
            num_attention_heads=8,
            num_experts_per_tok=5,
            num_hidden_layers=9,
            num_key_value_heads=1,
            rotary_dim=4,
        ),
    ),
}
