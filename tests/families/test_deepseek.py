"""config.json of the families with latent attention: DeepSeek-V2, V3 and R1, Kimi-K2 and K2.5, GLM-4.7-Flash."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from argosy.budget.footprint import kv_bytes
from argosy.checkpoint.geometry import count_parameters
from argosy.config import LatentConfig, ModelConfig, RopeConfig, RouterConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES
from tests.families.hub_configs import (
    DEEPSEEK_R1,
    DEEPSEEK_V2,
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    GLM_4_7_FLASH,
    KIMI_K2,
    KIMI_K25,
    RELEASED,
    RawConfig,
)


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES[raw["model_type"]].parse_config(raw)


def within_text(**changes: Any) -> RawConfig:
    return KIMI_K25 | {"text_config": KIMI_K25["text_config"] | changes}


def expected_router(num_groups: int, kept_groups: int, scale: float) -> RouterConfig:
    return RouterConfig(
        score="sigmoid", has_choice_bias=True, num_groups=num_groups, kept_groups=kept_groups, group_score="top2",
        renormalize=True, renormalize_eps=1e-20, scale=scale,
    )  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_is_read_as_latent_attention_with_dense_layers_first(name: str) -> None:
    config = parse(RELEASED[name])
    text = RELEASED[name].get("text_config", RELEASED[name])
    first = text["first_k_dense_replace"]
    assert [layer.is_moe for layer in config.layers] == [
        layer >= first for layer in range(text["num_hidden_layers"])
    ]
    assert config.latent is not None
    without_index = config.with_mixers(LatentConfig, index=None)
    assert {layer.mixer for layer in without_index.layers} == {replace(config.latent, index=None)}
    assert replace(config.latent, scale=0.0, index=None) == LatentConfig(
        num_heads=text["num_attention_heads"], rope=config.latent.rope,
        query_rank=text["q_lora_rank"] or 0, kv_rank=512, nope_dim=text["qk_nope_head_dim"], rope_dim=64,
        value_dim=text["v_head_dim"], norm_eps=1e-6,
    )  # fmt: skip
    assert config.latent.rope.rotary_dim == 64
    assert config.latent.rope.is_interleaved
    assert config.latent.head_dim == text["qk_nope_head_dim"] + 64
    assert config.shared_width == text["n_shared_experts"] * text["moe_intermediate_size"]
    assert (config.dense_width, config.expert_width) == (
        text["intermediate_size"],
        text["moe_intermediate_size"],
    )
    assert config.num_mtp_layers == text.get("num_nextn_predict_layers", 0)
    assert (config.norm_eps, config.vocab_size) == (text["rms_norm_eps"], text["vocab_size"])
    assert not config.is_embedding_tied


def test_routers() -> None:
    assert parse(DEEPSEEK_V2_LITE).router == RouterConfig(
        score="softmax", group_score="max", renormalize=False, scale=1.0
    )
    assert parse(DEEPSEEK_V2).router == RouterConfig(
        score="softmax", num_groups=8, kept_groups=3, group_score="max", renormalize=False, scale=16.0
    )
    assert parse(DEEPSEEK_V2 | {"topk_method": "greedy"}).router.num_groups == 1
    assert parse(DEEPSEEK_V3).router == parse(DEEPSEEK_R1).router == expected_router(8, 4, 2.5)
    assert parse(KIMI_K2).router == parse(KIMI_K25).router == expected_router(1, 1, 2.827)
    assert parse(GLM_4_7_FLASH).router == expected_router(1, 1, 1.8)
    plain = parse(DEEPSEEK_V3 | {"norm_topk_prob": False}).router
    assert (plain.renormalize, plain.renormalize_eps) == (False, 0.0)


def test_yarn_s_mscale_all_dim_is_squared_into_the_attention_scale() -> None:
    def scale_of(raw: RawConfig) -> float:
        latent = parse(raw).latent
        assert latent is not None
        return latent.scale * math.sqrt(latent.head_dim)

    assert scale_of(DEEPSEEK_V3) == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert scale_of(DEEPSEEK_V2_LITE) == pytest.approx((0.0707 * math.log(40) + 1) ** 2)
    assert scale_of(KIMI_K25) == pytest.approx((0.1 * math.log(64) + 1) ** 2)
    assert scale_of(GLM_4_7_FLASH) == pytest.approx(1.0)
    without = {key: value for key, value in DEEPSEEK_V3["rope_scaling"].items() if "mscale" not in key}
    assert scale_of(DEEPSEEK_V3 | {"rope_scaling": without}) == pytest.approx(1.0)


def test_rope_is_yarn_over_the_rotary_dimensions() -> None:
    assert parse(DEEPSEEK_V3).ropes[0] == RopeConfig(
        theta=1e4, rotary_dim=64, is_interleaved=True, kind="yarn", factor=40.0, original_context=4096,
        mscale=1.0, mscale_all_dim=1.0,
    )  # fmt: skip
    assert not parse(DEEPSEEK_V3 | {"rope_interleave": False}).ropes[0].is_interleaved
    assert parse(GLM_4_7_FLASH).ropes[0].kind == "default"


def test_the_keys_of_transformers_5_mean_the_same() -> None:
    for raw in (DEEPSEEK_V2, DEEPSEEK_V3, GLM_4_7_FLASH):
        head_dim = raw["qk_nope_head_dim"] + 64
        written = {
            "head_dim": 64,
            "qk_head_dim": head_dim,
            "output_router_logits": False,
            "pad_token_id": None,
        }
        assert parse(raw | written) == parse(raw)
    layers = ["dense"] + ["sparse"] * 46
    assert parse(GLM_4_7_FLASH | {"mlp_layer_types": layers}) == parse(GLM_4_7_FLASH)
    alternating = ["dense", "sparse"] * 23 + ["sparse"]
    raw = {key: value for key, value in GLM_4_7_FLASH.items() if key != "first_k_dense_replace"}
    assert [layer.is_moe for layer in parse(raw | {"mlp_layer_types": alternating}).layers] == [
        kind == "sparse" for kind in alternating
    ]
    assert parse(within_text(model_type="deepseek_v3")) == parse(KIMI_K25)


def test_a_wrapper_s_text_config_is_the_model_and_the_wrapper_decides_its_tokens() -> None:
    config = parse(KIMI_K25)
    assert (config.family, config.num_experts, config.num_layers) == ("kimi_k25", 384, 61)
    assert parse(KIMI_K25 | {"eos_token_id": [5, 6]}).eos_ids == (5, 6)
    absent = {key: value for key, value in KIMI_K25.items() if key != "eos_token_id"}
    assert parse(absent).eos_ids == (163585,)


def test_an_absent_key_has_the_default_of_the_family_s_config_class() -> None:
    v2 = parse({"model_type": "deepseek_v2", "num_experts_per_tok": 6})
    assert (v2.num_layers, v2.expert_width, v2.shared_width, v2.router.scale) == (32, 1407, 2814, 1.0)
    assert v2.layers[0].is_moe
    v3 = parse({"model_type": "deepseek_v3"})
    assert (v3.num_layers, v3.num_experts, v3.context_tokens, v3.num_mtp_layers) == (61, 256, 4096, 1)
    assert v3.router == expected_router(8, 4, 2.5)
    glm = parse({"model_type": "glm4_moe_lite"})
    assert (
        glm.num_layers,
        glm.latent and glm.latent.num_heads,
        glm.latent and glm.latent.value_dim,
        glm.norm_eps,
    ) == (
        47,
        20,
        256,
        1e-5,
    )
    with pytest.raises(CheckpointError, match="num_experts_per_tok is null"):
        parse({"model_type": "deepseek_v2"})


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (DEEPSEEK_V3 | {"scoring_func": "sqrtsoftplus"}, "scoring_func 'sqrtsoftplus'; supported: sigmoid"),
        (DEEPSEEK_V3 | {"scoring_func": "softmax"}, "scoring_func 'softmax'; supported: sigmoid"),
        (DEEPSEEK_V3 | {"topk_method": "greedy"}, "topk_method 'greedy'; supported: noaux_tc"),
        (
            DEEPSEEK_V2 | {"topk_method": "noaux_tc"},
            "topk_method 'noaux_tc'; supported: greedy, group_limited",
        ),
        (DEEPSEEK_V2 | {"norm_topk_prob": True}, "norm_topk_prob true; supported: false"),
        (DEEPSEEK_V2 | {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'; supported: softmax"),
        (DEEPSEEK_V2 | {"rope_interleave": False}, "rope_interleave false; supported: true"),
        (DEEPSEEK_V3 | {"attention_bias": True}, "attention_bias true; supported: false"),
        (DEEPSEEK_V3 | {"moe_layer_freq": 2}, "moe_layer_freq 2; supported: 1"),
        (
            DEEPSEEK_V3 | {"index_topk": 2048},
            "sets index_topk to 2048, but deepseek_v3 does not know this key",
        ),
        (KIMI_K2 | {"hidden_act": "situ"}, "hidden_act 'situ'; supported: silu"),
        (GLM_4_7_FLASH | {"rope_scaling": {"type": "mrope"}}, "type mrope; supported: default"),
        (
            KIMI_K25 | {"speech_config": {}},
            "config.json sets speech_config to {}, but kimi_k25 does not know",
        ),
        (
            within_text(index_topk=4),
            "config.json: text_config sets index_topk to 4, but kimi_k25 does not know",
        ),
        (
            within_text(model_type="kimi_linear"),
            "text_config asks for model_type 'kimi_linear'; supported: kimi_k2",
        ),
    ],
)
def test_unsupported_features_are_refused_by_name(raw: RawConfig, sentence: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        parse(raw)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (
            DEEPSEEK_V3 | {"n_group": 7},
            "256 experts in 7 groups, 4 of them kept; expected groups of equal size",
        ),
        (DEEPSEEK_V3 | {"topk_group": None}, "topk_group is null; expected a whole number"),
        (DEEPSEEK_V2 | {"topk_group": None}, "topk_group is null; expected a whole number"),
        (DEEPSEEK_V2 | {"n_group": None}, "n_group is null; expected a whole number"),
        (
            DEEPSEEK_V3 | {"topk_group": 9},
            "256 experts in 8 groups, 9 of them kept; expected no more than all groups",
        ),
        (DEEPSEEK_V3 | {"n_group": 64, "topk_group": 1}, "room for the 8 experts of a token in the kept"),
        (DEEPSEEK_V3 | {"n_group": 256, "topk_group": 8}, "a group is scored by its best two experts"),
        (DEEPSEEK_V3 | {"num_key_value_heads": 8}, "num_key_value_heads as 8, expected 128"),
        (DEEPSEEK_V3 | {"first_k_dense_replace": 61}, "none of the 61 layers with routed experts"),
        (DEEPSEEK_V3 | {"head_dim": 128}, "head_dim 128; supported: 64 or 192 or 576 or null"),
        (DEEPSEEK_V3 | {"qk_head_dim": 64}, "qk_head_dim 64; supported: 192"),
        (DEEPSEEK_V3 | {"qk_rope_head_dim": 63}, "rotary embedding needs an even number"),
        (GLM_4_7_FLASH | {"mlp_layer_types": ["sparse"] * 47}, "gives the dense layers twice"),
        (GLM_4_7_FLASH | {"mlp_layer_types": ["sparse"] * 46}, "mlp_layer_types has 46 entries, expected"),
        (KIMI_K25 | {"text_config": None}, "text_config is null; expected an object"),
    ],
)
def test_contradictions_are_refused(raw: RawConfig, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(raw)
    assert sentence in str(caught.value)


# Billions of parameters without multi-token prediction layers, and KV cache elements per position.
PUBLISHED = {
    "DeepSeek-V2-Lite": (15.7, 27 * 576),
    "DeepSeek-V2": (235.7, 60 * 576),
    "DeepSeek-V3": (671.0, 61 * 576),
    "Kimi-K2-Instruct": (1026.4, 61 * 576),
    "GLM-4.7-Flash": (29.9, 47 * 576),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_kv_cache_are_those_in_the_papers(name: str) -> None:
    config = parse(RELEASED[name])
    total, _ = count_parameters(config)
    billions, elements = PUBLISHED[name]
    assert total / 1e9 == pytest.approx(billions, rel=2e-3)
    # That is 70 KB per position of Kimi-K2 and DeepSeek-V3 at 16 bits.
    assert kv_bytes(config, 4096, "f16") == 4096 * elements * 2
