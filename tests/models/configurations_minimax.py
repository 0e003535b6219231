"""The configurations of MiniMax-M3; those of the older models are in other files."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_minimax_m3 import minimax_m3

CONFIGURATIONS = (
    Configuration(name="minimax_m3_plain", config=minimax_m3()),
    Configuration(
        name="minimax_m3_local_tied_f32",
        config=minimax_m3(
            head_dim=6,
            hidden_size=20,
            index={"sparse_index_dim": 8, "sparse_local_block": 2, "sparse_topk_blocks": 3},
            num_attention_heads=9,
            num_experts_per_tok=3,
            num_key_value_heads=3,
            partial_rotary_factor=1.0,
            rotary_dim=6,
            shared_intermediate_size=5,
            sparse_layers=[1, 1],
            num_hidden_layers=2,
            swiglu_alpha=1.1,
            swiglu_limit=0.8,
            tie_word_embeddings=True,
        ),
        dtype="F32",
    ),
    Configuration(
        name="minimax_m3_one_head_sharded",
        config=minimax_m3(
            index={"sparse_block_size": 32, "sparse_topk_blocks": 1},
            num_attention_heads=5,
            num_key_value_heads=1,
            num_local_experts=4,
            routed_scaling_factor=1.0,
            sparse_layers=[0, 0, 1],
        ),
        num_shards=2,
    ),
)
