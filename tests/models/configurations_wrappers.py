"""Configurations of models that also see or hear, with each flag of the text part on in one and off in another."""

from __future__ import annotations

from tests.models.configuration import Configuration, yarn
from tests.models.tiny_wrappers import glm4v_moe, internvl, qwen3_omni_moe, qwen3_vl_moe, without_text

CONFIGURATIONS = (
    Configuration(name="qwen3_vl_moe_plain", config=qwen3_vl_moe()),
    Configuration(
        name="qwen3_vl_moe_bias_dense_layer_tied_sharded",
        config=without_text(
            qwen3_vl_moe(
                attention_bias=True,
                tie_word_embeddings=True,
                mlp_only_layers=[1],
                num_key_value_heads=1,
                num_experts_per_tok=1,
                rope_parameters={
                    "mrope_interleaved": True,
                    "mrope_section": [2, 3, 2],
                    "rope_theta": 1e4,
                    "rope_type": "default",
                },
            ),
            "rope_scaling",
            "rope_theta",
        ),
        num_shards=2,
    ),
    Configuration(
        name="qwen3_vl_moe_yarn_f32",
        config=qwen3_vl_moe(
            dtype="float32",
            head_dim=10,
            hidden_size=30,
            moe_intermediate_size=9,
            num_attention_heads=6,
            num_key_value_heads=3,
            num_experts=5,
            num_experts_per_tok=3,
            num_hidden_layers=2,
            rope_scaling={"rope_type": "yarn", "mrope_section": [2, 2, 1], "mrope_interleaved": True}
            | yarn(4.0, 16),
            rope_theta=1e4,
            vocab_size=61,
        ),
        dtype="F32",
    ),
    Configuration(name="qwen3_omni_moe_plain", config=qwen3_omni_moe()),
    Configuration(
        name="qwen3_omni_moe_every_second_not_renormalised_tied_f16",
        config=qwen3_omni_moe(
            attention_bias=True,
            decoder_sparse_step=2,
            norm_topk_prob=False,
            num_experts_per_tok=4,
            num_hidden_layers=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        ),
        dtype="F16",
    ),
    Configuration(name="internvl_plain", config=internvl(head_dim=8, hidden_size=24)),
    Configuration(
        name="internvl_biases_dense_tied_f16",
        config=internvl(
            attention_bias=True,
            hidden_size=28,
            mlp_only_layers=[1],
            num_experts=5,
            num_experts_per_tok=3,
            tie_word_embeddings=True,
            vocab_size=50,
        ),
        dtype="F16",
    ),
    Configuration(name="glm4v_moe_plain", config=glm4v_moe()),
    Configuration(
        name="glm4v_moe_groups_scaled_tied_sharded",
        config=without_text(
            glm4v_moe(
                attention_bias=False,
                first_k_dense_replace=0,
                n_group=3,
                n_routed_experts=9,
                n_shared_experts=2,
                norm_topk_prob=False,
                num_experts_per_tok=3,
                num_hidden_layers=2,
                rope_parameters={
                    "mrope_section": [1, 2, 1],
                    "partial_rotary_factor": 0.3,
                    "rope_theta": 500000,
                    "rope_type": "default",
                },
                routed_scaling_factor=2.5,
                tie_word_embeddings=True,
                topk_group=2,
            ),
            "rope_scaling",
            "rope_theta",
            "partial_rotary_factor",
        ),
        num_shards=2,
    ),
    Configuration(
        name="glm4v_moe_all_turns_yarn_f32",
        config=glm4v_moe(
            dtype="float32",
            first_k_dense_replace=2,
            head_dim=10,
            hidden_size=30,
            moe_intermediate_size=11,
            num_attention_heads=6,
            num_key_value_heads=3,
            num_experts_per_tok=1,
            partial_rotary_factor=1.0,
            rope_scaling={"rope_type": "yarn", "mrope_section": [2, 1, 2]} | yarn(4.0, 16),
        ),
        dtype="F32",
    ),
)
