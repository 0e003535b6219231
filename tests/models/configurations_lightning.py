"""The configurations of families with lightning attention."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_minimax import minimax

CONFIGURATIONS = (
    Configuration(name="minimax_plain", config=minimax()),
    Configuration(
        name="minimax_factors_tied_f32_sharded",
        config=minimax(
            dtype="float32",
            layer_types=["full_attention", "linear_attention", "full_attention"],
            num_attention_heads=8,
            num_key_value_heads=1,
            head_dim=4,
            hidden_size=20,
            intermediate_size=5,
            num_local_experts=4,
            num_experts_per_tok=3,
            tie_word_embeddings=True,
            rms_norm_eps=1e-3,
            vocab_size=60,
            **{f"{block}_alpha_factor": 0.8 for block in ("full_attn", "linear_attn", "mlp")},
            **{f"{block}_beta_factor": 1.3 for block in ("full_attn", "linear_attn", "mlp")},
        ),
        dtype="F32",
        num_shards=2,
    ),
)
