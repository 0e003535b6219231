"""The tiny models with latent attention that llama.cpp's own converter writes for `tests/oracle/test_converted.py`."""

from __future__ import annotations

from typing import Any

from tests.models.configurations_latent import CONFIGURATIONS
from tests.models.tiny import RawConfig
from tests.models.tiny_hy4 import hy_v4
from tests.models.tiny_latent import (
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    glm4_moe_lite,
    glm_moe_dsa,
    kimi_vl,
    mistral3,
    mistral4,
    yarn_of_all_dimensions,
)

_OF_NAME = {one.name: one.config for one in CONFIGURATIONS}
# So many heads that few scores are zero: at equal scores, torch chooses any position.
_INDEXED: dict[str, Any] = {
    "index_head_dim": 128, "index_n_heads": 16, "index_topk": 12, "qk_nope_head_dim": 16, "qk_rope_head_dim": 32,
}  # fmt: skip


_HY4: dict[str, Any] = {"head_dim": 32, "qk_head_dim": 48}


def _mistral_rope(factor: float) -> RawConfig:
    """The converter leaves out how much queries grow, which is 0.1 in the released model."""
    changes = {"factor": factor, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
    rope: RawConfig = mistral4()["rope_parameters"] | changes
    return rope


LATENT_CONVERTED: dict[str, tuple[str, RawConfig]] = {
    # llama.cpp takes a model for one without a rank of queries if it has 26 or 27 layers.
    "deepseek_v2_lite": (
        "deepseek2",
        deepseek_v2(
            rope_scaling=yarn_of_all_dimensions(40.0, 16, mscale=0.707), num_hidden_layers=27, num_experts_per_tok=8
        ),
    ),
    "deepseek_v2_query_rank": (
        "deepseek2",
        deepseek_v2(
            first_k_dense_replace=2,
            n_shared_experts=1,
            num_experts_per_tok=8,
            q_lora_rank=22,
            routed_scaling_factor=16.0,
        ),
    ),
    "deepseek_v2_groups": ("deepseek2", _OF_NAME["deepseek_v2_groups"]),
    "deepseek_v3_plain": ("deepseek2", _OF_NAME["deepseek_v3_plain"]),
    "deepseek_v3_multi_token_prediction": (
        "deepseek2",
        deepseek_v3(
            first_k_dense_replace=0,
            n_group=1,
            n_routed_experts=6,
            n_shared_experts=2,
            norm_topk_prob=False,
            num_experts_per_tok=6,
            num_hidden_layers=2,
            num_nextn_predict_layers=1,
            topk_group=1,
            vocab_size=70,
        ),
    ),
    "kimi_k2_plain": ("deepseek2", _OF_NAME["kimi_k2_plain"]),
    "kimi_k2_many_experts": ("deepseek2", _OF_NAME["kimi_k2_many_experts"]),
    "kimi_k25_wrapper": ("deepseek2", _OF_NAME["kimi_k25_wrapper"]),
    "kimi_k25_deepseek_text": ("deepseek2", _OF_NAME["kimi_k25_deepseek_text_sharded"]),
    "kimi_vl_plain": ("deepseek2", kimi_vl(num_experts_per_tok=8, num_hidden_layers=27)),
    "kimi_vl_dense_layers": (
        "deepseek2",
        kimi_vl(
            first_k_dense_replace=2,
            hidden_size=26,
            n_routed_experts=5,
            n_shared_experts=1,
            num_experts_per_tok=5,
            num_hidden_layers=26,
            v_head_dim=9,
        ),
    ),
    # The converter knows this text model inside Mistral3ForConditionalGeneration alone.
    "mistral3_plain": ("mistral4", mistral3(rope_parameters=_mistral_rope(1.0))),
    "mistral3_groups": (
        "mistral4",
        mistral3(
            first_k_dense_replace=0,
            n_group=3,
            n_shared_experts=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            rope_parameters=_mistral_rope(1.0),
            topk_group=2,
        ),
    ),
    "mistral3_stretched": ("mistral4", mistral3(rope_parameters=_mistral_rope(16.0))),
    # The converter leaves out that scores are sigmoids, which llama.cpp knows by the number of layers and tokens.
    "glm4_moe_lite_plain": (
        "deepseek2",
        glm4_moe_lite(
            hidden_size=16, n_routed_experts=6, num_experts_per_tok=6, num_hidden_layers=47, vocab_size=154_880
        ),
    ),
    "deepseek_v32_plain": ("deepseek32", deepseek_v32(**_INDEXED)),
    "deepseek_v32_multi_token_prediction": (
        "deepseek32",
        deepseek_v32(
            **_INDEXED | {"index_n_heads": 17, "index_topk": 40},
            num_experts_per_tok=4,
            num_hidden_layers=2,
            num_nextn_predict_layers=1,
            rope_scaling=None,
        ),
    ),
    "glm_moe_dsa_shared": (
        "glm-dsa",
        glm_moe_dsa(
            **_INDEXED,
            head_dim=32,
            indexer_types=["full", "full", "shared", "full"],
            num_hidden_layers=4,
            qk_head_dim=48,
        ),
    ),
    "glm_moe_dsa_all_own": (
        "glm-dsa",
        glm_moe_dsa(
            **_INDEXED | {"index_n_heads": 13, "index_topk": 20},
            head_dim=32,
            index_topk_freq=1,
            num_experts_per_tok=6,
            qk_head_dim=48,
        ),
    ),
    "hy_v4_plain": ("hy_v4", hy_v4(**_INDEXED, **_HY4)),
    "hy_v4_two_streams": (
        "hy_v4",
        hy_v4(
            **_INDEXED | {"index_n_heads": 17, "index_topk": 40}, **_HY4 | {"hc_magnitude": 1.3, "hc_mult": 2},
            indexer_types=["full"] * 3, mlp_layer_types=["dense", "dense", "sparse"], n_shared_experts=2,
        ),
    ),
}  # fmt: skip
