"""Mellum2: the meaning of its config and GGUF files, and refusals."""

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
from tests.families.published_windows import MELLUM_2
from tests.helpers.mixers import in_float32, windows
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.tiny import RawConfig, prompt_ids
from tests.models.tiny_windows import FULL, SLIDING, YARN, mellum

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


SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_experts": 4,
    "num_experts_per_tok": 4,
}


@pytest.mark.parametrize("make", [mellum], ids=lambda make: make.__name__)
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


@pytest.mark.parametrize("make", [mellum], ids=lambda make: make.__name__)
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
