"""Mellum2, Trinity and Laguna: the meaning of its config and GGUF files, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from argosy import Engine
from argosy.checkpoint.gguf import read_gguf
from argosy.config import AttentionConfig, ModelConfig, RopeConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES, open_model
from tests.engine.test_gguf import LARGEST_DIVERGENCE, mean_divergence
from tests.families.published_windows import (
    LAGUNA_S_2_1,
    LAGUNA_XS_2_1,
    MELLUM_2,
    TRINITY_LARGE,
    TRINITY_MINI,
    trinity,
)
from tests.helpers.mixers import attentions, in_float32, windows
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.tiny import RawConfig, prompt_ids
from tests.models.tiny_windows import FULL, SLIDING, YARN, afmoe, laguna, mellum

Make = Callable[..., RawConfig]

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES[raw["model_type"]].parse_config(raw)


def without(config: RawConfig, *keys: str) -> RawConfig:
    return {key: value for key, value in config.items() if key not in keys}


def ropes(config: ModelConfig) -> list[RopeConfig | None]:
    mixers = [layer.mixer for layer in config.layers]
    return [mixer.rope for mixer in mixers if isinstance(mixer, AttentionConfig)]


def test_mellum_has_yarn_where_all_positions_are_seen() -> None:
    config = parse(MELLUM_2)
    assert windows(config) == [1024, 1024, 1024, 0] * 7
    sliding, full = ropes(config)[2:4]
    assert sliding is not None
    assert full is not None
    assert (sliding.kind, sliding.theta, sliding.rotary_dim) == ("default", 5e5, 128)
    assert (full.kind, full.factor, full.original_context, full.attention_factor) == (
        "yarn", 16.0, 8192, 1.2772588722239782,
    )  # fmt: skip
    assert (config.attention.qk_norm, config.router.renormalize, config.shared_width) == ("head", True, 0)
    assert (config.moe_layers, config.eos_ids) == (tuple(range(28)), (28,))


def test_absent_keys_of_mellum_have_the_defaults_of_transformers() -> None:
    config = parse({"model_type": "mellum"})
    assert windows(config) == [0] * 28
    assert [rope.theta for rope in ropes(config) if rope is not None] == [5e5] * 28
    every = parse({"model_type": "mellum", "layer_types": [SLIDING] * 28})
    assert (windows(every), every.ropes[0].theta) == ([1024] * 28, 1e4)
    assert (config.hidden_size, config.num_experts, config.expert_width) == (2304, 64, 896)


def test_yarn_without_its_context_has_the_model_s() -> None:
    scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    full = ropes(parse(mellum(rope_parameters={FULL: scaled, SLIDING: PLAIN})))[3]
    assert full is not None
    assert (full.original_context, full.beta_fast, full.attention_factor) == (128, 32.0, None)


def test_trinity_rotates_only_in_layers_with_a_window() -> None:
    config = parse(TRINITY_MINI)
    assert windows(config) == [2048, 2048, 2048, 0] * 8
    assert [rope is None for rope in ropes(config)] == [False, False, False, True] * 8
    assert (config.ropes[0].theta, config.ropes[0].rotary_dim) == (1e4, 128)
    assert (config.attention.output_gate, config.attention.gate_activation) == ("elements", "sigmoid")
    assert (config.has_pre_norms, config.has_post_norms, config.attention.qk_norm) == (True, True, "head")
    assert (config.router.score, config.router.has_choice_bias, config.router.scale) == (
        "sigmoid",
        True,
        2.826,
    )
    assert (config.moe_layers[0], config.shared_width) == (2, 1024)
    assert config.embedding_scale == 2048**0.5
    assert parse(TRINITY_LARGE).moe_layers[0] == 6
    assert (
        windows(parse(trinity(global_attn_every_n_layers=7, num_hidden_layers=8)))[3] == 0
    )  # layer_types wins


def test_absent_keys_of_trinity_have_the_defaults_of_transformers() -> None:
    config = parse({"model_type": "afmoe"})
    assert windows(config) == [1024, 1024, 1024, 0] * 8
    assert (config.embedding_scale, config.router.scale, config.attention.num_kv_heads) == (1.0, 1.0, 16)
    assert (config.moe_layers[0], config.num_experts, config.experts_per_token) == (1, 64, 6)
    assert (config.expert_width, config.shared_width, config.context_tokens) == (1408, 2816, 16_384)
    assert windows(parse(afmoe(global_attn_every_n_layers=3))) == [7, 7, 0, 7]
    assert windows(parse(afmoe(layer_types=[FULL, SLIDING] * 2))) == [0, 7, 0, 7]


def test_laguna_has_more_heads_and_another_embedding_in_layers_with_a_window() -> None:
    config = parse(LAGUNA_XS_2_1)
    full, sliding = attentions(config)[:2]
    assert windows(config) == [0, 512, 512, 512] * 10
    assert (full.num_heads, sliding.num_heads, full.num_kv_heads) == (48, 64, 8)
    assert (full.output_gate, full.gate_activation, full.gate_rows, sliding.gate_rows) == (
        "heads",
        "softplus",
        48,
        64,
    )
    assert full.rope is not None
    assert sliding.rope is not None
    assert (full.rope.kind, full.rope.rotary_dim, full.rope.theta, full.rope.beta_fast) == (
        "yarn",
        64,
        5e5,
        64.0,
    )
    assert (sliding.rope.kind, sliding.rope.rotary_dim, sliding.rope.theta) == ("default", 128, 1e4)
    assert config.moe_layers == tuple(range(1, 40))
    assert (config.shared_width, config.expert_width, config.dense_width) == (512, 512, 8192)
    router = config.router
    assert (router.score, router.has_choice_bias, router.renormalize, router.scale) == (
        "sigmoid",
        True,
        True,
        2.5,
    )
    assert (router.logit_cap, config.eos_ids) == (0.0, (2, 24))  # 24: </assistant>
    assert {one.num_heads for one in attentions(parse(LAGUNA_S_2_1))} == {48, 72}


def test_absent_keys_of_laguna_have_the_defaults_of_transformers() -> None:
    config = parse({"model_type": "laguna"})
    full = attentions(config)[0]
    assert (windows(config), {one.num_heads for one in attentions(config)}) == ([0] * 40, {48})
    assert full.rope is not None
    assert (full.rope.kind, full.rope.theta, full.rope.rotary_dim) == ("default", 5e5, 64)
    assert (full.output_gate, config.router.scale, config.moe_layers[0]) == ("heads", 1.0, 1)
    outer = parse(laguna(partial_rotary_factor=0.5, rope_parameters={FULL: PLAIN, SLIDING: PLAIN}))
    assert [rope.rotary_dim for rope in ropes(outer) if rope is not None] == [6] * 4


def test_laguna_s_gates_are_for_heads_or_for_elements() -> None:
    rest = without(laguna(), "gating", "gating_types")
    assert parse(rest) == parse(rest | {"gating": True}) == parse(laguna())
    elements = rest | {"gating": "per-element", "gating_types": ["per-element"] * 4}
    assert [one.gate_rows for one in attentions(parse(elements))] == [48, 72, 72, 72]
    assert parse(laguna(moe_router_logit_softcapping=None)) == parse(laguna())
    assert parse(laguna(moe_router_logit_softcapping=30.0)).router.logit_cap == 30.0


@pytest.mark.parametrize(
    ("make", "changes", "sentence"),
    [
        (mellum, {"layer_types": [FULL, "chunked_attention"] * 2}, "layer_types 'chunked_attention'"),
        (mellum, {"layer_types": [FULL]}, "layer_types has 1 entries, expected one for each of 4"),
        (mellum, {"mlp_layer_types": ["sparse", "dense"]}, "mlp_layer_types has 2 entries"),
        (mellum, {"mlp_layer_types": ["dense"] * 4}, "at least one 'sparse'"),
        (mellum, {"mlp_only_layers": [0]}, "in mlp_layer_types and in mlp_only_layers and decoder_sparse_step"),
        (mellum, {"sliding_window": None}, "sliding_window null; supported: a number"),
        (mellum, {"use_sliding_window": False}, "use_sliding_window false; supported: true"),
        (mellum, {"hidden_act": "gelu"}, "hidden_act 'gelu'; supported: silu"),
        (mellum, {"rope_scaling": {"factor": 2.0}}, "rope_scaling"),
        (mellum, {"rope_parameters": {FULL: YARN}}, "rope_parameters.sliding_attention is None"),
        (mellum, {"rope_parameters": {FULL: PLAIN | {"factor": 2.0}, SLIDING: PLAIN}}, "does not know this key"),
        (mellum, {"rope_parameters": {FULL: PLAIN | {"rope_type": "longrope"}, SLIDING: PLAIN}}, "longrope"),
        (
            mellum,
            {"rope_parameters": {FULL: YARN | {"rope_theta": 1.0}, SLIDING: PLAIN}},
            "the base of yarn's frequencies is 1.0, expected more than 1",
        ),
        (laguna, {"gating": False}, "gating false; supported: true or 'per-head' or 'per-element'"),
        (laguna, {"gating": "per_head"}, "gating 'per_head'; supported"),
        (laguna, {"gating_types": ["per_element"] * 4}, "gating_types"),
        (laguna, {"num_attention_heads_per_layer": [4, 6]}, "2 numbers of heads"),
        (laguna, {"num_attention_heads_per_layer": [4, 6, 6, 5]}, "[4, 5, 6]; expected one for each of 4 layers"),
        (laguna, {"mlp_only_layers": [1]}, "gives the dense layers twice"),
        (laguna, {"decoder_sparse_step": 2}, "gives the dense layers twice"),
        (laguna, {"moe_router_score_func": "sqrtsoftplus"}, "'sqrtsoftplus'; supported: 'sigmoid' or null"),
        (laguna, {"moe_router_use_sigmoid": False}, "moe_router_use_sigmoid false; supported: true"),
        (laguna, {"norm_topk_prob": False}, "norm_topk_prob false; supported: true"),
        (laguna, {"moe_apply_router_weight_on_input": True}, "moe_apply_router_weight_on_input true"),
        (laguna, {"swa_attention_sink_enabled": True}, "swa_attention_sink_enabled true; supported: false"),
        (laguna, {"qkv_bias": True}, "qkv_bias true; supported: false"),
        (laguna, {"moe_router_logit_softcapping": -1.0}, "expected a number above zero"),
        (laguna, {"rope_parameters": {"original_max_position_embeddings": 4096}}, "original_max_position_embeddings"),
        (afmoe, {"num_dense_layers": 4}, "num_dense_layers is 4, a whole number; expected a whole number from 0 to 3"),
        (afmoe, {"route_norm": False}, "route_norm false; supported: true"),
        (afmoe, {"score_func": "softmax"}, "score_func 'softmax'; supported: 'sigmoid'"),
        (afmoe, {"n_group": 2}, "n_group 2; supported: 1"),
        (afmoe, {"num_expert_groups": 2}, "num_expert_groups 2; supported: 1"),
        (afmoe, {"mup_enabled": None}, "mup_enabled is null"),
        (afmoe, {"sliding_window": None}, "sliding_window null; supported: a number"),
        (afmoe, {"global_attn_every_n_layers": 0}, "global_attn_every_n_layers is 0"),
        (afmoe, {"layer_types": [SLIDING]}, "layer_types has 1 entries"),
        (afmoe, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)  # fmt: skip
def test_what_a_config_may_not_ask_for(make: Make, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModel)) as refused:
        parse(make(**changes))
    assert sentence in str(refused.value)


def test_layers_may_not_have_a_window_that_the_config_says_is_unused() -> None:
    parse(mellum(layer_types=[FULL] * 4, use_sliding_window=False, sliding_window=None))


def test_layers_for_multi_token_prediction_are_passed_over() -> None:
    counted = mellum(num_nextn_predict_layers=1, mtp_layer_types=[SLIDING], mtp_mlp_layer_types=["sparse"])
    assert parse(counted) == parse(mellum())
    assert "mtp\\." in (FAMILIES["mellum"].LAYOUTS[0].passed_over or "")


each_family = pytest.mark.parametrize("make", [mellum, afmoe, laguna], ids=lambda make: make.__name__)

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_experts": 4,
    "num_experts_per_tok": 4,
}

SIZES_OF_LAGUNA: dict[str, Any] = {
    "num_attention_heads_per_layer": [4, 8, 8, 4],
    "shared_expert_intermediate_size": 256,
}


@pytest.mark.covering(1)
@each_family
@pytest.mark.parametrize("type_name", ["F32", "Q4_K"])
def test_a_gguf_answers_as_its_dequantised_weights(make: Make, type_name: str, tmp_path: Path) -> None:
    # Every expert is chosen, as a rounded score that changed a choice would hide what rounding costs.
    config = make(**SIZES, **(SIZES_OF_LAGUNA if make is laguna else {}))
    path = tmp_path / "model.gguf"
    directory = write_gguf_model(path, config, one_type(type_name), seed=3)
    prompt = prompt_ids(config, 5)
    logits = []
    for place in (directory, path):
        with Engine.open(place, memory="4GiB", threads=1) as engine:
            logits.append(engine.logits(prompt))
    if type_name == "F32":
        assert difference(logits[1], logits[0]) <= LARGEST_DIFFERENCE
    assert mean_divergence(logits[0], logits[1]) <= LARGEST_DIVERGENCE


@each_family
def test_a_gguf_means_the_same_as_config_json(make: Make, tmp_path: Path) -> None:
    config = make()
    path = tmp_path / "model.gguf"
    write_gguf_model(path, config, one_type("F32"), seed=3)
    expected = in_float32(parse(config))
    found = open_model(path).config
    assert found == replace(expected, dense_width=found.dense_width)
    metadata = dict(read_gguf(path).metadata) | {f"{read_gguf(path).text('general.architecture')}.odd": 3}
    with pytest.raises(UnsupportedModel, match="odd"):
        FAMILIES[config["model_type"]].open_gguf(replace(read_gguf(path), metadata=metadata))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [(0, [7, 7, 7, 7]), (1, [0, 0, 0, 0]), (2, [7, 0, 7, 0]), (3, [7, 7, 0, 7])],
)
def test_a_number_says_which_layers_see_everything(pattern: int, expected: list[int], tmp_path: Path) -> None:
    write_gguf_model(path := tmp_path / "model.gguf", mellum(), one_type("F32"), seed=3)
    file = read_gguf(path)
    metadata = dict(file.metadata) | {"mellum.attention.sliding_window_pattern": pattern}
    assert windows(FAMILIES["mellum"].open_gguf(replace(file, metadata=metadata)).config) == expected
    del metadata["mellum.attention.sliding_window_pattern"]
    assert windows(FAMILIES["mellum"].open_gguf(replace(file, metadata=metadata)).config) == [7, 7, 7, 0]
    metadata["mellum.attention.sliding_window"] = 0
    assert windows(FAMILIES["mellum"].open_gguf(replace(file, metadata=metadata)).config) == [0] * 4


def test_trinity_s_gguf_needs_a_window_and_norms_its_weights(tmp_path: Path) -> None:
    write_gguf_model(path := tmp_path / "model.gguf", afmoe(), one_type("F32"), seed=3)
    file = read_gguf(path)
    absent = {key: value for key, value in file.metadata.items() if key != "afmoe.expert_weights_norm"}
    assert FAMILIES["afmoe"].open_gguf(replace(file, metadata=absent)).config == open_model(path).config
    for change, sentence in (
        ({"afmoe.expert_weights_norm": False}, "expert_weights_norm"),
        ({"afmoe.expert_gating_func": 1}, "expert_gating_func"),
        ({"afmoe.attention.sliding_window": 0}, "sliding_window"),
    ):
        with pytest.raises((CheckpointError, UnsupportedModel), match=sentence):
            FAMILIES["afmoe"].open_gguf(replace(file, metadata=dict(file.metadata) | change))


def test_laguna_s_gguf_shows_its_gates_and_may_have_no_windows(tmp_path: Path) -> None:
    elements = laguna(gating="per-element", gating_types=["per_element"] * 4)
    write_gguf_model(path := tmp_path / "model.gguf", elements, one_type("F32"), seed=3)
    file = read_gguf(path)
    assert open_model(path).config == replace(in_float32(parse(elements)), eos_ids=(2, 24))
    without_window = dict(file.metadata) | {"laguna.attention.sliding_window": 0}
    assert windows(FAMILIES["laguna"].open_gguf(replace(file, metadata=without_window)).config) == [0] * 4
    for change, sentence in (
        (
            {"laguna.attention.head_count_kv": 4},
            r"\[4, 6\]; expected one for each of 4 layers, multiples of 4",
        ),
        ({"laguna.expert_shared_count": 2}, "expert_shared_count"),
        ({"laguna.expert_gating_func": 4}, "expert_gating_func"),
        ({"laguna.leading_dense_block_count": 4}, "leaves none with routed experts"),
        ({"laguna.attention.value_length": 6}, "value_length"),
    ):
        with pytest.raises((CheckpointError, UnsupportedModel), match=sentence):
            FAMILIES["laguna"].open_gguf(replace(file, metadata=dict(file.metadata) | change))
