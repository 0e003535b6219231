"""Configurations of Flint and Lara-4-Mini."""

from __future__ import annotations

from tests.models.configuration import Configuration, yarn
from tests.models.tiny_flint import DELTA, FULL, SLIDING, flint, lara_mini

_LINEAR = {"rope_theta": 300.0, "rope_type": "linear", "factor": 2.0}
_SMALL = {"head_dim": 6, "hidden_size": 26, "num_attention_heads": 6, "num_key_value_heads": 3}

CONFIGURATIONS = (
    Configuration(name="flint_plain", config=flint(no_rope_layer_indices=[0, 1, 4])),
    Configuration(
        name="flint_bias_tied_every_second_f16",
        config=flint(
            **_SMALL,
            attention_bias=True,
            decoder_sparse_step=2,
            dtype="float16",
            layer_types=[SLIDING, FULL, SLIDING, SLIDING],
            mlp_only_layers=[],
            norm_topk_prob=False,
            num_experts_per_tok=3,
            num_hidden_layers=4,
            rope_parameters=_LINEAR,
            tie_word_embeddings=True,
        ),
        dtype="F16",
    ),
    Configuration(
        name="flint_default_layers_sharded",
        config={
            key: value
            for key, value in flint(num_experts=4, sliding_window=5).items()
            if key not in ("layer_types", "mlp_only_layers")
        },
        num_shards=2,
    ),
    Configuration(
        name="flint_windows_top1_yarn_f32",
        config=flint(
            dtype="float32",
            layer_types=[SLIDING] * 2,
            mlp_only_layers=[0],
            num_experts_per_tok=1,
            num_hidden_layers=2,
            num_key_value_heads=1,
            rope_parameters={"rope_theta": 1e4, "rope_type": "yarn"} | yarn(4.0, 16),
            sliding_window=9,
        ),
        dtype="F32",
    ),
    Configuration(name="lara_mini_plain", config=lara_mini(num_experts=6)),
    Configuration(
        name="lara_mini_bias_untied_f16",
        config=lara_mini(
            **_SMALL,
            attention_bias=True,
            dtype="float16",
            layer_types=[SLIDING, DELTA, FULL],
            linear_conv_kernel_dim=3,
            linear_num_key_heads=3,
            linear_num_value_heads=3,
            norm_topk_prob=False,
            num_experts_per_tok=3,
            num_hidden_layers=3,
            rope_parameters=_LINEAR,
            tie_word_embeddings=False,
        ),
        dtype="F16",
    ),
    Configuration(
        name="lara_mini_default_layers_sharded",
        config={key: value for key, value in lara_mini(sliding_window=5).items() if key != "layer_types"},
        num_shards=2,
    ),
    Configuration(
        name="lara_mini_delta_top1_f32",
        config=lara_mini(
            dtype="float32",
            layer_types=[DELTA, DELTA, SLIDING],
            linear_key_head_dim=17,
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            linear_value_head_dim=15,
            num_experts_per_tok=1,
            num_hidden_layers=3,
            rope_parameters={"rope_theta": 1e4, "rope_type": "yarn"} | yarn(4.0, 16),
        ),
        dtype="F32",
    ),
)
