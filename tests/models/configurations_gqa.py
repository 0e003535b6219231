"""The configurations of families whose layers have two kinds of grouped-query attention."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_gqa import FULL, SLIDING, mimo_v2_flash

_RESPELT = mimo_v2_flash(
    attention_bias=True,
    attention_value_scale=None,
    head_dim=10,
    layer_types=[SLIDING, FULL, SLIDING],
    mlp_layer_types=["sparse", "dense", "sparse"],
    n_group=2,
    n_routed_experts=4,
    vocab_size=61,
    norm_topk_prob=False,
    num_attention_heads=6,
    num_key_value_heads=3,
    rms_norm_eps=1e-5,
    rope_parameters={
        FULL: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.6},
        SLIDING: {"rope_type": "default", "rope_theta": 3e2, "partial_rotary_factor": 1.0},
    },
    routed_scaling_factor=2.5,
    sliding_window=9,
    tie_word_embeddings=True,
    v_head_dim=13,
)
for _key in ("hybrid_layer_pattern", "layernorm_epsilon", "moe_layer_freq", "sliding_window_size"):
    del _RESPELT[_key]

CONFIGURATIONS = (
    Configuration(name="mimo_v2_flash_plain", config=mimo_v2_flash()),
    Configuration(name="mimo_v2_flash_respelt", config=_RESPELT),
)
