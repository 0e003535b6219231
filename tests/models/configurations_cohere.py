"""The configurations of Cohere's mixtures."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_cohere import cohere2_moe

CONFIGURATIONS = (
    Configuration(name="cohere2_moe_plain", config=cohere2_moe()),
    Configuration(
        name="cohere2_moe_layer_norm_softmax_sum",
        config=cohere2_moe(
            attention_bias=True,
            expert_selection_fn="softmax",
            first_k_dense_replace=2,
            head_dim=10,
            hidden_size=24,
            intermediate_size=7,
            layer_types=None,
            logit_scale=0.5,
            norm_topk_prob=True,
            num_attention_heads=3,
            num_experts=6,
            num_experts_per_tok=3,
            num_hidden_layers=5,
            num_key_value_heads=1,
            num_shared_experts=2,
            prefix_dense_sliding_window_pattern=2,
            rms_norm_eps=None,
            rope_theta=300.0,
            shared_expert_combination_strategy="sum",
            sliding_window_pattern=3,
            sliding_window=9,
            tie_word_embeddings=False,
        ),
    ),
)
