"""The tiny models that llama.cpp's own converter writes for `tests/oracle/test_converted.py`."""

from __future__ import annotations

from tests.models.configuration import yarn
from tests.models.configurations import CONFIGURATIONS
from tests.models.converted_latent import LATENT_CONVERTED
from tests.models.converted_recurrent import RECURRENT_CONVERTED
from tests.models.tiny import (
    RawConfig,
    glm4_moe,
    gpt_oss,
    minimax_m2,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    respelt,
)
from tests.models.tiny_cohere import cohere2_moe
from tests.models.tiny_dense import gemma3, gemma3_text, llama, qwen2, qwen3
from tests.models.tiny_flags import ernie4_5_moe, granitemoe, granitemoeshared
from tests.models.tiny_gemma import gemma4
from tests.models.tiny_gqa import mimo_v2_flash
from tests.models.tiny_grouped import bailing_moe, dots1, exaone_moe, hy_v3
from tests.models.tiny_hunyuan import hunyuan
from tests.models.tiny_llama4 import OF_GGUF, llama4, llama4_text
from tests.models.tiny_mamba import granitemoehybrid, nemotron_h, nemotron_h_puzzle, without_experts
from tests.models.tiny_minimax_m3 import minimax_m3
from tests.models.tiny_ministral import mistral_small_3, wrapped_ministral3
from tests.models.tiny_ocr import deepseek_vl_v2
from tests.models.tiny_step import FULL, SLIDING, step3p5, step3p7
from tests.models.tiny_windows import YARN, afmoe, laguna, mellum
from tests.models.tiny_wrappers import internvl, qwen3_omni_moe

