"""The configurations of Step-3.5 and 3.7."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_step import FULL, SLIDING, respelt, step3p5, step3p7

_OTHER = {"num_attention_heads": 3, "num_attention_groups": 3, "head_dim": 10, "true_head_dim": 10}

CONFIGURATIONS = (
    Configuration(name="step3p5_plain", config=step3p5()),
    Configuration(
        name="step3p7_respelt_bias",
        config=step3p7()
        | {
            "text_config": respelt(
                step3p5(
                    attention_bias=True,
                    attention_other_setting=_OTHER,
                    head_dim=10,
                    layer_types=[SLIDING, FULL, SLIDING],
                    moe_layers_enum="0,2",
                    moe_num_experts=6,
                    moe_router_scaling_factor=1.5,
                    moe_top_k=3,
                    num_attention_groups=3,
                    num_attention_heads=6,
                    num_hidden_layers=3,
                    num_nextn_predict_layers=0,
                    partial_rotary_factors=[1.0, 0.6, 1.0],
                    rope_scaling=None,
                    rope_theta=[300.0, 10000.0, 300.0],
                    sliding_window=9,
                    swiglu_limits=None,
                    swiglu_limits_shared=[0.03, 0.05, 0],
                    vocab_size=63,
                )
            )
        },
        num_shards=2,
    ),
)
