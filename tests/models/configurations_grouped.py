"""Configurations of families with grouped-query attention and the router of DeepSeek-V3."""

from __future__ import annotations

from tests.models.configuration import Configuration, yarn
from tests.models.tiny_grouped import bailing_moe, dots1, exaone_moe, hy_v3, solar_open

# Like Ring-1T's, it does not give the width of the shared experts.
_ONE_GROUP = bailing_moe(
    first_k_dense_replace=0,
    head_dim=10,
    n_group=1,
    num_attention_heads=6,
    num_experts=5,
    num_hidden_layers=2,
    num_key_value_heads=3,
    num_shared_experts=2,
    partial_rotary_factor=1.0,
    rotary_dim=10,
    tie_word_embeddings=True,
    use_qkv_bias=True,
)
del _ONE_GROUP["moe_shared_expert_intermediate_size"]

CONFIGURATIONS = (
    Configuration(name="solar_open_plain", config=solar_open()),
    Configuration(
        name="solar_open_bias_groups_tied_f32",
        config=solar_open(
            attention_bias=True,
            hidden_size=20,
            head_dim=6,
            moe_intermediate_size=7,
            n_group=3,
            n_routed_experts=6,
            n_shared_experts=2,
            norm_topk_prob=False,
            num_attention_heads=6,
            num_hidden_layers=2,
            num_experts_per_tok=3,
            num_key_value_heads=3,
            rope_scaling={"type": "yarn"} | yarn(4.0, 16),
            routed_scaling_factor=1.7,
            tie_word_embeddings=True,
            topk_group=2,
            torch_dtype="float32",
        ),
        dtype="F32",
    ),
    Configuration(name="dots1_plain", config=dots1()),
    Configuration(
        name="dots1_windows_bias_sharded",
        config=dots1(
            attention_bias=True,
            first_k_dense_replace=2,
            max_window_layers=1,
            n_shared_experts=1,
            norm_topk_prob=False,
            num_hidden_layers=4,
            num_key_value_heads=4,
            routed_scaling_factor=1.0,
            scoring_func="sigmoid",
            sliding_window=7,
        ),
        num_shards=2,
    ),
    Configuration(name="bailing_moe_plain", config=bailing_moe()),
    Configuration(name="bailing_moe_bias_one_group_sharded", config=_ONE_GROUP, num_shards=2),
    Configuration(name="exaone_moe_plain", config=exaone_moe()),
    Configuration(
        name="exaone_moe_groups_pattern_tied_f16",
        config=exaone_moe(
            first_k_dense_replace=0,
            head_dim=6,
            hidden_size=20,
            layer_types=None,
            n_group=3,
            norm_topk_prob=False,
            num_attention_heads=6,
            num_experts=6,
            num_experts_per_tok=3,
            num_key_value_heads=3,
            num_shared_experts=2,
            rope_parameters={"rope_theta": 300.0, "rope_type": "default"},
            rope_theta=300.0,
            routed_scaling_factor=1.0,
            sliding_window=5,
            sliding_window_pattern=2,
            tie_word_embeddings=True,
            topk_group=2,
            torch_dtype="float16",
        ),
        dtype="F16",
    ),
    Configuration(name="hy_v3_plain", config=hy_v3()),
    Configuration(
        name="hy_v3_bias_tied_f16",
        config=hy_v3(
            attention_bias=True,
            first_k_dense_replace=0,
            mlp_layer_types=["sparse"] * 3,
            num_experts_per_tok=3,
            num_shared_experts=2,
            router_scaling_factor=1.3,
            tie_word_embeddings=True,
            torch_dtype="float16",
        ),
        dtype="F16",
    ),
)
