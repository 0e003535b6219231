"""Configurations of Gemma-4: heads, values and rotary embedding of its two kinds of layers in both spellings."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_gemma import gemma4
from tests.models.tiny_wrappers import without_text

_SLIDING, _FULL = "sliding_attention", "full_attention"

CONFIGURATIONS = (
    Configuration(name="gemma4_plain", config=gemma4()),
    # The last layer becomes full, and num_global_key_value_heads has no effect.
    Configuration(
        name="gemma4_own_values_default_pattern_f16_sharded",
        config=gemma4(
            attention_k_eq_v=False,
            dtype="float16",
            global_head_dim=12,
            layer_types=None,
            moe_intermediate_size=8,
            sliding_window=5,
            top_k_experts=1,
            use_bidirectional_attention=None,
        ),
        dtype="F16",
        num_shards=2,
    ),
    Configuration(
        name="gemma4_respelt_untied_no_cap_f32",
        config=without_text(
            gemma4(
                dtype="float32",
                final_logit_softcapping=None,
                hidden_size=20,
                intermediate_size=17,
                layer_types=[_FULL, _SLIDING, _FULL],
                moe_intermediate_size=9,
                num_attention_heads=6,
                num_experts=4,
                num_key_value_heads=3,
                per_layer_config={
                    "0": {"head_dim": 18, "num_key_value_heads": 2},
                    "2": {"head_dim": 18, "num_key_value_heads": 2},
                },
                tie_word_embeddings=False,
                top_k_experts=3,
                vocab_size=45,
            ),
            "global_head_dim",
            "num_global_key_value_heads",
        ),
        dtype="F32",
    ),
    Configuration(
        name="gemma4_all_full_scaled_rope",
        config=gemma4(
            layer_types=[_FULL, _FULL],
            num_hidden_layers=2,
            num_global_key_value_heads=4,
            rope_parameters={
                _FULL: {
                    "factor": 2.5,
                    "partial_rotary_factor": 0.6,
                    "rope_theta": 1e4,
                    "rope_type": "proportional",
                },
            },
            final_logit_softcapping=1.5,
        ),
    ),
)
