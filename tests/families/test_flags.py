"""FlexOlmo, Granite-3 and ERNIE-4.5: what their configs mean, and refusals."""

from __future__ import annotations

import pytest

from argosy.config import ModelConfig, RouterConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES
from tests.families.published import ERNIE_45_21B, FLEX_OLMO, GRANITE_31_1B
from tests.models.tiny import RawConfig
from tests.models.tiny_flags import ernie4_5_moe, flex_olmo, granitemoe, granitemoeshared


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES[raw["model_type"]].parse_config(raw)


def test_flex_olmo_has_norms_only_after_its_blocks() -> None:
    config = parse(FLEX_OLMO)
    assert (config.has_pre_norms, config.has_post_norms, config.attention.qk_norm) == (False, True, "flat")
    assert (config.num_experts, config.experts_per_token, config.router.renormalize) == (7, 5, False)
    biased = parse(flex_olmo(attention_bias=True, norm_topk_prob=True))
    assert biased.attention.has_qkv_bias
    assert biased.attention.has_o_bias
    assert biased.router.renormalize
    with pytest.raises(UnsupportedModel, match=r"sets clip_qkv to 8, but flex_olmo does not know this key"):
        parse(flex_olmo(clip_qkv=8))


def test_granite_has_four_factors() -> None:
    config = parse(GRANITE_31_1B)
    assert (config.attention.scale, config.embedding_scale, config.residual_scale) == (1 / 64, 12.0, 0.22)
    assert config.logit_scale == 1 / 6
    assert (config.router, config.shared_width) == (RouterConfig(renormalize=True), 0)
    assert parse(granitemoeshared(shared_intermediate_size=24)).shared_width == 24
    for key in ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"):
        with pytest.raises(
            CheckpointError, match=f"{key} is 0, a whole number; expected a number above zero"
        ):
            parse(granitemoe(**{key: 0}))
    with pytest.raises(
        UnsupportedModel, match="sets shared_intermediate_size to 24, but granitemoe does not know"
    ):
        parse(granitemoe(shared_intermediate_size=24))


def test_ernie_has_experts_in_some_layers_and_a_least_divisor() -> None:
    config = parse(ERNIE_45_21B)
    assert config.moe_layers == tuple(range(1, 28))
    assert (config.dense_width, config.expert_width, config.shared_width) == (12_288, 1536, 3072)
    assert config.router == RouterConfig(has_choice_bias=True, renormalize=True, renormalize_least=1e-12)
    assert config.attention.rope is not None
    assert config.attention.rope.is_interleaved
    assert config.is_embedding_tied
    some = {"moe_layer_interval": 2, "moe_layer_start_index": 2, "moe_layer_end_index": 5}
    assert parse(ernie4_5_moe(**some, num_hidden_layers=8)).moe_layers == (3, 5)
    with pytest.raises(
        CheckpointError, match="leaves no layer with routed experts: moe_layer_start_index is 7"
    ):
        parse(ernie4_5_moe(moe_layer_start_index=7))
    for key, value in (("use_bias", True), ("moe_gate", "hash"), ("moe_use_aux_free", False)):
        with pytest.raises(UnsupportedModel, match=f"asks for {key} "):
            parse(ernie4_5_moe(**{key: value}))


@pytest.mark.parametrize("family", ["flex_olmo", "granitemoe", "granitemoeshared", "ernie4_5_moe"])
def test_an_absent_key_has_the_default_of_the_config_class(family: str) -> None:
    config = parse({"model_type": family})
    expected = {
        "flex_olmo": (100_352, 4096, 32, 7, 5, 11_008),
        "granitemoe": (32_000, 4096, 32, 8, 2, 11_008),
        "granitemoeshared": (32_000, 4096, 32, 8, 2, 11_008),
        "ernie4_5_moe": (103_424, 2560, 28, 64, 6, 1536),
    }[family]
    sizes = (config.vocab_size, config.hidden_size, config.num_layers)
    assert (*sizes, config.num_experts, config.experts_per_token, config.expert_width) == expected
