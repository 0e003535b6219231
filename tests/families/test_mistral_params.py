"""Mistral's own `params.json`, read as a config.json of `mistral4`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.reading.mistral_params import find_config, read_raw
from tests.families.hub_configs import MISTRAL_LARGE_3, RawConfig


def translated(directory: Path, params: RawConfig) -> RawConfig:
    (directory / "params.json").write_text(json.dumps(params))
    raw, path = read_raw(directory)
    assert path.name == "params.json"
    return raw


def test_every_key_has_its_name_in_config_json(tmp_path: Path) -> None:
    assert translated(tmp_path, MISTRAL_LARGE_3) == {
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 16_384,
        "kv_lora_rank": 512,
        "max_position_embeddings": 294_912,
        "model_type": "mistral4",
        "moe_intermediate_size": 4096,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_attention_heads": 128,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "qk_head_dim": 192,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": MISTRAL_LARGE_3["quantization_config"],
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 36,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 10_000.0,
            "rope_type": "yarn",
        },
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "v_head_dim": 128,
        "vision_config": MISTRAL_LARGE_3["vision_encoder"],
        "image_token_id": 10,
        "vocab_size": 131_072,
    }


def test_a_config_json_comes_first(tmp_path: Path) -> None:
    assert find_config(tmp_path).name == "config.json"
    translated(tmp_path, MISTRAL_LARGE_3)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    assert read_raw(tmp_path) == ({"model_type": "mixtral"}, tmp_path / "config.json")


def test_fp8_with_one_scale_a_matrix_is_the_method_fp8(tmp_path: Path) -> None:
    params = {key: value for key, value in MISTRAL_LARGE_3.items() if key != "quantization_config"}
    own = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    assert translated(tmp_path, params | {"quantization": own})["quantization_config"] == {
        "quant_method": "fp8"
    }


def within(name: str, **changes: Any) -> RawConfig:
    return MISTRAL_LARGE_3 | {name: MISTRAL_LARGE_3[name] | changes}


def test_switches_that_are_off_change_nothing(tmp_path: Path) -> None:
    plain = translated(tmp_path, MISTRAL_LARGE_3)
    off = within("moe", renorm_strategy="WEIGHTS", use_load_balancing_bias=False) | {
        "sliding_window": None, "model_type": "transformer",
    }  # fmt: skip
    assert translated(tmp_path, off) == plain
    assert translated(tmp_path, within("moe", renorm_strategy="SCORES"))["moe.renorm_strategy"] == "SCORES"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (within("yarn", apply_scale=True), "params.json asks for yarn.apply_scale True; supported: false"),
        (MISTRAL_LARGE_3 | {"yarn": {"factor": 2}}, "yarn.apply_scale True; supported: false"),
        (MISTRAL_LARGE_3 | {"yarn": 4}, "params.json asks for yarn 4; supported: an object"),
        (within("llama_4_scaling", original_max_position_embeddings=4096), "4096; supported: that of yarn"),
        (MISTRAL_LARGE_3 | {"quantization": {"qformat_weight": "int4"}}, "quantization.qformat_weight int4"),
        (MISTRAL_LARGE_3 | {"moe": None}, "describes a model with latent attention alone"),
        (MISTRAL_LARGE_3 | {"kv_lora_rank": None}, "a model with experts alone; supported"),
    ],
)
def test_what_params_json_may_not_ask_for(tmp_path: Path, params: RawConfig, message: str) -> None:
    with pytest.raises(UnsupportedModel) as refused:
        translated(tmp_path, params)
    assert message in str(refused.value)


def test_a_damaged_params_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"params\.json"):
        read_raw(tmp_path)
