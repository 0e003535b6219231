"""Configurations of Hunyuan-A13B."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_hunyuan import hunyuan

_ONE_NUMBER = hunyuan(
    attention_bias=True,
    head_dim=6,
    hidden_size=20,
    intermediate_size=11,
    moe_topk=3,
    num_attention_heads=6,
    num_experts=6,
    num_hidden_layers=2,
    num_key_value_heads=3,
    rope_parameters={"rope_theta": 300.0, "rope_type": "default"},
    tie_word_embeddings=False,
)
for _key in (
    *("attention_head_dim", "moe_intermediate_size", "num_shared_expert", "rope_scaling", "rope_theta"),
    *("norm_topk_prob", "routed_scaling_factor", "use_qk_norm"),
):
    del _ONE_NUMBER[_key]

CONFIGURATIONS = (
    Configuration(name="hunyuan_v1_moe_plain", config=hunyuan()),
    Configuration(name="hunyuan_v1_moe_bias_unscaled_sharded", config=_ONE_NUMBER, num_shards=2),
)
