"""Solar-Open, dots.llm1, Ling 2.x, Sarvam-30B, K-EXAONE and Hy3: their configs and GGUF files, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from argosy import Engine
from argosy.checkpoint.gguf import read_gguf
from argosy.config import AttentionConfig, ModelConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES, open_model
from tests.engine.test_gguf import LARGEST_DIVERGENCE
from tests.helpers.mixers import windows
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.references import LARGEST_DIFFERENCE, difference, mean_divergence
from tests.models.tiny import RawConfig, prompt_ids
from tests.models.tiny_grouped import bailing_moe, dots1, exaone_moe, hy_v3, solar_open

Make = Callable[..., RawConfig]


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES[raw["model_type"]].parse_config(raw)


def test_solar_open_has_experts_in_every_layer_and_rotates_whole_heads() -> None:
    config = parse(solar_open())
    assert config.moe_layers == (0, 1, 2)
    assert (config.attention.qk_norm, config.attention.rope.kind) == ("none", "yarn")
    assert config.attention.rope.rotary_dim == 12
    assert (config.router.score, config.router.has_choice_bias) == ("sigmoid", True)


def test_dots1_has_windows_from_a_layer_on_or_where_layer_types_says() -> None:
    assert windows(parse(dots1())) == [0, 0, 0]
    assert windows(parse(dots1(sliding_window=7, max_window_layers=2))) == [0, 0, 7]
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(parse(dots1(sliding_window=7, layer_types=kinds))) == [7, 0, 7]
    absent = {key: value for key, value in dots1(num_hidden_layers=63).items() if key != "sliding_window"}
    assert windows(parse(absent)) == [0] * 62 + [4096]
    assert (parse(dots1()).attention.qk_norm, parse(dots1()).shared_width) == ("head", 18)
    absent = {key: value for key, value in dots1().items() if key != "norm_topk_prob"}
    assert (parse(dots1()).router.renormalize, parse(absent).router.renormalize) == (True, False)


def test_ling_rotates_a_part_of_each_head_and_sarvam_has_its_config() -> None:
    config = parse(bailing_moe())
    assert (config.attention.rope.rotary_dim, config.attention.qk_norm) == (6, "head")
    assert (config.router.num_groups, config.router.kept_groups, config.router.scale) == (2, 1, 2.5)
    assert (config.moe_layers, config.shared_width) == ((1, 2), 9)
    assert parse(bailing_moe(use_qkv_bias=True)).attention.has_qkv_bias
    assert parse(bailing_moe(model_type="sarvam_moe", architectures=["SarvamMoEForCausalLM"])) == config
    absent = {key: value for key, value in bailing_moe().items() if not key.startswith("partial_rotary")}
    assert parse(absent).attention.rope.rotary_dim == 12
    sarvam = parse({"model_type": "sarvam_moe"})
    assert (sarvam.router.num_groups, sarvam.router.scale, sarvam.attention.rope.theta) == (1, 2.5, 8e6)


def rotates(config: ModelConfig) -> list[bool]:
    return [
        isinstance(layer.mixer, AttentionConfig) and layer.mixer.rope is not None for layer in config.layers
    ]


def test_exaone_rotates_only_in_layers_with_a_window() -> None:
    config = parse(exaone_moe())
    assert (windows(config), rotates(config)) == ([7, 0, 7], [True, False, True])
    assert (config.moe_layers, config.shared_width, config.attention.qk_norm) == ((1, 2), 9, "head")
    patterns = {4: "LLLGL", 2**62: "LLLLL", "LLG": "LLGLL", 1: "GGGGG", "G": "GGGGG", "L": "LLLLL"}
    for pattern, expected in patterns.items():
        by_turns = exaone_moe(layer_types=None, sliding_window_pattern=pattern, num_hidden_layers=5)
        assert rotates(parse(by_turns)) == [letter == "L" for letter in expected]
    absent = parse({"model_type": "exaone_moe"})
    assert windows(absent) == [4096, 4096, 4096, 0] * 8
    assert (absent.router.scale, absent.eos_ids, absent.moe_layers[0]) == (2.5, (53,), 1)
    first_release = {key: value for key, value in exaone_moe().items() if key != "first_k_dense_replace"}
    first_release |= {"first_last_k_dense_replace": 2, "is_moe_layer": [False, False, True]}
    assert parse(first_release).moe_layers == (2,)


def test_a_gguf_with_layers_for_multi_token_prediction_has_flags_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_model(path, exaone_moe(num_hidden_layers=4), one_type("F32"), seed=3)
    file = read_gguf(path)
    longer = dict(file.metadata) | {"exaone-moe.block_count": 5}
    counted = replace(file, metadata=longer | {"exaone-moe.nextn_predict_layers": 1})
    found = FAMILIES["exaone_moe"].open_gguf(counted).config
    assert (windows(found), found.num_mtp_layers) == ([7, 0, 7, 7], 1)
    with pytest.raises(CheckpointError, match="for each of 5 layers"):
        FAMILIES["exaone_moe"].open_gguf(replace(file, metadata=longer))


def test_hy3_s_first_layer_is_dense() -> None:
    config = parse(hy_v3())
    assert (config.moe_layers, config.router.scale, config.shared_width) == ((1, 2), 2.826, 9)
    absent = {
        key: value
        for key, value in hy_v3().items()
        if key not in ("first_k_dense_replace", "mlp_layer_types")
    }
    assert parse(absent).moe_layers == (1, 2)


@pytest.mark.parametrize(
    ("make", "changes", "sentence"),
    [
        (solar_open, {"first_k_dense_replace": 1}, "first_k_dense_replace 1; supported: 0"),
        (solar_open, {"use_qk_norm": True}, "use_qk_norm true; supported: false"),
        (solar_open, {"scoring_func": "softmax"}, "scoring_func 'softmax'; supported: sigmoid"),
        (solar_open, {"hidden_act": "gelu"}, "hidden_act 'gelu'; supported: silu"),
        (dots1, {"use_sliding_window": True}, "use_sliding_window true; supported: false"),
        (dots1, {"moe_layer_freq": 2}, "moe_layer_freq 2; supported: 1"),
        (dots1, {"scoring_func": "softmax"}, "scoring_func 'softmax'; supported: noaux_tc, sigmoid"),
        (dots1, {"layer_types": ["sliding_attention"] * 3}, "sliding_window null; supported: a number"),
        (dots1, {"n_routed_experts": None}, "n_routed_experts is null"),
        (bailing_moe, {"architectures": ["BailingMoeForCausalLM"]}, "['BailingMoeForCausalLM']; supported"),
        (bailing_moe, {"architectures": None}, "architectures null; supported: ['BailingMoeV2ForCausalLM']"),
        (bailing_moe, {"score_function": "softmax"}, "score_function 'softmax'; supported: 'sigmoid'"),
        (bailing_moe, {"norm_topk_prob": False}, "norm_topk_prob false; supported: true"),
        (bailing_moe, {"moe_router_enable_expert_bias": False}, "enable_expert_bias false; supported: true"),
        (bailing_moe, {"use_bias": True}, "use_bias true; supported: false"),
        (bailing_moe, {"use_rmsnorm": False}, "use_rmsnorm false; supported: true"),
        (bailing_moe, {"norm_head": True}, "norm_head true; supported: false"),
        (bailing_moe, {"norm_softmax": True}, "norm_softmax true; supported: false"),
        (bailing_moe, {"use_sliding_window": True}, "use_sliding_window true; supported: false"),
        (bailing_moe, {"using_split_qkv_in_self_attention": True}, "self_attention true; supported: false"),
        (bailing_moe, {"rotary_dim": 12}, "rotary_dim 12; supported: 6"),
        (bailing_moe, {"moe_shared_expert_intermediate_size": 18}, "intermediate_size 18; supported: 9"),
        (bailing_moe, {"n_group": 4}, "6 experts in 4 groups"),
        (bailing_moe, {"multi_gate": True}, "sets multi_gate to true"),
        (exaone_moe, {"sliding_window": None}, "sliding_window is null; expected a whole number"),
        (exaone_moe, {"layer_types": None, "sliding_window_pattern": "LX"}, "sliding_window_pattern 'LX'; supported"),
        (exaone_moe, {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern 0; supported"),
        (exaone_moe, {"layer_types": None, "sliding_window_pattern": None}, "sliding_window_pattern null; supported"),
        (exaone_moe, {"layer_types": ["sliding_attention"]}, "layer_types has 1 entries"),
        (exaone_moe, {"is_moe_layer": [True] * 3}, "is_moe_layer [True, True, True]; supported"),
        (exaone_moe, {"first_last_k_dense_replace": 2}, "first_last_k_dense_replace as 2 and first_k_dense_replace"),
        (exaone_moe, {"scoring_func": "softmax"}, "scoring_func 'softmax'; supported: sigmoid"),
        (exaone_moe, {"topk_method": "greedy"}, "topk_method 'greedy'; supported: noaux_tc"),
        (exaone_moe, {"n_group": 2}, "5 experts in 2 groups"),
        (exaone_moe, {"attention_bias": True}, "sets attention_bias to true"),
        (hy_v3, {"route_norm": False}, "route_norm false; supported: true"),
        (hy_v3, {"qk_norm": False}, "qk_norm false; supported: true"),
        (hy_v3, {"moe_router_enable_expert_bias": False}, "moe_router_enable_expert_bias false; supported: true"),
        (hy_v3, {"mlp_bias": True}, "mlp_bias true; supported: false"),
        (hy_v3, {"n_group": 2}, "n_group"),
        (hy_v3, {"expert_hidden_dim": 64}, "expert_hidden_dim 64; supported: 9"),
    ],
)  # fmt: skip
def test_what_a_config_may_not_ask_for(make: Make, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModel)) as refused:
        parse(make(**changes))
    assert sentence in str(refused.value)


SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_experts_per_tok": 4,
}


each_family = pytest.mark.parametrize(
    "make", [solar_open, dots1, bailing_moe, exaone_moe, hy_v3], ids=lambda make: make.__name__
)


@pytest.mark.covering(1)
@each_family
@pytest.mark.parametrize("type_name", ["F32", "Q4_K"])
def test_a_gguf_answers_as_its_dequantised_weights(make: Make, type_name: str, tmp_path: Path) -> None:
    # Every expert is chosen, as a rounded score that changed a choice would hide what rounding costs.
    experts = "n_routed_experts" if "n_routed_experts" in make() else "num_experts"
    of_ling = {"topk_group": 2, "moe_shared_expert_intermediate_size": 256} if make is bailing_moe else {}
    config = make(**SIZES, **{experts: 4}, **of_ling)
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
    expected = parse(config)
    found = open_model(path).config
    assert found == replace(expected, family=found.family, dense_width=found.dense_width)
    metadata = dict(read_gguf(path).metadata) | {f"{read_gguf(path).text('general.architecture')}.odd": 3}
    with pytest.raises(UnsupportedModel, match="odd"):
        FAMILIES[config["model_type"]].open_gguf(replace(read_gguf(path), metadata=metadata))