_SLIDING, _FULL = "sliding_attention", "full_attention"
_OF_NAME = {one.name: one.config for one in CONFIGURATIONS}
# The architecture of a file, and the checkpoint's config.
CONVERTED: dict[str, tuple[str, RawConfig]] = {
    **LATENT_CONVERTED,
    **RECURRENT_CONVERTED,
    "mixtral_plain": ("llama", _OF_NAME["mixtral_plain"]),
    "mixtral_yarn": (
        "llama",
        mixtral(rope_scaling={"type": "yarn"} | yarn(8.0, 16), rope_theta=1e4, head_dim=16),
    ),
    "qwen2_moe_plain": ("qwen2moe", qwen2_moe(num_experts=8)),
    "qwen2_moe_renormalised": (
        "qwen2moe",
        qwen2_moe(
            moe_intermediate_size=9,
            norm_topk_prob=True,
            num_experts=5,
            num_experts_per_tok=5,
            num_key_value_heads=2,
            shared_expert_intermediate_size=17,
        ),
    ),
    # Where every expert is chosen, keys and values in 16 bits change no choice.
    "qwen3_moe_plain": ("qwen3moe", qwen3_moe(num_experts_per_tok=6)),
    "qwen3_moe_yarn_tied": (
        "qwen3moe",
        respelt(
            qwen3_moe(
                head_dim=12,
                moe_intermediate_size=7,
                num_attention_heads=6,
                num_experts=5,
                num_experts_per_tok=5,
                num_key_value_heads=3,
                tie_word_embeddings=True,
            ),
            theta=1e4,
            rope_type="yarn",
            **yarn(4.0, 24),
        ),
    ),
    # llama.cpp counts on a window in every second layer from the first, and clamps at 7.
    "gpt_oss_plain": ("gpt-oss", gpt_oss()),
    "gpt_oss_short_windows": (
        "gpt-oss",
        gpt_oss(
            head_dim=14,
            num_attention_heads=6,
            num_experts_per_tok=3,
            num_hidden_layers=4,
            num_key_value_heads=3,
            num_local_experts=3,
            sliding_window=5,
        ),
    ),
    "glm4_moe_plain": ("glm4moe", _OF_NAME["glm4_moe_plain"]),
    "glm4_moe_groups_tied": ("glm4moe", _OF_NAME["glm4_moe_groups_tied"]),
    "glm4_moe_qk_norm": (
        "glm4moe",
        glm4_moe(
            first_k_dense_replace=2,
            n_routed_experts=5,
            num_experts_per_tok=5,
            routed_scaling_factor=2.5,
            use_qk_norm=True,
        ),
    ),
    "glm4v_moe_plain": ("glm4moe", _OF_NAME["glm4v_moe_plain"]),
    "glm4v_moe_groups_tied": ("glm4moe", _OF_NAME["glm4v_moe_groups_scaled_tied_sharded"]),
    # llama.cpp does not renormalise, does not clamp, and wants as many heads of keys as of queries.
    "olmoe_plain": ("olmoe", _OF_NAME["olmoe_plain"]),
    "olmoe_narrow": (
        "olmoe",
        olmoe(
            hidden_size=24,
            intermediate_size=7,
            num_attention_heads=6,
            num_experts=5,
            num_experts_per_tok=5,
            num_key_value_heads=6,
        ),
    ),
    "minimax_m2_plain": ("minimax-m2", _OF_NAME["minimax_m2_plain"]),
    # All blocks are chosen: without flash attention, llama.cpp attends to all positions.
    "minimax_m3_plain": ("minimax-m3", minimax_m3(index={"sparse_topk_blocks": 8})),
    "minimax_m2_yarn": ("minimax-m2", _OF_NAME["minimax_m2_yarn_f32"]),
    "minimax_m2_all_turns": (
        "minimax-m2",
        minimax_m2(num_experts_per_tok=6, num_key_value_heads=1, rotary_dim=12),
    ),
    "granitemoe_plain": ("granitemoe", _OF_NAME["granitemoe_plain"]),
    "granitemoe_tied": (
        "granitemoe",
        granitemoe(hidden_size=24, num_experts_per_tok=6, num_key_value_heads=4, tie_word_embeddings=True),
    ),
    "granitemoeshared_plain": ("granitemoe", _OF_NAME["granitemoeshared_top3"]),
    "granitemoeshared_tied": (
        "granitemoe",
        granitemoeshared(
            num_experts_per_tok=6, num_key_value_heads=1, shared_intermediate_size=7, tie_word_embeddings=True
        ),
    ),
    # The converter takes the width of shared experts for that of dense layers divided by the heads of keys; llama.cpp
    # needs experts in every layer after the dense ones.
    "ernie4_5_moe_plain": ("ernie4_5-moe", ernie4_5_moe(intermediate_size=48, num_hidden_layers=3)),
    "ernie4_5_moe_one_shared": (
        "ernie4_5-moe",
        ernie4_5_moe(
            intermediate_size=12,
            moe_k=6,
            moe_layer_start_index=2,
            moe_num_shared_experts=1,
            num_hidden_layers=4,
            num_key_value_heads=1,
        ),
    ),
    "ernie4_5_moe_none_shared": (
        "ernie4_5-moe",
        ernie4_5_moe(
            moe_layer_start_index=2, moe_num_shared_experts=0, num_hidden_layers=3, tie_word_embeddings=False
        ),
    ),
    "mimo_v2_flash_plain": ("mimo2", mimo_v2_flash(sliding_window=40, sliding_window_size=40)),
    "mimo_v2_flash_every_expert": (
        "mimo2",
        mimo_v2_flash(
            head_dim=20,
            hybrid_layer_pattern=[0, 1, 1, 1],
            moe_layer_freq=[0, 1, 1, 1],
            n_routed_experts=4,
            num_experts_per_tok=4,
            num_hidden_layers=4,
            num_key_value_heads=2,
            sliding_window=40,
            sliding_window_size=40,
            v_head_dim=13,
        ),
    ),
    "mimo_v2_flash_windows": ("mimo2", mimo_v2_flash()),
    "step3p5_plain": ("step35", step3p5()),
    "step3p5_unlimited": (
        "step35",
        step3p5(
            attention_other_setting={
                "head_dim": 12,
                "num_attention_groups": 3,
                "num_attention_heads": 3,
                "true_head_dim": 12,
            },
            head_dim=12,
            layer_types=[FULL, SLIDING, FULL, SLIDING, SLIDING],
            moe_layers_enum="2,3",
            moe_top_k=5,
            num_attention_groups=3,
            num_attention_heads=6,
            partial_rotary_factors=[0.5, 1.0, 0.5, 1.0, 1.0],
            rope_scaling=None,
            rope_theta=[10000.0, 300.0, 10000.0, 300.0, 300.0],
            swiglu_limits=[0.0] * 5,
            swiglu_limits_shared=[0.0] * 5,
        ),
    ),
    "step3p7_plain": ("step35", step3p7()),
    "qwen3_vl_moe_plain": ("qwen3vlmoe", _OF_NAME["qwen3_vl_moe_plain"]),
    "qwen3_vl_moe_yarn": ("qwen3vlmoe", _OF_NAME["qwen3_vl_moe_yarn_f32"]),
    "qwen3_omni_moe_plain": ("qwen3vlmoe", _OF_NAME["qwen3_omni_moe_plain"]),
    "qwen3_omni_moe_tied": (
        "qwen3vlmoe",
        qwen3_omni_moe(num_experts_per_tok=3, num_key_value_heads=4, tie_word_embeddings=True),
    ),
    "internvl_plain": ("qwen3moe", _OF_NAME["internvl_plain"]),
    "internvl_tied": (
        "qwen3moe",
        internvl(
            hidden_size=28, num_experts=5, num_experts_per_tok=5, tie_word_embeddings=True, vocab_size=50
        ),
    ),
    # Every expert is chosen, as llama.cpp's table of gelu changes a choice here.
    "gemma4_plain": ("gemma4", gemma4(top_k_experts=6)),
    "gemma4_own_values": (
        "gemma4",
        gemma4(
            attention_k_eq_v=False,
            final_logit_softcapping=None,
            global_head_dim=16,
            head_dim=8,
            hidden_size=60,
            layer_types=[_FULL, _SLIDING, _SLIDING, _FULL],
            moe_intermediate_size=19,
            num_attention_heads=6,
            num_experts=9,
            num_global_key_value_heads=None,
            num_hidden_layers=4,
            num_key_value_heads=3,
            sliding_window=5,
            top_k_experts=4,
        ),
    ),
    "solar_open_plain": ("glm4moe", _OF_NAME["solar_open_plain"]),
    "solar_open_groups": ("glm4moe", _OF_NAME["solar_open_bias_groups_tied_f32"] | {"attention_bias": False}),
    # The converter refuses the released file's "noaux_tc", and llama.cpp other numbers of keys than of queries.
    "granitemoehybrid_plain": ("granitehybrid", granitemoehybrid()),
    "granitemoehybrid_groups": (
        "granitehybrid",
        granitemoehybrid(
            layer_types=["attention", "mamba", "mamba", "attention"],
            mamba_d_conv=3,
            mamba_d_head=14,
            mamba_n_groups=2,
            mamba_n_heads=4,
            num_experts_per_tok=3,
            num_hidden_layers=4,
            num_key_value_heads=2,
        ),
    ),
    # Without routed experts: with and without a Mamba-2 mixer.
    "granitemoehybrid_dense": ("granitehybrid", _OF_NAME["granitemoehybrid_dense"]),
    "granitemoehybrid_attention": (
        "granite",
        _OF_NAME["granitemoehybrid_dense_attention_alone"] | {"num_key_value_heads": 2, "hidden_size": 28},
    ),
    "granite_plain": ("granite", _OF_NAME["granite_plain"]),
    "granite_tied": ("granite", _OF_NAME["granite_bias_tied"] | {"attention_bias": False}),
    "qwen2_plain": ("qwen2", _OF_NAME["qwen2_plain"]),
    "qwen2_tied": ("qwen2", qwen2(tie_word_embeddings=True, num_key_value_heads=6)),
    # llama.cpp cannot run dense layers beside those with experts, nor mixers without a bias of the convolution; its
    # converter wants multiples of 64 channels.
    "nemotron_h_plain": ("nemotron_h_moe", nemotron_h(mamba_head_dim=16, mamba_num_heads=4)),
    "nemotron_h_puzzle": (
        "nemotron_h_moe",
        nemotron_h_puzzle("EM*EME", ((2, 10), (4, 17), (1, 26)), mamba_head_dim=16, mamba_num_heads=4),
    ),
    # Without experts, as models before Nemotron-3.
    "nemotron_h_dense": (
        "nemotron_h",
        without_experts(
            nemotron_h(
                hybrid_override_pattern="M-*-M-", mamba_head_dim=16, mamba_num_heads=4, num_hidden_layers=6
            )
        ),
    ),
    "nemotron_h_latent": (
        "nemotron_h_moe",
        nemotron_h(
            hybrid_override_pattern="M*EME",
            mamba_head_dim=32,
            moe_latent_size=12,
            n_groups=1,
            norm_topk_prob=False,
            num_key_value_heads=1,
            num_nextn_predict_layers=1,
            routed_scaling_factor=1.0,
        ),
    ),
    "dots1_plain": ("dots1", dots1(scoring_func="sigmoid", num_key_value_heads=4)),
    "dots1_dense": (
        "dots1",
        dots1(scoring_func="sigmoid", num_key_value_heads=4, first_k_dense_replace=2, n_shared_experts=1),
    ),
    "deepseek_vl_v2_plain": ("deepseek2-ocr", deepseek_vl_v2()),
    "deepseek_vl_v2_scaled": (
        "deepseek2-ocr",
        deepseek_vl_v2(
            first_k_dense_replace=2,
            n_shared_experts=1,
            num_attention_heads=4,
            num_experts_per_tok=3,
            num_key_value_heads=4,
            routed_scaling_factor=1.5,
        ),
    ),
    # llama.cpp sees heads that together are as wide as the hidden size, and no biases.
    "bailing_moe_plain": (
        "bailingmoe2",
        bailing_moe(hidden_size=32, head_dim=8, rotary_dim=4, num_nextn_predict_layers=0),
    ),
    "bailing_moe_one_group": (
        "bailingmoe2",
        bailing_moe(
            hidden_size=36,
            head_dim=6,
            partial_rotary_factor=1.0,
            num_attention_heads=6,
            num_key_value_heads=3,
            n_group=1,
            num_experts=5,
            num_experts_per_tok=3,
            first_k_dense_replace=2,
        ),
    ),
    # The converter refuses any alpha but 1000, and heads other than the hidden size divided by their number, 128.
    "hunyuan_v1_moe_unscaled": (
        "hunyuan-moe",
        hunyuan(rope_scaling=None, moe_topk=[5, 5, 5], head_dim=8, attention_head_dim=8, hidden_size=32),
    ),
    "hunyuan_v1_moe_alpha": (
        "hunyuan-moe",
        hunyuan(
            moe_topk=[3, 3],
            moe_intermediate_size=[9, 9],
            num_shared_expert=[1, 1],
            num_hidden_layers=2,
            head_dim=128,
            attention_head_dim=128,
            hidden_size=256,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32768,
            num_experts=3,
        ),
    ),
    "youtu_plain": ("deepseek2", _OF_NAME["youtu_plain"]),
    "exaone_moe_plain": ("exaone-moe", exaone_moe(num_experts_per_tok=5)),
    "exaone_moe_groups": (
        "exaone-moe",
        exaone_moe(
            n_group=3,
            topk_group=2,
            num_experts=6,
            num_experts_per_tok=3,
            head_dim=6,
            num_hidden_layers=4,
            layer_types=None,
            sliding_window_pattern=2,
            sliding_window=5,
            first_k_dense_replace=2,
        ),
    ),
    "cohere2_moe_plain": ("cohere2moe", cohere2_moe()),
    "cohere2_moe_layer_norm": (
        "cohere2moe",
        cohere2_moe(rms_norm_eps=None, num_shared_experts=2, norm_topk_prob=True, first_k_dense_replace=2),
    ),
    "hy_v3_plain": ("hy_v3", hy_v3(num_experts_per_tok=5)),
    "hy_v3_shared": ("hy_v3", hy_v3(num_shared_experts=2, num_experts_per_tok=3, head_dim=10)),
    # llama.cpp needs experts in every layer, and computes the attention factor.
    "mellum_plain": ("mellum", _OF_NAME["mellum_plain"]),
    "mellum_full_first": (
        "mellum",
        mellum(
            head_dim=16,
            layer_types=[_FULL, _SLIDING, _FULL],
            num_attention_heads=6,
            num_hidden_layers=3,
            num_key_value_heads=3,
            rope_parameters={
                _FULL: YARN | {"rope_theta": 1e4, "factor": 3.0, "original_max_position_embeddings": 40},
                _SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            },
            sliding_window=11,
        ),
    ),
    # llama.cpp always scales embeddings, and rotates three of four layers.
    "afmoe_plain": ("afmoe", _OF_NAME["afmoe_plain"]),
    "afmoe_dense": (
        "afmoe",
        afmoe(
            head_dim=16,
            hidden_size=28,
            num_attention_heads=6,
            num_dense_layers=2,
            num_experts_per_tok=3,
            num_hidden_layers=6,
            num_key_value_heads=3,
            num_shared_experts=2,
            sliding_window=11,
            tie_word_embeddings=True,
        ),
    ),
    # llama.cpp norms q and k unless there are 128 experts.
    "llama4_plain": ("llama4", llama4(**OF_GGUF)),
    "llama4_as_maverick": (
        "llama4",
        llama4_text(
            **OF_GGUF,
            num_local_experts=128,
            use_qk_norm=False,
            interleave_moe_layer_step=2,
            head_dim=10,
            rope_scaling=None,
            num_hidden_layers=6,
        ),
    ),
    # llama.cpp has no cap of a router's logits.
    "laguna_plain": ("laguna", _OF_NAME["laguna_plain"]),
    "laguna_elements": (
        "laguna",
        laguna(
            gating="per-element",
            gating_types=["per_element"] * 6,
            head_dim=16,
            mlp_layer_types=["dense", "dense", *["sparse"] * 4],
            mlp_only_layers=[0, 1],
            num_attention_heads_per_layer=[4, 2, 2, 8, 4, 2],
            num_hidden_layers=6,
            shared_expert_intermediate_size=11,
            sliding_window=11,
            tie_word_embeddings=True,
        ),
    ),
    "qwen3_plain": ("qwen3", _OF_NAME["qwen3_plain"]),
    "qwen3_tied": ("qwen3", qwen3(tie_word_embeddings=True, head_dim=14, num_key_value_heads=6)),
    "llama_plain": ("llama", _OF_NAME["llama_plain"]),
    "llama_tied": (
        "llama",
        llama(rope_scaling=None, tie_word_embeddings=True, head_dim=10, num_key_value_heads=3),
    ),
    "mistral_plain": ("llama", _OF_NAME["mistral_plain"]),
    "mistral_small_3": ("mistral3", mistral_small_3(head_dim=10)),
    "ministral3_plain": ("mistral3", _OF_NAME["ministral3_plain"]),
    "ministral3_tied": (
        "mistral3",
        wrapped_ministral3(num_key_value_heads=6, num_hidden_layers=2, tie_word_embeddings=True),
    ),
    # llama.cpp counts on every sixth layer to see all, and knows the factor of scores by the size of heads.
    "gemma3_text": (
        "gemma3",
        gemma3_text(num_hidden_layers=7, sliding_window_pattern=6, query_pre_attn_scalar=12),
    ),
    "gemma3_scaled": (
        "gemma3",
        gemma3(
            num_hidden_layers=6,
            sliding_window_pattern=6,
            query_pre_attn_scalar=8,
            head_dim=8,
            num_key_value_heads=3,
        ),
    ),
    "gemma4_respelt": ("gemma4", _OF_NAME["gemma4_respelt_untied_no_cap_f32"]),
}
# Why llama.cpp's logits are others than those of transformers and of Argosy.
LLAMA_CPP_DIFFERS = {
    "deepseek_v2_groups": "llama.cpp scores a group by its two best experts, DeepSeek-V2 by its best",
    "mistral3_stretched": "llama.cpp multiplies scores by yarn's magnitude (`mistral4.py`)",
    "mimo_v2_flash_windows": "llama.cpp's windows are a position shorter (`mimo_v2_flash.py`)",
}
