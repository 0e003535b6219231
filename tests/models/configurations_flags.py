"""The configurations of families that differ by flags of norms, factors, networks and routers."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_flags import ernie4_5_moe, flex_olmo, granitemoe, granitemoeshared

CONFIGURATIONS = (
    Configuration(name="flex_olmo_plain", config=flex_olmo()),
    Configuration(
        name="flex_olmo_bias_renormalised_f32",
        config=flex_olmo(
            attention_bias=True,
            norm_topk_prob=True,
            num_experts_per_tok=3,
            num_hidden_layers=2,
            hidden_size=24,
            intermediate_size=9,
            num_experts=5,
            vocab_size=70,
            torch_dtype="float32",
        ),
        dtype="F32",
    ),
    Configuration(name="granitemoe_plain", config=granitemoe()),
    Configuration(
        name="granitemoeshared_top3", config=granitemoeshared(num_experts_per_tok=3, num_key_value_heads=4)
    ),
    Configuration(name="ernie4_5_moe_plain", config=ernie4_5_moe(num_hidden_layers=3)),
    Configuration(
        name="ernie4_5_moe_interval_least",
        config=ernie4_5_moe(
            moe_layer_interval=2,
            moe_layer_start_index=0,
            moe_norm_min=0.7,
            moe_num_shared_experts=0,
            num_hidden_layers=4,
            moe_num_experts=4,
            tie_word_embeddings=False,
        ),
    ),
)
