"""The configurations of DeepSeek-V4."""

from __future__ import annotations

from typing import Any

from tests.models.configuration import Configuration
from tests.models.tiny import RawConfig
from tests.models.tiny_deepseek_v4 import deepseek_v4


def small(**changes: Any) -> RawConfig:
    sizes: RawConfig = {
        "hidden_size": 18,
        "head_dim": 12,
        "qk_rope_head_dim": 4,
        "q_lora_rank": 16,
        "o_lora_rank": 8,
        "moe_intermediate_size": 8,
        "n_routed_experts": 5,
        "num_hidden_layers": 3,
        "compress_ratios": [128, 4, 0],
        "index_head_dim": 8,
        "vocab_size": 48,
    }
    return deepseek_v4(**sizes | changes)


CONFIGURATIONS = (
    Configuration(name="deepseek_v4_plain", config=small()),
    Configuration(
        name="deepseek_v4_all_entries_f16",
        config=small(
            compress_ratios=[4, 4],
            hc_mult=3,
            hc_sinkhorn_iters=3,
            index_topk=500,
            num_hash_layers=0,
            num_hidden_layers=2,
            o_groups=1,
            routed_scaling_factor=2.5,
            swiglu_limit=0.5,
        ),
        dtype="F16",
    ),
    Configuration(
        name="deepseek_v4_windows_f32_sharded",
        config=small(
            compress_ratios=[0, 0],
            hc_mult=2,
            head_dim=10,
            n_routed_experts=6,
            num_attention_heads=3,
            num_experts_per_tok=3,
            num_hash_layers=1,
            num_hidden_layers=2,
            o_groups=3,
            sliding_window=17,
        ),
        dtype="F32",
        num_shards=2,
    ),
    Configuration(
        name="deepseek_v4_experts_of_tokens",
        config=small(
            compress_ratios=[4, 128],
            compress_rope_theta=40_000.0,
            hc_mult=3,
            index_n_heads=6,
            num_experts_per_tok=1,
            num_hash_layers=2,
            num_hidden_layers=2,
            o_groups=4,
            qk_rope_head_dim=8,
            rms_norm_eps=1e-4,
            rope_scaling=deepseek_v4()["rope_scaling"] | {"factor": 4, "beta_fast": 16, "beta_slow": 2},
        ),
    ),
)
