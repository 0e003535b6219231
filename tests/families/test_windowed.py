"""Mellum2 and Trinity: the meaning of its config and GGUF files, and refusals."""

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
from tests.families.published_windows import MELLUM_2, TRINITY_LARGE, TRINITY_MINI, trinity
from tests.helpers.mixers import in_float32, windows
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.tiny import RawConfig, prompt_ids
from tests.models.tiny_windows import FULL, SLIDING, YARN, afmoe, mellum

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
            "rope_theta 1.0, expected more than 1 for yarn",
        ),
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


each_family = pytest.mark.parametrize("make", [mellum, afmoe], ids=lambda make: make.__name__)

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_experts": 4,
    "num_experts_per_tok": 4,
}


@each_family
@pytest.mark.parametrize("type_name", ["F32", "Q4_K"])
def test_a_gguf_answers_as_its_dequantised_weights(make: Make, type_name: str, tmp_path: Path) -> None:
    # Every expert is chosen, as a rounded score that changed a choice would hide what rounding costs.
    config = make(**SIZES)
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
