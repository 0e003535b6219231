"""The configurations of families that mix layers with a window and layers that see everything."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_windows import FULL, SLIDING, YARN, afmoe, laguna, mellum

CONFIGURATIONS = (
    Configuration(name="mellum_plain", config=mellum()),
    Configuration(
        name="mellum_bias_tied_dense_f16",
        config=mellum(
            attention_bias=True,
            dtype="float16",
            head_dim=6,
            hidden_size=36,
            layer_types=[FULL, SLIDING, SLIDING],
            mlp_layer_types=["sparse", "dense", "sparse"],
            norm_topk_prob=False,
            num_attention_heads=6,
            num_experts=4,
            num_experts_per_tok=3,
            num_hidden_layers=3,
            num_key_value_heads=3,
            rope_parameters={
                FULL: YARN | {"rope_theta": 1e4, "factor": 3.0, "beta_fast": 4.0, "truncate": False},
                SLIDING: {"rope_type": "default", "rope_theta": 300.0},
            },
            sliding_window=5,
            tie_word_embeddings=True,
        ),
        dtype="F16",
    ),
    Configuration(name="afmoe_plain", config=afmoe(num_experts=4, vocab_size=40)),
    Configuration(
        name="afmoe_bias_tied_every_second",
        config=afmoe(
            attention_bias=True,
            global_attn_every_n_layers=2,
            head_dim=6,
            hidden_size=26,
            moe_intermediate_size=7,
            mup_enabled=False,
            num_attention_heads=6,
            num_dense_layers=0,
            num_experts_per_tok=3,
            num_hidden_layers=3,
            num_key_value_heads=3,
            num_shared_experts=2,
            route_scale=1.0,
            sliding_window=5,
            tie_word_embeddings=True,
            vocab_size=43,
        ),
    ),
    Configuration(name="laguna_plain", config=laguna()),
    Configuration(
        name="laguna_elements_capped_tied",
        config=laguna(
            attention_bias=True,
            gating="per-element",
            gating_types=["per_element"] * 3,
            head_dim=8,
            hidden_size=24,
            layer_types=[SLIDING, FULL, FULL],
            mlp_layer_types=["sparse", "dense", "sparse"],
            mlp_only_layers=[1],
            moe_intermediate_size=5,
            moe_routed_scaling_factor=1.0,
            moe_router_logit_softcapping=0.7,
            num_attention_heads=3,
            num_attention_heads_per_layer=[3, 6, 3],
            num_experts_per_tok=3,
            num_hidden_layers=3,
            num_key_value_heads=3,
            rope_parameters={
                FULL: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
                SLIDING: {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.75},
            },
            sliding_window=5,
            tie_word_embeddings=True,
            vocab_size=40,
        ),
    ),
)
