"""gpt-oss: the meaning of its config, the layout of its tensors, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine
from argosy.checkpoint.pack import pack
from argosy.config import ActivationConfig, ModelConfig, RouterConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES, open_model
from argosy.model.rope import angle_scale
from tests.helpers.mixers import windows
from tests.models.hub_quantised import FP8
from tests.models.safetensors_file import Array, decode, encode, write_checkpoint
from tests.models.tiny import RawConfig, gpt_oss, random_tensors, write_model


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES["gpt_oss"].parse_config(raw)


def without(raw: RawConfig, *keys: str) -> RawConfig:
    return {key: value for key, value in raw.items() if key not in keys}


def test_the_hub_s_config_is_read() -> None:
    config = parse(gpt_oss())

    assert windows(config) == [8, 0, 8]
    assert all(layer.is_moe for layer in config.layers)
    assert config.router == RouterConfig(has_bias=True, renormalize=True)
    assert config.activation == ActivationConfig(kind="clamped", limit=7.0, alpha=1.702)
    assert all(
        (
            config.attention.has_qkv_bias,
            config.attention.has_o_bias,
            config.attention.has_sinks,
            config.has_expert_bias,
        )
    )
    assert (config.attention.head_dim, config.expert_width, config.num_experts, config.experts_per_token) == (
        12,
        18,
        5,
        2,
    )
    assert (
        config.attention.rope.kind,
        config.attention.rope.truncate,
        config.attention.rope.original_context,
    ) == ("yarn", False, 16)
    assert config.eos_ids == (2,)
    assert config.bos_id is None


def test_an_absent_key_has_the_default_of_the_config_class() -> None:
    config = parse({"model_type": "gpt_oss"})

    assert (config.vocab_size, config.hidden_size, config.num_layers) == (201_088, 2880, 36)
    assert (
        config.attention.num_heads,
        config.attention.num_kv_heads,
        config.attention.head_dim,
        config.expert_width,
    ) == (64, 8, 64, 2880)
    assert (config.num_experts, config.experts_per_token, config.context_tokens) == (128, 4, 131_072)
    assert windows(config) == [128, 0] * 18
    assert (
        config.attention.rope.theta,
        config.attention.rope.factor,
        config.attention.rope.original_context,
    ) == (150_000.0, 32.0, 4096)
    assert angle_scale(config.attention.rope) == pytest.approx(1.3466, abs=1e-4)
    assert (config.activation.limit, config.activation.alpha) == (7.0, 1.702)
    assert all((config.attention.has_qkv_bias, config.attention.has_o_bias))


def test_yarn_is_the_default_and_can_be_turned_off() -> None:
    plain = without(gpt_oss(), "rope_scaling", "initial_context_length")
    assert parse(plain).attention.rope.kind == "yarn"
    assert parse(plain | {"rope_scaling": None}).attention.rope.kind == "yarn"
    assert parse(plain | {"rope_parameters": {"rope_type": "default"}}).attention.rope.kind == "default"


def test_layers_alternate_unless_layer_types_says_otherwise() -> None:
    assert windows(parse(gpt_oss(layer_types=None))) == [8, 0, 8]
    assert windows(parse(gpt_oss(layer_types=["full_attention"] * 3))) == [0, 0, 0]
    assert windows(parse(gpt_oss(layer_types=["full_attention"] * 3, sliding_window=None))) == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sliding_window": None}, "asks for sliding attention in layer 0, but sliding_window is null"),
        ({"experts_per_token": 3}, "experts_per_token, its other name, as 3"),
        ({"initial_context_length": 17}, "asks for initial_context_length 17; supported: 16"),
        ({"swiglu_limit": -1.0}, "swiglu_limit is -1.0"),
        ({"hidden_act": "gelu"}, "asks for hidden_act 'gelu'"),
        ({"num_shared_experts": 1}, "sets num_shared_experts to 1, but gpt_oss does not know this key"),
    ],
)
def test_unsupported_features_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModel)) as caught:
        parse(gpt_oss(**changes))
    assert sentence in str(caught.value)


Change = Callable[[dict[str, Array]], None]


def write(directory: Path, change: Change | None = None) -> Path:
    tensors = random_tensors(gpt_oss(), 3, "BF16")
    if change is not None:
        change(tensors)
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(gpt_oss()))
    write_checkpoint(directory, {name: ("BF16", tensor) for name, tensor in tensors.items()})
    return directory


def test_a_pack_holds_the_weights_of_transposed_experts_bit_for_bit(tmp_path: Path) -> None:
    tensors = random_tensors(gpt_oss(), 3, "BF16")
    pack(open_model(write(tmp_path / "source")), tmp_path / "packed", format="source")
    files = open_model(tmp_path / "packed")

    for (layer, expert), record in files.experts.items():
        stored = np.fromfile(record.pieces[0].path, np.uint8)[record.pieces[0].offset :]
        experts = f"model.layers.{layer}.mlp.experts."
        gate_up = tensors[experts + "gate_up_proj"][expert]
        expected = gate_up[:, 0::2].T, gate_up[:, 1::2].T, tensors[experts + "down_proj"][expert].T
        for matrix, values in zip(record.matrices, expected, strict=True):
            raw = stored[matrix.offset :][: 2 * matrix.rows * matrix.cols].view("<u2")
            np.testing.assert_array_equal(raw.reshape(matrix.rows, matrix.cols), encode("BF16", values))
    for layer in range(3):
        both = tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj_bias"]
        for turn, name in enumerate(("expert_gate_bias", "expert_up_bias")):
            ref = files.dense[f"layers.{layer}.{name}"]
            found = np.fromfile(ref.path, np.uint8)[ref.offset : ref.offset + ref.nbytes].view("<u2")
            np.testing.assert_array_equal(decode("BF16", found).reshape(5, 18), both[:, turn::2])


def test_transposed_experts_run_from_a_pack_only(tmp_path: Path) -> None:
    write_model(tmp_path, gpt_oss(), seed=1)
    with pytest.raises(UnsupportedModel, match="keeps its experts transposed") as caught:
        Engine.open(tmp_path, memory="4GiB", threads=1)
    assert "argosy pack" in str(caught.value.hint)


def drop(name: str) -> Change:
    return lambda tensors: tensors.__delitem__(name)


def add(name: str) -> Change:
    return lambda tensors: tensors.update({name: np.zeros((2, 2), np.float32)})


def cut(name: str) -> Change:
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (drop("model.layers.1.self_attn.sinks"), "model.layers.1.self_attn.sinks is missing"),
        (drop("model.layers.0.mlp.router.bias"), "model.layers.0.mlp.router.bias is missing"),
        (drop("model.layers.2.mlp.experts.down_proj"), "model.layers.2.mlp.experts.down_proj is missing"),
        (cut("model.layers.0.self_attn.sinks"), "model.layers.0.self_attn.sinks is [3], expected [4]"),
        (
            cut("model.layers.0.mlp.experts.gate_up_proj_bias"),
            "model.layers.0.mlp.experts.gate_up_proj_bias is [4, 36], expected [5, 36]",
        ),
        (add("model.layers.0.mlp.experts.extra"), "model.layers.0.mlp.experts.extra"),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path: Path, change: Change, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_model(write(tmp_path, change))
    assert sentence in str(caught.value)


def test_codes_and_scales_where_two_biases_alternate_are_refused(tmp_path: Path) -> None:
    tensors = {name: ("BF16", tensor) for name, tensor in random_tensors(gpt_oss(), 3, "BF16").items()}
    name = "model.layers.0.mlp.experts.gate_up_proj_bias"
    tensors[name] = ("F8_E4M3", tensors[name][1])
    tensors[name + "_scale_inv"] = ("F32", np.ones((1, 1), np.float32))
    quantization = {**FP8, "modules_to_not_convert": []}
    (tmp_path / "config.json").write_text(json.dumps({**gpt_oss(), "quantization_config": quantization}))
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(UnsupportedModel, match=r"gate_up_proj_bias is F8_E4M3"):
        open_model(tmp_path)
