"""Tensors of quantised weights that are missing, lie or contradict the config are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from argosy import Engine
from argosy.errors import ArgosyError, CheckpointError, UnsupportedModel
from argosy.model.families import open_model
from tests.families.test_quantization import Damage, entry, renamed, spoil
from tests.models.hub_schemes import KINDS, write_kind
from tests.models.tiny import prompt_ids, qwen3_moe

CONFIG = qwen3_moe(
    hidden_size=256, head_dim=32, num_attention_heads=4, num_key_value_heads=2, moe_intermediate_size=128,
    num_hidden_layers=1, num_experts=3, num_experts_per_tok=2,
)  # fmt: skip
UP = "model.layers.0.mlp.experts.1.up_proj."


def settings(**changes: Any) -> Damage:
    """Change the config; `weights__key` is a key of the weights of the only group of compressed-tensors."""

    def damage(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            own = config["quantization_config"]
            if key.startswith("weights__"):
                own = own["config_groups"]["group_0"]["weights"]
            own[key.removeprefix("weights__")] = value
        path.write_text(json.dumps(config))

    return damage


def gone(name: str) -> Damage:
    return renamed(UP + name, "model.layers.0.other")


def shaped(name: str, *shape: int) -> Damage:
    return entry(UP + name, lambda one: one.update(shape=list(shape)))


def typed(name: str, dtype: str) -> Damage:
    return entry(UP + name, lambda one: one.update(dtype=dtype))


DAMAGES: list[tuple[str, Damage, str]] = [
    # parts that are missing
    ("ct mxfp4", gone("weight_scale"), "up_proj.weight_scale is missing"),
    ("fp8 tensor", gone("weight_scale"), "up_proj.weight_scale_inv is missing"),
    # settings that lie about the tensors
    ("fp8 block 64", settings(weight_block_size=[128, 128]), "weight_scale_inv is ["),
    ("fp8 block 64", settings(weight_block_size=[64, 48]), "supported: blocks of whole groups of 32 columns"),
    ("fp8 block 64", settings(weight_block_size=None), "weight_scale_inv is ["),
    # shapes and dtypes
    ("fp8 tensor", typed("weight_scale", "I32"), "scales in F32, BF16, F16, U8, F8_E8M0, found I32"),
    ("fp8 tensor", typed("weight", "F8_E5M2"), "up_proj.weight is F8_E5M2; supported: F8_E4M3"),
]


@pytest.mark.parametrize(("name", "damage", "sentence"), DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(
    name: str, damage: Damage, sentence: str, tmp_path: Path
) -> None:
    write_kind(tmp_path / "model", CONFIG, KINDS[name], seed=1)
    damage(tmp_path / "model")
    with pytest.raises(ArgosyError) as caught:
        open_model(tmp_path / "model")
    assert isinstance(caught.value, CheckpointError | UnsupportedModel)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("name", ["pre_quant_scale", "svdquant_lora_a", "weight_zero_point", "weight_g_idx"])
def test_a_part_that_would_change_the_weights_is_refused(name: str, tmp_path: Path) -> None:
    write_kind(tmp_path / "model", CONFIG, KINDS["fp8 tensor"], seed=1)
    renamed(UP + "input_scale", UP + name)(tmp_path / "model")
    with pytest.raises(CheckpointError, match=f"up_proj.{name} .* has no such tensor"):
        open_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("kind", "name", "value", "sentence"),
    [
        ("fp8 channel", "weight_scale", b"\x80\x7f", "not a finite number"),
        ("mxfp8", "weight_scale", b"\xff", "not a finite number"),
        ("fp8 tensor", "weight", b"\x7f", "not a finite number"),
    ],
)
@pytest.mark.parametrize("slots", [None, 2])
def test_codes_and_scales_that_are_not_finite_are_named_when_loaded(
    kind: str, name: str, value: bytes, sentence: str, slots: int | None, tmp_path: Path
) -> None:
    write_kind(tmp_path / "model", CONFIG, KINDS[kind], seed=1)
    spoil(tmp_path / "model", UP + name, 0, value)
    with (
        pytest.raises(CheckpointError) as caught,
        Engine.open(tmp_path / "model", memory="4GiB", threads=1, expert_slots=slots) as engine,
    ):
        engine.logits(prompt_ids(CONFIG, 1, 16))
    assert "layer 0, expert 1: " in str(caught.value)
    assert sentence in str(caught.value)
