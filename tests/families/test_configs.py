"""config.json: the meaning of each family's keys, the defaults of absent keys, and the configs that are refused."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from argosy.config import AttentionConfig, LayerConfig, ModelConfig, RopeConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES
from argosy.model.families.attention import qwen3_moe as qwen3
from argosy.model.reading.config_reader import ConfigReader
from tests.helpers.mixers import windows as windows_of
from tests.models.tiny import RawConfig, glm4_moe, minimax_m2, mixtral, olmoe, qwen2_moe, qwen3_moe, respelt

MAKERS = (mixtral, qwen2_moe, qwen3_moe, glm4_moe, olmoe, minimax_m2)
every_family = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES[raw["model_type"]].parse_config(raw)


def refusal(raw: RawConfig) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse(raw)
    return str(caught.value)


def without(raw: RawConfig, *keys: str) -> RawConfig:
    return {key: value for key, value in raw.items() if key not in keys}


# The meaning of keys


def test_mixtral() -> None:
    config = parse(mixtral())

    rope = RopeConfig(theta=1e6, rotary_dim=10, original_context=128)
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=10, rope=rope)
    assert config == ModelConfig(
        family="mixtral", vocab_size=112, hidden_size=40, layers=(LayerConfig(mixer=attention, is_moe=True),) * 3,
        norm_eps=1e-5, context_tokens=128, num_experts=6, experts_per_token=2, expert_width=20,
        router=config.router, eos_ids=(2,), bos_id=1,
    )  # fmt: skip
    assert config.router.renormalize


def test_qwen2_moe() -> None:
    config = parse(qwen2_moe())

    assert (config.shared_width, config.shared_is_gated, config.dense_width, config.expert_width) == (
        40,
        True,
        48,
        20,
    )
    assert config.attention.has_qkv_bias
    assert not config.attention.has_o_bias
    assert config.attention.qk_norm == "none"
    assert not config.router.renormalize
    assert config.attention.head_dim == 10


def test_qwen3_moe() -> None:
    config = parse(qwen3_moe())

    assert (config.attention.head_dim, config.shared_width, config.dense_width, config.expert_width) == (
        16,
        0,
        48,
        24,
    )
    assert config.attention.qk_norm != "none"
    assert not config.attention.has_qkv_bias
    assert config.router.renormalize


def test_an_absent_key_has_the_default_of_the_family_s_config_class() -> None:
    mixtral_default = parse({"model_type": "mixtral"})
    assert (mixtral_default.vocab_size, mixtral_default.hidden_size, mixtral_default.num_layers) == (
        32_000,
        4096,
        32,
    )
    assert (
        mixtral_default.attention.num_heads,
        mixtral_default.attention.num_kv_heads,
        mixtral_default.expert_width,
    ) == (
        32,
        8,
        14_336,
    )
    assert (mixtral_default.num_experts, mixtral_default.experts_per_token) == (8, 2)
    assert (
        mixtral_default.attention.rope.theta,
        mixtral_default.norm_eps,
        mixtral_default.context_tokens,
    ) == (
        1e6,
        1e-5,
        131_072,
    )
    assert (mixtral_default.bos_id, mixtral_default.eos_ids) == (1, (2,))

    qwen2_default = parse({"model_type": "qwen2_moe"})
    assert (qwen2_default.vocab_size, qwen2_default.hidden_size, qwen2_default.num_layers) == (
        151_936,
        2048,
        24,
    )
    assert (
        qwen2_default.attention.num_heads,
        qwen2_default.attention.num_kv_heads,
        qwen2_default.expert_width,
    ) == (16, 16, 1408)
    assert (qwen2_default.num_experts, qwen2_default.experts_per_token) == (60, 4)
    assert (qwen2_default.dense_width, qwen2_default.shared_width) == (5632, 5632)
    assert (qwen2_default.attention.rope.theta, qwen2_default.norm_eps, qwen2_default.context_tokens) == (
        1e4,
        1e-6,
        32_768,
    )
    assert qwen2_default.attention.has_qkv_bias
    assert not qwen2_default.router.renormalize

    qwen3_default = parse({"model_type": "qwen3_moe"})
    assert (
        qwen3_default.attention.num_heads,
        qwen3_default.attention.num_kv_heads,
        qwen3_default.expert_width,
    ) == (32, 4, 768)
    assert (qwen3_default.num_experts, qwen3_default.experts_per_token) == (128, 8)
    assert (qwen3_default.attention.rope.theta, qwen3_default.norm_eps, qwen3_default.dense_width) == (
        1e4,
        1e-6,
        6144,
    )
    assert not qwen3_default.router.renormalize
    assert qwen3_default.attention.head_dim == 64
    for default in (mixtral_default, qwen2_default, qwen3_default):
        assert not default.is_embedding_tied
        assert all(layer == LayerConfig(mixer=default.attention, is_moe=True) for layer in default.layers)
        assert not any(windows_of(default))


@every_family
def test_experts_are_counted_under_any_of_their_names(make: Any) -> None:
    plain = without(make(), "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok")
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        config = parse(plain | {name: 5, "num_experts_per_token": 3})
        assert (config.num_experts, config.experts_per_token) == (5, 3)

    agreeing = plain | {"num_experts_per_tok": 3, "num_experts": 5, "n_routed_experts": 5}
    assert parse(agreeing).num_experts == 5
    found = refusal(agreeing | {"n_routed_experts": 6})
    assert re.search(r"gives (num|n_routed)_experts as \d and \w+, its other name, as \d", found)


@every_family
def test_null_means_the_default(make: Any) -> None:
    config = parse(make(hidden_size=48, num_key_value_heads=None, head_dim=None, rope_scaling=None))

    assert config.attention.num_kv_heads == config.attention.num_heads
    assert config.attention.head_dim == config.hidden_size // config.attention.num_heads


@every_family
def test_head_dim_is_independent_of_hidden_size(make: Any) -> None:
    assert parse(make(head_dim=24)).attention.head_dim == 24


@every_family
def test_there_may_be_one_end_token_or_many_or_none(make: Any) -> None:
    assert parse(make(eos_token_id=[2, 5])).eos_ids == (2, 5)
    assert parse(make(eos_token_id=None)).eos_ids == ()
    assert parse(make(eos_token_id=-1, bos_token_id=-1)).eos_ids == ()
    assert parse(make(bos_token_id=None)).bos_id is None


def test_layers_may_have_no_routed_experts() -> None:
    def moe_layers(**changes: Any) -> tuple[int, ...]:
        two, three = parse(qwen2_moe(**changes)), parse(qwen3_moe(**changes))
        assert two.moe_layers == three.moe_layers
        return two.moe_layers

    assert moe_layers(num_hidden_layers=4) == (0, 1, 2, 3)
    assert moe_layers(num_hidden_layers=4, mlp_only_layers=[1]) == (0, 2, 3)
    assert moe_layers(num_hidden_layers=4, decoder_sparse_step=2) == (1, 3)
    assert moe_layers(num_hidden_layers=7, decoder_sparse_step=3, mlp_only_layers=[5]) == (2,)
    assert "leaves none of the 3 layers with routed experts" in refusal(qwen2_moe(mlp_only_layers=[0, 1, 2]))
    assert "leaves none of the 3 layers with routed experts" in refusal(qwen3_moe(decoder_sparse_step=4))
    assert "mlp_only_layers is [3], a list; expected" in refusal(qwen3_moe(mlp_only_layers=[3]))


def windows(raw: RawConfig) -> list[int]:
    return windows_of(parse(raw))


def test_mixtral_s_window_applies_to_every_layer() -> None:
    assert windows(mixtral(sliding_window=8)) == [8, 8, 8]
    assert windows(mixtral(sliding_window=None)) == [0, 0, 0]
    assert "sliding_window is 0" in refusal(mixtral(sliding_window=0))


def test_qwen2_moe_s_window_applies_to_even_layers_below_max_window_layers() -> None:
    used = {"use_sliding_window": True, "sliding_window": 7, "num_hidden_layers": 5}
    assert windows(qwen2_moe(**used, max_window_layers=3)) == [7, 0, 7, 0, 0]
    assert windows(qwen2_moe(**used | {"use_sliding_window": False})) == [0] * 5
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    assert windows(qwen2_moe(**used, layer_types=kinds)) == [0, 7, 7, 0, 0]
    # transformers 5 writes sliding_window 0 if the window is off.
    assert windows(qwen2_moe(sliding_window=0, layer_types=["full_attention"] * 3)) == [0, 0, 0]

    assert "layer 0, but its window is off" in refusal(qwen2_moe(layer_types=["sliding_attention"] * 3))
    assert "layer 0, but its window is None" in refusal(
        qwen2_moe(use_sliding_window=True, sliding_window=None)
    )
    assert "layer_types has 2 entries, expected one for each of 3" in refusal(
        qwen2_moe(layer_types=["full_attention"] * 2)
    )
    assert (
        "asks for layer_types 'chunked_attention'; supported: full_attention, sliding_attention"
        in refusal(qwen2_moe(layer_types=["chunked_attention"] * 3))
    )


def test_qwen3_moe_s_window_applies_to_every_layer() -> None:
    used = {"use_sliding_window": True, "sliding_window": 6}
    assert windows(qwen3_moe(**used)) == [6, 6, 6]
    assert windows(qwen3_moe(**used, max_window_layers=1)) == [6, 6, 6]
    assert windows(qwen3_moe(use_sliding_window=False, sliding_window=6)) == [0, 0, 0]
    assert windows(qwen3_moe(**used, layer_types=["sliding_attention"] * 3)) == [6, 6, 6]
    assert "supported: sliding_attention in every layer" in refusal(
        qwen3_moe(**used, layer_types=["full_attention"] * 3)
    )


def test_a_sibling_of_qwen3_moe_reads_the_same_text_with_other_norms() -> None:
    defaults = {
        "num_layers": 24, "renormalize": False, "expert_width": 768, "dense_width": 6144, "vocab_size": 151_936,
        "hidden_size": 2048, "num_heads": 32, "num_kv_heads": 4, "rope_theta": 10_000.0, "norm_eps": 1e-6,
        "context_tokens": 32_768, "num_experts": 128, "experts_per_token": 8,
    }  # fmt: skip
    raw = qwen3_moe(use_sliding_window=True, sliding_window=6)

    def read(**keys: object) -> ModelConfig:
        reader = ConfigReader(raw | keys, "sibling")
        config = qwen3.read_text(reader, "sibling", qwen3.read_window, qk_norm="none", **defaults)
        reader.finish()
        return config

    plain = parse(raw).with_mixers(AttentionConfig, qk_norm="none")
    assert read(use_qk_norm=False) == replace(plain, family="sibling")
    with pytest.raises(UnsupportedModel, match="use_qk_norm"):
        read(use_qk_norm=True)


def test_biases() -> None:
    assert not parse(qwen2_moe(qkv_bias=False)).attention.has_qkv_bias
    biased = parse(qwen3_moe(attention_bias=True))
    assert biased.attention.has_qkv_bias
    assert biased.attention.has_o_bias
    assert "asks for attention_bias true; supported: false" in refusal(mixtral(attention_bias=True))


def test_keys_of_related_models_are_accepted_if_they_change_nothing() -> None:
    # Qwen3-Coder's config.json has these keys.
    parse(qwen3_moe(qkv_bias=False, use_qk_norm=True, shared_expert_intermediate_size=0))
    assert "asks for shared_expert_intermediate_size 40; supported: 0 or null" in refusal(
        qwen3_moe(shared_expert_intermediate_size=40)
    )
    assert "asks for use_qk_norm false; supported: true" in refusal(qwen3_moe(use_qk_norm=False))


# Rope


@every_family
def test_both_spellings_of_rope_mean_the_same(make: Any) -> None:
    old = make(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 3.0})
    new = respelt(without(old, "rope_scaling"), theta=5e5, rope_type="linear", factor=3.0)

    assert parse(old) == parse(new)
    assert parse(old).attention.rope.theta == 5e5


def rope(scaling: dict[str, Any], **changes: Any) -> RopeConfig:
    return parse(qwen3_moe(rope_scaling=scaling, **changes)).attention.rope


def test_rope_kinds_and_their_fields() -> None:
    assert rope({"rope_type": "default"}).kind == "default"
    assert rope({"rope_type": "linear", "factor": 4}).factor == 4.0
    assert rope({"type": "dynamic", "factor": 2.0}).original_context == 128

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    plain = rope(yarn)
    assert (plain.original_context, plain.beta_fast, plain.beta_slow, plain.truncate) == (32, 32.0, 1.0, True)
    assert (plain.attention_factor, plain.mscale, plain.mscale_all_dim) == (None, None, None)
    more = {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.25, "mscale": 0.7, "mscale_all_dim": 1.0}
    full = rope(yarn | more | {"truncate": False})
    assert (full.beta_fast, full.beta_slow, full.attention_factor, full.truncate) == (16.0, 2.0, 1.25, False)
    assert (full.mscale, full.mscale_all_dim) == (0.7, 1.0)
    assert rope(yarn | {"factor": None}).factor == 4.0  # the ratio of the two context lengths
    assert rope(without(yarn, "original_max_position_embeddings")).original_context == 128
    assert rope(yarn, original_max_position_embeddings=64).original_context == 64

    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    found = rope(llama3 | {"original_max_position_embeddings": 20})
    assert (found.factor, found.low_freq_factor, found.high_freq_factor, found.original_context) == (
        8.0,
        1.0,
        4.0,
        20,
    )


@pytest.mark.parametrize(
    ("scaling", "sentence"),
    [
        (
            {"rope_type": "longrope", "factor": 2.0},
            "asks for rope_type longrope; supported: default, linear, dynamic",
        ),
        ({"type": "mrope", "mrope_section": [1, 2]}, "asks for type mrope; supported"),
        ({"rope_type": 3}, "asks for rope_type 3; supported"),
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, "gives rope_type linear and type yarn"),
        ({"rope_type": "linear"}, "rope_scaling does not give factor"),
        ({"rope_type": "linear", "factor": 0}, "gives factor 0, expected a number above 0"),
        ({"rope_type": "linear", "factor": True}, "gives factor True, expected a number above 0"),
        ({"rope_type": "linear", "factor": "2"}, "gives factor 2, expected a number above 0"),
        (
            {"rope_type": "linear", "factor": 2.0, "beta_fast": 1},
            "sets beta_fast to 1, but kind 'linear' does not know",
        ),
        (
            {"rope_type": "default", "factor": 2.0},
            "sets factor to 2.0, but kind 'default' does not know this key",
        ),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "gives truncate 1, expected true or false"),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0.5},
            "expected a whole number",
        ),
        ({"rope_type": "llama3", "factor": 2.0}, "rope_scaling does not give low_freq_factor"),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 3.5},
            "gives high_freq_factor 3.5, expected at least low_freq_factor 4.0",
        ),
        (
            {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
            "asks for partial_rotary_factor 0.5",
        ),
        (
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
            "gives rope_theta as 1000000.0 and, in rope_scal",
        ),
    ],
)
def test_an_unsupported_rope_is_refused_by_name(scaling: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(qwen3_moe(rope_scaling=scaling))


@pytest.mark.parametrize("make", [mixtral, qwen2_moe, qwen3_moe, olmoe], ids=lambda make: make.__name__)
def test_partial_rotary_is_refused_if_the_family_has_no_such_key(make: Any) -> None:
    parse(make(partial_rotary_factor=1))
    assert "asks for partial_rotary_factor 0.5; supported: 1 or null" in refusal(
        make(partial_rotary_factor=0.5)
    )


def test_rope_given_twice_must_agree() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    parse(qwen3_moe(rope_scaling=scaling, rope_parameters=scaling))
    assert "gives both rope_scaling and rope_parameters, and they differ" in refusal(
        qwen3_moe(rope_scaling=scaling, rope_parameters={"rope_type": "linear", "factor": 3.0})
    )


# Refusals


@every_family
@pytest.mark.parametrize("value", ["sqrtsoftplus", 3, None, False, {"a": [1]}])
def test_an_unknown_key_is_refused_with_its_value_and_the_known_keys(make: Any, value: object) -> None:
    raw = make(score_function=value)

    with pytest.raises(UnsupportedModel) as caught:
        parse(raw)

    assert f"but {raw['model_type']} does not know this key; supported: " in str(caught.value)
    assert "config.json sets score_function to " in str(caught.value)
    assert "hidden_size, " in str(caught.value)
    assert caught.value.facts["key"] == "score_function"
    assert caught.value.facts["value"] == value


@every_family
def test_training_and_generation_keys_are_ignored(make: Any) -> None:
    extras = {"router_jitter_noise": 0.1, "attention_dropout": 0.5, "temperature": 0.6, "top_k": 20, "pad_token_id": 0,
              "id2label": {"0": "A"}, "_name_or_path": "x", "output_router_logits": True}  # fmt: skip
    assert parse(make(**extras)) == parse(make())


@every_family
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_act": "gelu"}, "asks for hidden_act 'gelu'; supported: silu"),
        (
            {"quantization_config": {"quant_method": "hqq"}},
            "asks for quantization_config 'hqq'; supported: fp8, compressed-tensors",
        ),
        ({"quantization_config": {}}, "asks for quantization_config 'unknown'"),
        ({"quantization_config": "int4"}, "asks for quantization_config 'int4'; supported: fp8, "),
        ({"pretraining_tp": 2}, "asks for pretraining_tp 2; supported: 1 or null"),
        ({"mlp_bias": True}, "asks for mlp_bias true; supported: false or null"),
        ({"hidden_size": "40"}, "hidden_size is '40', text; expected a whole number from 1 to"),
        ({"hidden_size": 40.0}, "hidden_size is 40.0, a number; expected a whole number"),
        ({"hidden_size": 0}, "hidden_size is 0, a whole number; expected a whole number from 1 to"),
        ({"hidden_size": 2**31}, "hidden_size is 2147483648, a whole number"),
        ({"hidden_size": True}, "hidden_size is true; expected a whole number"),
        (
            {"num_hidden_layers": 10**12},
            "num_hidden_layers is 1000000000000, a whole number; expected .* to 4096",
        ),
        ({"vocab_size": None}, "vocab_size is null; expected a whole number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, a whole number; expected a number above zero"),
        ({"rms_norm_eps": 1e39}, r"rms_norm_eps is 1e\+39, a number; expected a number above zero"),
        ({"rms_norm_eps": 1e-46}, "rms_norm_eps is 1e-46, a number; expected a number above zero"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 10000.*; expected a number above zero"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, a whole number; expected true or false"),
        (
            {"num_experts_per_tok": 7},
            "num_experts_per_tok is 7, a whole number; expected a whole number from 1 to 6",
        ),
        ({"num_attention_heads": 5}, "num_attention_heads is 5, expected a multiple of num_key_value_heads"),
        (
            {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": None},
            "leaves nothing for each of 64",
        ),
        ({"head_dim": 15}, "heads of 15 dimensions, but rotary embedding needs an even number"),
        (
            {"eos_token_id": "</s>"},
            "eos_token_id is '</s>', text; expected a token id, a list of them, or null",
        ),
        ({"eos_token_id": [2, True]}, "expected a token id, a list of them, or null"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\], a list; expected an object or null"),
    ],
)
def test_an_invalid_value_is_refused(make: Any, changes: dict[str, Any], sentence: str) -> None:
    found = refusal(make(**changes))

    assert re.search(sentence, found), found
    assert found.startswith("config.json")


# A config inside a config


def test_a_nested_config_is_read_as_strictly_and_errors_say_where() -> None:
    def text_config(values: object) -> ConfigReader:
        return ConfigReader({"text_config": values}, "wrapper").nested("text_config", "inner", "inner_text")

    reader = text_config({"model_type": "inner_text", "hidden_size": 8, "use_cache": True})
    assert reader.integer("hidden_size", default=None) == 8
    reader.finish()

    with pytest.raises(
        UnsupportedModel, match=r"config.json: text_config sets depth to 3, but wrapper does not"
    ):
        text_config({"depth": 3}).finish()
    with pytest.raises(UnsupportedModel, match=r"model_type 'other'; supported: inner, inner_text"):
        text_config({"model_type": "other"})
    with pytest.raises(
        CheckpointError, match=r"config.json: text_config: hidden_size is 'x', text; expected a whole"
    ):
        text_config({"hidden_size": "x"}).integer("hidden_size", default=None)
    for missing in (None, 3):
        with pytest.raises(CheckpointError, match=r"config.json: text_config is .*expected an object"):
            text_config(missing)
