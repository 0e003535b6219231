"""The configurations of families with Mamba-2 mixers."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_mamba import granitemoehybrid, nemotron_h, nemotron_h_puzzle

CONFIGURATIONS = (
    Configuration(name="granitemoehybrid_plain", config=granitemoehybrid()),
    Configuration(
        name="granitemoehybrid_rope_biases_groups",
        config=granitemoehybrid(
            attention_bias=True,
            hidden_size=24,
            layer_types=["full_attention", "linear_attention", "linear_attention", "attention"],
            mamba_conv_bias=False,
            mamba_d_conv=3,
            mamba_d_head="auto",
            mamba_n_groups=2,
            mamba_n_heads=4,
            mamba_proj_bias=True,
            num_attention_heads=4,
            num_experts_per_tok=3,
            num_hidden_layers=4,
            num_key_value_heads=2,
            position_embedding_type="rope",
            tie_word_embeddings=False,
            vocab_size=60,
        ),
    ),
    Configuration(
        name="granitemoehybrid_dense",
        config=granitemoehybrid(num_experts_per_tok=0, num_local_experts=0, intermediate_size=11),
    ),
    Configuration(
        name="granitemoehybrid_dense_attention_alone",
        config=granitemoehybrid(
            layer_types=["attention"] * 2,
            num_experts_per_tok=0,
            num_hidden_layers=2,
            num_local_experts=0,
            intermediate_size=15,
            shared_intermediate_size=15,
            position_embedding_type="rope",
        ),
    ),
    Configuration(name="nemotron_h_plain", config=nemotron_h()),
    Configuration(
        name="nemotron_h_latent_dense_biases_groups",
        config=nemotron_h(
            hidden_size=26,
            hybrid_override_pattern="-M*EME",
            layer_norm_epsilon=1e-4,
            mamba_num_heads=5,
            moe_latent_size=14,
            n_group=2,
            n_groups=1,
            norm_eps=1e-4,
            norm_topk_prob=False,
            num_attention_heads=3,
            num_hidden_layers=6,
            num_key_value_heads=1,
            routed_scaling_factor=1.0,
            use_bias=True,
            use_conv_bias=False,
            vocab_size=60,
        ),
    ),
    Configuration(name="nemotron_h_puzzle_plain", config=nemotron_h_puzzle()),
    Configuration(
        name="nemotron_h_puzzle_groups_dense",
        config=nemotron_h_puzzle(
            "E-M*EE",
            ((2, 13), (3, 6), (1, 9)),
            hidden_size=26,
            moe_latent_size=None,
            n_group=2,
            n_routed_experts=8,
            num_attention_heads=3,
            num_key_value_heads=1,
            vocab_size=60,
        ),
    ),
)
