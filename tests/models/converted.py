"""The tiny models that llama.cpp's own converter writes for `tests/oracle/test_converted.py`."""

from __future__ import annotations

from tests.models.configurations import CONFIGURATIONS
from tests.models.tiny import RawConfig
from tests.models.tiny_cohere import cohere2_moe
from tests.models.tiny_dense import gemma3, gemma3_text, llama, qwen3
from tests.models.tiny_gemma import gemma4
from tests.models.tiny_grouped import bailing_moe, dots1, exaone_moe, hy_v3
from tests.models.tiny_hunyuan import hunyuan
from tests.models.tiny_llama4 import OF_GGUF, llama4, llama4_text
from tests.models.tiny_mamba import granitemoehybrid, nemotron_h
from tests.models.tiny_ocr import deepseek_vl_v2
from tests.models.tiny_windows import YARN, afmoe, laguna, mellum

_SLIDING, _FULL = "sliding_attention", "full_attention"
_OF_NAME = {one.name: one.config for one in CONFIGURATIONS}
# The architecture of a file, and the checkpoint's config.
CONVERTED: dict[str, tuple[str, RawConfig]] = {
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
    # llama.cpp cannot run dense layers beside those with experts, nor mixers without a bias of the convolution; its
    # converter wants multiples of 64 channels.
    "nemotron_h_plain": ("nemotron_h_moe", nemotron_h(mamba_head_dim=16, mamba_num_heads=4)),
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
