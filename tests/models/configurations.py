"""The configurations with committed references: every family, with each flag on in one and off in another.

`make_models.py` chooses `seed` so that no routing decision and no greedy choice of the reference is a near-tie, and
writes the margins into the reference's metadata.
"""

from __future__ import annotations

from tests.models.configuration import Configuration, yarn
from tests.models.rows import modules_like
from tests.models.tiny import (
    RawConfig,
    glm4_moe,
    gpt_oss,
    minimax_m2,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    respelt,
)
from tests.models.tiny_delta import qwen3_5_moe, qwen3_5_moe_text, qwen3_next
from tests.models.tiny_kda import bailing_hybrid, kimi_linear
from tests.models.tiny_recurrent import lfm2_moe


def without(config: RawConfig, *keys: str) -> RawConfig:
    return {key: value for key, value in config.items() if key not in keys}


__all__ = ["CONFIGURATIONS", "Configuration"]

CONFIGURATIONS = (
    Configuration(name="mixtral_plain", config=mixtral(num_local_experts=8)),
    Configuration(
        name="mixtral_window_top1",
        config=mixtral(sliding_window=8, num_experts_per_tok=1, intermediate_size=16),
    ),
    Configuration(
        name="mixtral_head_dim_tied_sharded",
        config=respelt(mixtral(head_dim=24, tie_word_embeddings=True, num_experts_per_tok=3), theta=1e4),
        num_shards=2,
    ),
    Configuration(
        name="mixtral_yarn",
        config=mixtral(rope_scaling={"type": "yarn"} | yarn(8.0, 16), rope_theta=1e4, head_dim=16),
    ),
    Configuration(
        name="mixtral_linear_f32",
        config=mixtral(
            rope_scaling={"type": "linear", "factor": 3.0},
            rope_theta=1e4,
            torch_dtype="float32",
            hidden_size=28,
            intermediate_size=17,
            num_local_experts=5,
            num_key_value_heads=4,
            head_dim=10,
            vocab_size=101,
        ),
        dtype="F32",
    ),
    Configuration(
        name="qwen2_moe_plain_f16", config=qwen2_moe(torch_dtype="float16", num_experts=8), dtype="F16"
    ),
    Configuration(
        name="qwen2_moe_renormalised_dense_layer",
        config=qwen2_moe(norm_topk_prob=True, mlp_only_layers=[1], num_experts_per_tok=3),
    ),
    Configuration(
        name="qwen2_moe_every_second_tied",
        config=qwen2_moe(
            decoder_sparse_step=2,
            tie_word_embeddings=True,
            qkv_bias=False,
            num_key_value_heads=1,
            num_hidden_layers=4,
            rope_scaling={"rope_type": "dynamic", "factor": 2.0},
        ),
    ),
    Configuration(
        name="qwen2_moe_window",  # every second layer below max_window_layers has a window
        config=qwen2_moe(
            use_sliding_window=True,
            sliding_window=7,
            max_window_layers=3,
            num_hidden_layers=4,
            num_key_value_heads=2,
            rope_scaling={"rope_type": "linear", "factor": 2.0},
        ),
    ),
    Configuration(
        name="qwen2_moe_layer_types_yarn",
        config=respelt(
            qwen2_moe(
                use_sliding_window=True,
                sliding_window=9,
                layer_types=["full_attention", "sliding_attention", "sliding_attention"],
                num_experts_per_tok=4,
            ),
            theta=1e2,
            rope_type="yarn",
            **yarn(4.0, 64, beta_fast=4.0, beta_slow=0.5, truncate=False, mscale=0.7, mscale_all_dim=1.0),
        ),
    ),
    Configuration(name="qwen3_moe_plain", config=qwen3_moe(num_experts=8)),
    Configuration(
        name="qwen3_moe_bias_llama3",
        config=qwen3_moe(
            attention_bias=True,
            norm_topk_prob=False,
            rope_theta=1e4,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 20,
            },
        ),
    ),
    Configuration(
        name="qwen3_moe_tied_dense_layers_sharded",
        config=respelt(
            qwen3_moe(tie_word_embeddings=True, mlp_only_layers=[0, 2], num_hidden_layers=4, head_dim=24),
            theta=1e6,
            rope_type="linear",
            factor=4.0,
        ),
        num_shards=3,
    ),
    Configuration(
        name="qwen3_moe_window_top1",
        config=qwen3_moe(
            use_sliding_window=True, sliding_window=6, num_experts_per_tok=1, norm_topk_prob=False
        ),
    ),
    Configuration(
        name="qwen3_moe_yarn_eos_list",
        config=respelt(
            qwen3_moe(eos_token_id=[2, 5], num_experts=12, num_experts_per_tok=4, moe_intermediate_size=12),
            theta=1e4,
            rope_type="yarn",
            **yarn(4.0, 24, attention_factor=1.25),
        ),
    ),
    Configuration(
        name="qwen3_moe_dynamic_every_second",
        config=qwen3_moe(
            decoder_sparse_step=2,
            mlp_only_layers=[3],
            num_hidden_layers=4,
            head_dim=12,
            num_attention_heads=6,
            num_key_value_heads=3,
            rope_scaling={"rope_type": "dynamic", "factor": 4.0},
        ),
    ),
    Configuration(name="gpt_oss_plain", config=gpt_oss()),
    Configuration(
        name="gpt_oss_clamped_top1",  # inner neurons are of order one, so half of them are clamped
        config=gpt_oss(
            swiglu_limit=0.6, swiglu_alpha=1.1, num_experts_per_tok=1, layer_types=None, num_key_value_heads=4
        ),
    ),
    Configuration(
        name="gpt_oss_full_attention_f16",
        config=gpt_oss(
            layer_types=["full_attention"] * 2,
            num_hidden_layers=2,
            attention_bias=False,
            torch_dtype="float16",
            num_key_value_heads=1,
            hidden_size=44,
            intermediate_size=9,
            rope_scaling=yarn(4.0, 16, rope_type="yarn", beta_fast=4.0, attention_factor=1.1),
        ),
        dtype="F16",
    ),
    Configuration(
        name="gpt_oss_windows_sharded",
        config=respelt(
            gpt_oss(
                layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                sliding_window=3,
                num_hidden_layers=3,
                num_local_experts=9,
                num_experts_per_tok=4,
                intermediate_size=10,
                initial_context_length=128,
                head_dim=14,
                vocab_size=101,
            ),
            theta=1e4,
        ),
        num_shards=2,
    ),
    Configuration(
        name="gpt_oss_f32",
        config=gpt_oss(
            torch_dtype="float32",
            num_local_experts=4,
            num_experts_per_tok=3,
            head_dim=10,
            num_attention_heads=6,
            num_key_value_heads=3,
            vocab_size=84,
            tie_word_embeddings=True,
            num_hidden_layers=2,
        ),
        dtype="F32",
    ),
    Configuration(name="glm4_moe_plain", config=glm4_moe(n_routed_experts=8)),
    Configuration(
        name="glm4_moe_qk_norm_scaled_sharded",
        config=glm4_moe(
            use_qk_norm=True,
            routed_scaling_factor=2.5,
            first_k_dense_replace=2,
            num_hidden_layers=4,
            num_experts_per_tok=3,
            partial_rotary_factor=0.34,
            num_nextn_predict_layers=0,
            n_routed_experts=5,
            intermediate_size=12,
        ),
        num_shards=2,
    ),
    Configuration(
        name="glm4_moe_groups_tied",
        config=respelt(
            glm4_moe(
                n_group=4,
                topk_group=2,
                n_routed_experts=12,
                num_experts_per_tok=4,
                n_shared_experts=2,
                moe_intermediate_size=9,
                num_hidden_layers=2,
                norm_topk_prob=False,
                attention_bias=False,
                tie_word_embeddings=True,
                first_k_dense_replace=0,
                partial_rotary_factor=0.7,
            ),
            theta=1e4,
        ),
    ),
    Configuration(
        name="glm4_moe_yarn_f32",
        config=glm4_moe(
            rope_scaling={"rope_type": "yarn"} | yarn(8.0, 16),
            rope_theta=1e4,
            head_dim=20,
            hidden_size=28,
            moe_intermediate_size=11,
            num_hidden_layers=2,
            num_key_value_heads=1,
            partial_rotary_factor=0.6,
            torch_dtype="float32",
            use_qk_norm=True,
            n_group=3,
            topk_group=1,
        ),
        dtype="F32",
    ),
    Configuration(
        name="glm4_moe_all_turns_f16",
        config=glm4_moe(partial_rotary_factor=1.0, torch_dtype="float16", num_experts_per_tok=1),
        dtype="F16",
    ),
    Configuration(name="olmoe_plain", config=olmoe(num_experts=8, num_hidden_layers=2)),
    Configuration(
        name="olmoe_cut_off_renormalised",  # half of q, k and v exceed the limit
        config=olmoe(clip_qkv=0.6, norm_topk_prob=True, num_key_value_heads=2, num_experts_per_tok=3),
    ),
    Configuration(
        name="olmoe_bias_tied_sharded",
        config=respelt(
            olmoe(
                num_hidden_layers=2,
                attention_bias=True,
                tie_word_embeddings=True,
                num_experts_per_tok=4,
                hidden_size=48,
                num_experts=5,
            ),
            theta=1e5,
            rope_type="linear",
            factor=2.0,
        ),
        num_shards=2,
    ),
    Configuration(
        name="olmoe_top1_f32",
        config=olmoe(
            num_experts_per_tok=1,
            torch_dtype="float32",
            clip_qkv=1.5,
            hidden_size=30,
            intermediate_size=11,
            num_attention_heads=3,
            num_key_value_heads=1,
            num_hidden_layers=2,
        ),
        dtype="F32",
    ),
    Configuration(name="lfm2_moe_plain", config=lfm2_moe()),
    Configuration(
        name="lfm2_moe_biases_untied_no_choice_bias",
        config=lfm2_moe(
            conv_bias=True,
            conv_L_cache=5,
            layer_types=["full_attention", "conv", "conv", "full_attention"],
            norm_topk_prob=False,
            num_dense_layers=0,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=3,
            routed_scaling_factor=1.5,
            tie_embedding=False,
            use_expert_bias=False,
            hidden_size=24,
            moe_intermediate_size=7,
        ),
    ),
    Configuration(name="kimi_linear_plain", config=kimi_linear(num_experts=4, vocab_size=64)),
    Configuration(
        name="kimi_linear_groups_no_dense_layer",
        config=kimi_linear(
            first_k_dense_replace=0,
            linear_attn_config={
                "full_attn_layers": [3],
                "head_dim": 7,
                "kda_layers": [1, 2],
                "num_heads": 4,
                "short_conv_kernel_size": 3,
            },
            moe_renormalize=False,
            num_expert_group=3,
            topk_group=2,
            routed_scaling_factor=1.0,
            hidden_size=24,
            moe_intermediate_size=6,
            vocab_size=64,
            kv_lora_rank=12,
            num_shared_experts=2,
        ),
    ),
    Configuration(name="bailing_hybrid_plain", config=bailing_hybrid(num_hidden_layers=2, num_experts=9)),
    Configuration(
        name="bailing_hybrid_query_rank",
        config=bailing_hybrid(
            q_lora_rank=11,
            layer_group_size=3,
            num_hidden_layers=3,
            num_nextn_predict_layers=1,
            moe_intermediate_size=5,
            moe_shared_expert_intermediate_size=5,
            vocab_size=64,
            kda_lower_bound=-2.5,
            short_conv_kernel_size=3,
            head_dim=8,
            hidden_size=24,
            norm_topk_prob=False,
            first_k_dense_replace=0,
        ),
    ),
    Configuration(name="minimax_m2_plain", config=minimax_m2(num_local_experts=8, num_hidden_layers=2)),
    Configuration(
        name="minimax_m2_all_turns_tied",
        config=minimax_m2(
            rotary_dim=12, num_key_value_heads=1, tie_word_embeddings=True, num_experts_per_tok=4
        ),
    ),
    Configuration(
        name="minimax_m2_respelt_sharded",
        config=respelt(
            without(
                minimax_m2(num_hidden_layers=2, head_dim=20, num_experts_per_tok=3, intermediate_size=9),
                "rotary_dim",
            ),
            theta=1e4,
            partial_rotary_factor=0.5,
        ),
        num_shards=2,
    ),
    Configuration(
        name="minimax_m2_yarn_f32",
        config=minimax_m2(
            rope_scaling={"rope_type": "yarn"} | yarn(4.0, 16),
            rope_theta=1e4,
            rotary_dim=6,
            head_dim=10,
            vocab_size=49,
            hidden_size=30,
            intermediate_size=11,
            num_attention_heads=6,
            num_key_value_heads=3,
            num_hidden_layers=2,
            num_experts_per_tok=1,
            torch_dtype="float32",
        ),
        dtype="F32",
    ),
    Configuration(name="qwen3_next_plain", config=qwen3_next()),
    Configuration(
        name="qwen3_next_layer_types_tied_sharded",  # one value head per key head, a short convolution
        config=respelt(
            qwen3_next(
                layer_types=["full_attention", "linear_attention", "linear_attention"],
                full_attention_interval=4,
                tie_word_embeddings=True,
                mlp_only_layers=[1],
                linear_num_key_heads=3,
                linear_num_value_heads=3,
                linear_conv_kernel_dim=2,
                num_experts_per_tok=3,
                intermediate_size=17,
            ),
            theta=1e6,
            partial_rotary_factor=0.5,
        ),
        num_shards=2,
    ),
    Configuration(
        name="qwen3_next_bias_yarn_f32",
        config=qwen3_next(
            attention_bias=True,
            norm_topk_prob=False,
            torch_dtype="float32",
            num_hidden_layers=2,
            num_experts=4,
            hidden_size=20,
            linear_key_head_dim=17,
            linear_value_head_dim=16,
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            vocab_size=60,
            rope_theta=1e4,
            partial_rotary_factor=0.5,
            rope_scaling={"rope_type": "yarn"} | yarn(4.0, 16),
        ),
        dtype="F32",
    ),
    Configuration(
        name="qwen3_next_every_second_f16",
        config=qwen3_next(
            decoder_sparse_step=2,
            full_attention_interval=3,
            num_hidden_layers=4,
            torch_dtype="float16",
            partial_rotary_factor=1.0,
            num_key_value_heads=1,
            linear_num_value_heads=6,
            linear_key_head_dim=8,
            linear_value_head_dim=5,
            intermediate_size=9,
            shared_expert_intermediate_size=7,
        ),
        dtype="F16",
    ),
    Configuration(name="qwen3_5_moe_text_plain", config=qwen3_5_moe_text()),
    Configuration(
        name="qwen3_5_moe_text_tied_bias",
        config=qwen3_5_moe_text(
            tie_word_embeddings=True,
            attention_bias=True,
            layer_types=["linear_attention", "linear_attention", "full_attention"],
            linear_num_key_heads=1,
            linear_num_value_heads=3,
            linear_conv_kernel_dim=3,
            rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
        ),
    ),
    Configuration(
        name="qwen3_5_moe_plain",
        config=qwen3_5_moe(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=5),
    ),
    Configuration(
        name="qwen3_5_moe_tied_f32_sharded",
        config=qwen3_5_moe(
            tie_word_embeddings=True,
            dtype="float32",
            full_attention_interval=1,
            layer_types=["linear_attention", "full_attention"],
            num_hidden_layers=2,
            hidden_size=20,
            num_experts=3,
            num_experts_per_tok=1,
            linear_value_head_dim=17,
            linear_key_head_dim=15,
            vocab_size=70,
        ),
        dtype="F32",
        num_shards=2,
    ),
    *(one for module in modules_like("configurations_*.py") for one in module.CONFIGURATIONS),
)
