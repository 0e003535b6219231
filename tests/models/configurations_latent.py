"""The configurations of families with latent attention that have committed references."""

from __future__ import annotations

from tests.models.configuration import Configuration, yarn
from tests.models.tiny import respelt
from tests.models.tiny_latent import (
    axk1,
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    glm4_moe_lite,
    glm_moe_dsa,
    kimi_k2,
    kimi_k25,
    kimi_vl,
    mistral3,
    mistral4,
    sarvam_mla,
    yarn_of_all_dimensions,
)

_INDEXED = {
    "hidden_size": 24, "intermediate_size": 16, "kv_lora_rank": 14, "moe_intermediate_size": 7, "n_group": 2,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 13, "topk_group": 1, "v_head_dim": 9,
    "vocab_size": 60,
}  # fmt: skip

CONFIGURATIONS = (
    Configuration(
        name="deepseek_v2_lite",
        config=deepseek_v2(rope_scaling=yarn_of_all_dimensions(40.0, 16, mscale=0.707)),
    ),
    Configuration(
        name="deepseek_v2_groups",
        config=deepseek_v2(
            q_lora_rank=22,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=6.0,
        ),
    ),
    Configuration(
        name="deepseek_v2_tied_no_dense_layer_f32",
        config=deepseek_v2(
            tie_word_embeddings=True,
            first_k_dense_replace=0,
            num_hidden_layers=2,
            n_shared_experts=1,
            moe_intermediate_size=7,
            num_experts_per_tok=1,
            torch_dtype="float32",
            rope_scaling={"type": "linear", "factor": 3.0},
            kv_lora_rank=14,
            qk_nope_head_dim=8,
            v_head_dim=5,
            hidden_size=28,
        ),
        dtype="F32",
    ),
    Configuration(
        name="deepseek_v2_respelt_f16_sharded",
        config=respelt(
            deepseek_v2(
                q_lora_rank=9, torch_dtype="float16", n_group=None, topk_group=None, n_routed_experts=5
            ),
            theta=1e4,
            rope_type="yarn",
            **yarn(4.0, 24),
        ),
        dtype="F16",
        num_shards=2,
    ),
    Configuration(name="deepseek_v3_plain", config=deepseek_v3()),
    Configuration(
        name="deepseek_v3_halves_not_renormalised",
        config=deepseek_v3(
            rope_interleave=False,
            norm_topk_prob=False,
            q_lora_rank=None,
            rope_scaling=None,
            n_group=2,
            topk_group=1,
        ),
    ),
    Configuration(
        name="deepseek_v3_multi_token_prediction",
        config=deepseek_v3(
            num_nextn_predict_layers=1, num_hidden_layers=2, n_routed_experts=6, n_group=3, vocab_size=70
        ),
    ),
    Configuration(
        name="deepseek_v3_respelt_tied_f32",
        config=respelt(
            deepseek_v3(
                tie_word_embeddings=True,
                torch_dtype="float32",
                num_hidden_layers=2,
                n_routed_experts=6,
                n_group=3,
                num_attention_heads=5,
                num_key_value_heads=5,
                hidden_size=30,
                n_shared_experts=2,
                moe_intermediate_size=9,
                kv_lora_rank=17,
                head_dim=6,
                qk_head_dim=16,
                rope_interleave=True,
            ),
            theta=1e3,
            rope_type="yarn",
            **yarn(8.0, 32, mscale=0.8, mscale_all_dim=1.2),
        ),
        dtype="F32",
    ),
    Configuration(name="kimi_k2_plain", config=kimi_k2()),
    Configuration(
        name="kimi_k2_many_experts",
        config=kimi_k2(n_routed_experts=13, num_experts_per_tok=5, num_hidden_layers=2),
    ),
    Configuration(
        name="kimi_k25_wrapper", config=kimi_k25(rms_norm_eps=1e-5, v_head_dim=14, moe_intermediate_size=8)
    ),
    Configuration(
        name="kimi_k25_deepseek_text_sharded",
        config=kimi_k25(
            model_type="deepseek_v3",
            rope_scaling=None,
            num_experts_per_tok=1,
            first_k_dense_replace=0,
            num_hidden_layers=2,
        ),
        num_shards=2,
    ),
    Configuration(
        name="deepseek_v3_sarvam",
        config=sarvam_mla(
            num_attention_heads=3,
            num_key_value_heads=3,
            num_hidden_layers=2,
            vocab_size=72,
            hidden_size=26,
            n_routed_experts=5,
        ),
    ),
    Configuration(name="kimi_vl_wrapper", config=kimi_vl(v_head_dim=9, hidden_size=27, num_hidden_layers=2)),
    Configuration(
        name="axk1_as_released",
        config=axk1(
            hidden_size=29,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            vocab_size=61,
            num_attention_heads=3,
            num_key_value_heads=3,
        ),
    ),
    Configuration(
        name="axk1_bias_layer_types_tied",
        config=axk1(
            topk_method="noaux_tc",
            hidden_size=26,
            n_routed_experts=6,
            vocab_size=60,
            num_experts_per_tok=1,
            mlp_layer_types=["dense", "sparse"],
            num_hidden_layers=2,
            tie_word_embeddings=True,
            rope_scaling=yarn_of_all_dimensions(8.0, 16),
            rope_interleave=False,
            n_group=2,
            topk_group=1,
        ),
    ),
    Configuration(name="mistral4_plain", config=mistral4(num_hidden_layers=2)),
    Configuration(
        name="mistral4_groups_tied_f32",
        config=mistral4(
            num_hidden_layers=2,
            hidden_size=20,
            n_group=3,
            topk_group=2,
            tie_word_embeddings=True,
            first_k_dense_replace=0,
            routed_scaling_factor=1.7,
            n_shared_experts=2,
            moe_intermediate_size=5,
            rope_parameters={
                "attention_factor": 1.0,
                "factor": 4.0,
                "llama_4_scaling_beta": 0.2,
                "original_max_position_embeddings": 12,
                "partial_rotary_factor": 0.375,
                "rope_theta": 1000.0,
                "rope_type": "yarn",
            },
            vocab_size=50,
        ),
        dtype="F32",
    ),
    Configuration(name="mistral3_wrapper", config=mistral3(num_attention_heads=2, num_key_value_heads=2)),
    Configuration(name="glm4_moe_lite_plain", config=glm4_moe_lite()),
    Configuration(
        name="glm4_moe_lite_layer_types",
        config=respelt(
            {
                key: value
                for key, value in glm4_moe_lite(mlp_layer_types=["sparse", "dense", "sparse"]).items()
                if key not in ("first_k_dense_replace", "partial_rotary_factor")
            },
            theta=1e6,
        ),
    ),
    Configuration(
        name="glm4_moe_lite_multi_token_prediction_groups",
        config=glm4_moe_lite(
            num_nextn_predict_layers=1,
            num_hidden_layers=2,
            n_group=2,
            topk_group=1,
            n_routed_experts=6,
            vocab_size=60,
        ),
    ),
    Configuration(
        name="glm4_moe_lite_halves_yarn_tied",
        config=glm4_moe_lite(
            rope_interleave=False,
            norm_topk_prob=False,
            tie_word_embeddings=True,
            rope_scaling=yarn_of_all_dimensions(16.0, 16),
            rope_theta=1e4,
            q_lora_rank=None,
            eos_token_id=2,
        ),
    ),
    Configuration(name="deepseek_v32_plain", config=deepseek_v32(**_INDEXED)),
    Configuration(
        name="deepseek_v32_multi_token_prediction",
        config=deepseek_v32(
            **_INDEXED
            | {
                "index_head_dim": 6,
                "index_n_heads": 9,
                "index_topk": 13,
                "layer_types": ["indexed_attention"] * 2,
                "num_hidden_layers": 2,
                "num_nextn_predict_layers": 1,
                "rope_scaling": None,
            },
        ),
    ),
    Configuration(name="glm_moe_dsa_plain", config=glm_moe_dsa(**_INDEXED, index_skip_topk_offset=2)),
    Configuration(
        name="glm_moe_dsa_shared_types",
        config={
            key: value
            for key, value in glm_moe_dsa(
                **_INDEXED,
                indexer_types=["full", "shared", "shared"],
                index_topk=9,
                index_topk_freq=1,
                head_dim=6,
                mlp_layer_types=["sparse", "dense", "sparse"],
            ).items()
            if key != "first_k_dense_replace"
        },
    ),
)
