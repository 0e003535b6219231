"""Tensors of quantised weights that are missing, lie or contradict the config are refused by name."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine
from argosy.errors import ArgosyError, CheckpointError, UnsupportedModel
from argosy.model.families import open_model
from tests.families.test_quantization import Damage, entry, renamed, spoil
from tests.helpers.examples import few_of
from tests.models.hub_schemes import KINDS, write_kind
from tests.models.safetensors_file import edit_header
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
    ("ct uint4 group 64", gone("weight_zero_point"), "up_proj.weight_zero_point is missing"),
    ("ct int4 group 128", gone("weight_scale"), "up_proj.weight_scale is missing"),
    ("ct int4 group 128", gone("weight_packed"), "up_proj.weight is missing"),
    ("gptq", gone("qzeros"), "up_proj.qzeros is missing"),
    ("gptq act-order", gone("g_idx"), "up_proj.g_idx is missing"),
    ("ct int4 act-order", gone("weight_g_idx"), "up_proj.weight_g_idx is missing"),
    ("awq", gone("scales"), "up_proj.scales is missing"),
    ("nvfp4", gone("weight_scale_2"), "up_proj.weight_scale_2 is missing"),
    ("ct nvfp4", gone("weight_global_scale"), "up_proj.weight_global_scale is missing"),
    ("ct mxfp4", gone("weight_scale"), "up_proj.weight_scale is missing"),
    ("fp8 tensor", gone("weight_scale"), "up_proj.weight_scale_inv is missing"),
    ("nf4", gone("weight.quant_map"), "up_proj.weight.quant_map is missing"),
    ("nf4", gone("weight.nested_absmax"), "up_proj.weight.nested_absmax is missing"),
    ("nf4", gone("weight.quant_state.bitsandbytes__nf4"), "weight.quant_state.bitsandbytes__nf4 is missing"),
    ("llm.int8", gone("SCB"), "up_proj.SCB is missing"),
    # settings that lie about the tensors
    (
        "nf4",
        settings(load_in_4bit=False, load_in_8bit=True),
        "q_proj.weight is [16384, 1], expected [128, 256]",
    ),
    (
        "llm.int8",
        settings(load_in_4bit=True, load_in_8bit=False),
        "weight is [128, 256], expected [16384, 1]",
    ),
    ("ct int4 group 128", settings(weights__group_size=64), "weight_scale is [128, 2], expected [128, 4]"),
    ("ct int4 group 128", settings(weights__num_bits=8), "weight_packed is [128, 32], expected [128, 64]"),
    ("ct int4 group 128", settings(weights__symmetric=False), "weight_zero_point is missing"),
    ("ct uint4 group 64", settings(weights__symmetric=True), ".weight_zero_point [16, 4]"),
    ("ct w8a8", settings(weights__strategy="group", weights__group_size=32), "weight_scale is ["),
    ("gptq", settings(group_size=32), "scales is [2, 128], expected [8, 128]"),
    ("gptq", settings(bits=8), "qweight is [32, 128], expected [64, 128]"),
    ("gptq", settings(bits=2), "qweight is [32, 128], expected [16, 128]"),
    ("awq", settings(group_size=128), "scales is ["),
    ("fp8 block 64", settings(weight_block_size=[128, 128]), "weight_scale_inv is ["),
    ("fp8 block 64", settings(weight_block_size=[64, 48]), "supported: blocks of whole groups of 32 columns"),
    ("fp8 block 64", settings(weight_block_size=None), "weight_scale_inv is ["),
    ("nvfp4", settings(quant_algo="FP8"), "F16, U8, F8_E8M0, found F8_E4M3"),
    ("fp8 tensor", settings(quant_algo="NVFP4"), "q_proj.weight is [128, 256], expected [128, 128]"),
    (
        "gptq",
        settings(modules_to_not_convert=["model.layers.0.mlp"]),
        "the quantization_config of config.json says that it is not",
    ),
    # shapes and dtypes
    ("nf4", shaped("weight.absmax", 256, 2), "weight.absmax is [256, 2], expected [512]"),
    ("nf4", typed("weight.absmax", "I8"), "weight.absmax is I8; supported: F32"),
    ("nf4", typed("weight.quant_state.bitsandbytes__nf4", "I8"), "__nf4 is I8; supported: U8"),
    ("nf4", shaped("weight.quant_state.bitsandbytes__nf4", 1, 170), "__nf4 is [1, 170], expected [170]"),
    ("llm.int8", typed("SCB", "I32"), "up_proj.SCB is I32; supported: F32"),
    ("gptq", shaped("g_idx", 128, 2), "g_idx is [128, 2], expected [256]"),
    ("gptq act-order", shaped("g_idx", 128, 2), "g_idx is [128, 2], expected [256]"),
    ("gptq act-order", typed("g_idx", "F32"), "g_idx is F32; supported: I32"),
    ("ct int4 act-order", shaped("weight_g_idx", 64, 4), "weight_g_idx is [64, 4], expected [256]"),
    ("ct int4 group 128", shaped("weight_packed", 2**31, 2**31), "up_proj.weight_packed"),
    ("nvfp4", shaped("weight_scale_2", 1, 1), "weight_scale_2 is [1, 1], expected []"),
    ("ct int4 group 32 f16", typed("weight_packed", "F32"), "weight_packed is F32; supported: I32"),
    ("ct int4 group 32 f16", typed("weight_scale", "I16"), "supported: scales in F16 or BF16, found I16"),
    ("nvfp4", typed("weight_scale", "U8"), "weight_scale is U8; supported: F8_E4M3"),
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
    write_kind(tmp_path / "model", CONFIG, KINDS["nvfp4"], seed=1)
    renamed(UP + "input_scale", UP + name)(tmp_path / "model")
    with pytest.raises(CheckpointError, match=f"up_proj.{name} .* has no such tensor"):
        open_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("kind", "name", "value", "sentence"),
    [
        ("nvfp4", "weight_scale_2", np.float32(np.nan).tobytes(), "not a finite number"),
        ("nvfp4", "weight_scale_2", np.float32(np.inf).tobytes(), "not a finite number"),
        ("ct nvfp4", "weight_global_scale", np.float32(0).tobytes(), "not a finite number"),
        ("nvfp4", "weight_scale", b"\x7f", "not a finite number"),
        ("ct int4 group 128", "weight_scale", b"\xc0\x7f", "not a finite number"),
        ("gptq", "scales", b"\x00\x7c", "not a finite number"),
        ("fp8 channel", "weight_scale", b"\x80\x7f", "not a finite number"),
        ("mxfp8", "weight_scale", b"\xff", "not a finite number"),
        ("fp8 tensor", "weight", b"\x7f", "not a finite number"),
        ("nf4", "weight.quant_map", np.float32(2).tobytes(), "not a finite number"),
        ("nf4", "weight.nested_absmax", np.float32(np.nan).tobytes(), "not a finite number"),
        ("nf4", "weight.nested_quant_map", np.float32(0.5).tobytes(), "are not those of bitsandbytes"),
        ("nf4", "weight.quant_state.bitsandbytes__nf4", b" ", "a quant_state of another shape"),
        (
            "nf4 without double quantisation",
            "weight.absmax",
            np.float32(np.inf).tobytes(),
            "not a finite number",
        ),
        ("llm.int8", "SCB", np.float32(-np.inf).tobytes(), "not a finite number"),
        ("llm.int8", "weight_format", b"\x01", "another weight_format than 0"),
        ("ct int4 group 128", "weight_scale", np.float32(3e38).tobytes()[2:], "not a finite number"),
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


@pytest.mark.parametrize(
    ("kind", "index"),
    [
        *(("gptq", index) for index in (1, -1, 2**31 - 1)),
        *(("gptq act-order", index) for index in (0, 2, -1, 8, 2**31 - 1)),  # it is 5
        *(("ct int4 act-order", index) for index in (-1, 8)),
    ],
)
def test_columns_that_a_file_says_belong_to_another_group_are_refused(
    kind: str, index: int, tmp_path: Path
) -> None:
    write_kind(tmp_path / "model", CONFIG, KINDS[kind], seed=1)
    name = UP + ("weight_g_idx" if kind.startswith("ct") else "g_idx")
    spoil(tmp_path / "model", name, 8, np.int32(index).tobytes())
    with (
        pytest.raises(CheckpointError, match="layer 0, expert 1: "),
        Engine.open(tmp_path / "model", memory="4GiB", threads=1) as engine,
    ):
        engine.logits(prompt_ids(CONFIG, 1, 16))


def test_act_order_that_the_settings_deny_is_refused(tmp_path: Path) -> None:
    write_kind(tmp_path / "model", CONFIG, KINDS["gptq act-order"], seed=1)
    settings(desc_act=False)(tmp_path / "model")
    with (
        pytest.raises(CheckpointError, match=r"not in order \(act-order\), though the settings say"),
        Engine.open(tmp_path / "model", memory="4GiB", threads=1) as engine,
    ):
        engine.logits(prompt_ids(CONFIG, 1, 16))


def test_a_scale_of_zero_makes_its_weights_zero(tmp_path: Path) -> None:
    write_kind(tmp_path / "model", CONFIG, KINDS["ct int4 group 128"], seed=1)
    spoil(tmp_path / "model", UP + "weight_scale", 0, b"\0\0")
    with Engine.open(tmp_path / "model", memory="4GiB", threads=1) as engine:
        assert np.isfinite(engine.logits(prompt_ids(CONFIG, 1, 16))).all()


ODD_VALUES: list[Any] = [
    None, 0, -1, 1, 3, 2**31, 2**63, 1.5, True, False, "", "x", "re:.*", [], {}, ["re:.*"], [128, 128], {"bits": 4},
]  # fmt: skip


def mutate(settings: Any, rng: np.random.Generator) -> None:
    """Change, add or remove one value anywhere in a settings object."""
    while True:
        inner = [value for value in settings.values() if isinstance(value, dict) and value]
        if not inner or rng.random() < 0.4:
            break
        settings = inner[rng.integers(len(inner))]
    keys = [*settings, "surprise"]
    key = keys[rng.integers(len(keys))]
    if rng.random() < 0.2 and key in settings:
        del settings[key]
    else:
        settings[key] = ODD_VALUES[rng.integers(len(ODD_VALUES))]


def mutate_header(header: dict[str, dict[str, Any]], rng: np.random.Generator) -> None:
    """Change the shape, dtype or name of a tensor, in its own bytes."""
    name = list(header)[rng.integers(len(header))]
    one = header[name]
    match rng.integers(4):
        case 0:
            one["shape"] = one["shape"][::-1]
        case 1:
            one["shape"] = [math.prod(one["shape"])]
        case 2:
            sizes = {
                "U8": ("I8", "F8_E4M3", "F8_E8M0"),
                "I32": ("U32", "F32"),
                "BF16": ("F16", "I16"),
                "F32": ("I32",),
            }
            others = sizes.get(one["dtype"], ("U8",))
            one["dtype"] = others[rng.integers(len(others))]
        case _:
            header["other." + name] = header.pop(name)


@pytest.mark.parametrize("num_mutations", [12, pytest.param(200, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "name", few_of(KINDS, ("ct uint4 group 64", "modelopt mixed", "gptq", "fp8 block 64"))
)
def test_mutated_settings_and_headers_are_refused_or_harmless(
    name: str, num_mutations: int, tmp_path: Path
) -> None:
    write_kind(tmp_path / "model", CONFIG, KINDS[name], seed=1)
    config_file, weights = tmp_path / "model" / "config.json", tmp_path / "model" / "model.safetensors"
    text, data = config_file.read_text(), weights.read_bytes()
    rng = np.random.default_rng(num_mutations)
    for number in range(num_mutations):
        config_file.write_text(text)
        weights.write_bytes(data)
        if number % 2:
            config = json.loads(text)
            mutate(config["quantization_config"], rng)
            config_file.write_text(json.dumps(config))
        else:
            edit_header(weights, lambda header: mutate_header(header, rng))
        with contextlib.suppress(CheckpointError, UnsupportedModel):
            open_model(tmp_path / "model")
