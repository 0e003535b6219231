"""The configurations of families that mix layers with a window and layers that see everything."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_windows import FULL, SLIDING, YARN, afmoe, mellum

WINDOWS = (
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
)
