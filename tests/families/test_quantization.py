"""`quantization_config` is read strictly, and checked against the tensors in the files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine
from argosy.checkpoint.pack import pack
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import open_model
from argosy.model.reading.quantization import Quantization, read_quantization
from tests.models.hub_quantised import FP8, INT4, write_fp8_model, write_int4_model
from tests.models.safetensors_file import edit_header, read_header
from tests.models.tiny import prompt_ids, qwen3_moe
from tests.models.tiny_latent import kimi_k25

CONFIG = qwen3_moe(hidden_size=140, moe_intermediate_size=136, num_hidden_layers=2, num_experts=4)
INT4_CONFIG = qwen3_moe(hidden_size=96, moe_intermediate_size=64, num_hidden_layers=2, num_experts=4)
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def changed(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A changed copy; `group__key` sets a key in an INT4 config's only group, `weights__key` one in its weights."""
    config = copy.deepcopy(base)
    for key, value in changes.items():
        where, _, inner = key.rpartition("__")
        target = config
        if where:
            target = config["config_groups"]["group_0"]
            target = target["weights"] if where == "weights" else target
        target[inner] = value
    return config


@pytest.mark.parametrize(
    ("given", "method", "num_excluded"),
    [
        (FP8, "fp8", 3),
        # MiniMax-M2
        (
            changed(FP8, fmt="float8_e4m3fn", modules_to_not_convert=["gate", "lm_head"]),
            "fp8",
            2,
        ),
        # DeepSeek-V3.1
        (changed(FP8, scale_fmt="ue8m0", ignored_layers=["lm_head"]), "fp8", 4),
        (INT4, "int4", 4),
        (changed(INT4, quantization_status=None, version="0.12.0", global_compression_ratio=None), "int4", 4),
        (MXFP4, "mxfp4", 1),
    ],
)
def test_supported_configs_are_read(given: dict[str, Any], method: str, num_excluded: int) -> None:
    found = read_quantization({"quantization_config": given})
    assert found is not None
    assert (found.method, len(found.excluded)) == (method, num_excluded)
    assert read_quantization({"text_config": {"quantization_config": given}}) == found
    assert (
        read_quantization({"quantization_config": given, "text_config": {"quantization_config": given}})
        == found
    )


def test_no_quantization_config_is_none() -> None:
    assert read_quantization({}) is None
    assert read_quantization({"quantization_config": None, "text_config": {}}) is None


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantization_config 'gptq'"),
        ({"quant_method": "awq"}, "quantization_config 'awq'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantization_config 'modelopt'"),
        ({"quant_algo": "NVFP4"}, "quantization_config 'NVFP4'"),
        ({"quant_method": "bitsandbytes"}, "quantization_config 'bitsandbytes'"),
        ([], "quantization_config []"),
        (changed(FP8, weight_block_size=None), "quantization_config.weight_block_size null"),
        (changed(FP8, weight_block_size=[1, 128]), "quantization_config.weight_block_size [1, 128]"),
        (changed(FP8, activation_scheme="static"), "quantization_config.activation_scheme 'static'"),
        (changed(FP8, fmt="e5m2"), "quantization_config.fmt 'e5m2'"),
        (changed(FP8, surprise=1), "quantization_config.surprise 1"),
        (changed(INT4, format="float-quantized"), "quantization_config.format 'float-quantized'"),
        (changed(INT4, config_groups={}), "quantization_config.config_groups {}"),
        (changed(INT4, kv_cache_scheme={"num_bits": 8}), "quantization_config.kv_cache_scheme"),
        (changed(INT4, sparsity_config={"format": "dense"}), "quantization_config.sparsity_config"),
        (changed(INT4, weights__num_bits=8), "config_groups.group_0.weights.num_bits 8"),
        (changed(INT4, weights__symmetric=False), "config_groups.group_0.weights.symmetric false"),
        (changed(INT4, weights__group_size=128), "config_groups.group_0.weights.group_size 128"),
        (changed(INT4, weights__strategy="channel"), "config_groups.group_0.weights.strategy 'channel'"),
        (changed(INT4, weights__type="float"), "config_groups.group_0.weights.type 'float'"),
        (changed(INT4, weights__actorder="group"), "config_groups.group_0.weights.actorder 'group'"),
        (changed(INT4, group__targets=["Embedding"]), "config_groups.group_0.targets ['Embedding']"),
        (changed(INT4, group__input_activations={"num_bits": 8}), "config_groups.group_0.input_activations"),
        (changed(MXFP4, dequantize=True), "quantization_config.dequantize true"),
    ],
)
def test_other_configs_are_refused_by_name_with_the_supported_ones(given: Any, asked: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        read_quantization({"quantization_config": given})
    assert asked in str(caught.value)
    assert "supported: fp8 with weight_block_size [128, 128], compressed-tensors pack-quantized" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            changed(FP8, modules_to_not_convert="lm_head"),
            "modules_to_not_convert is lm_head; expected a list",
        ),
        (
            changed(INT4, ignore=["re:(", "lm_head"]),
            "ignore has 're:(', which is not a valid regular expression",
        ),
        (
            changed(FP8, ignored_layers=["re:["]),
            "ignored_layers has 're:[', which is not a valid regular expression",
        ),
        (
            changed(MXFP4, modules_to_not_convert=["re:*"]),
            "modules_to_not_convert has 're:*', which is not a valid regular",
        ),
        (changed(INT4, ignore=["re:(a+)+$"]), "has 're:(a+)+$', which repeats a group"),
        (changed(INT4, ignore=["re:(a|b){9}"]), "which repeats a group"),
        (
            changed(INT4, ignore=["re:(?x)(a+) +"]),
            "which repeats a group, or opens one with (? other than",
        ),
        (changed(INT4, ignore=[r"re:[\][](a+)+]"]), "which repeats a group"),
        (changed(INT4, ignore=["re:.*a.*b.*c.*d"]), "which has more than 3 repetitions or 8 alternatives"),
        (changed(INT4, ignore=["re:" + "(a|a)" * 9]), "which has more than 3 repetitions or 8 alternatives"),
        (changed(FP8, ignored_layers=["re:" + "(" * 500 + "a" + ")" * 500]), "which has more than 64 groups"),
    ],
)
def test_invalid_or_costly_module_lists_are_refused(given: Any, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_quantization({"quantization_config": given})
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "expression",
    [
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        r"re:model\.layers\.\d+\.mlp\.experts\.[0-9]+\..*",
        r"re:^(?!.*experts).*$",
        r"re:(?:a|b)[*+?]\*[]+]",
    ],
)
def test_expressions_in_released_checkpoints_are_accepted(expression: str) -> None:
    found = read_quantization({"quantization_config": changed(INT4, ignore=[expression])})
    assert found == Quantization("int4", (expression,))


def test_two_different_configs_are_refused() -> None:
    with pytest.raises(CheckpointError, match="two different values of quantization_config"):
        read_quantization({"quantization_config": FP8, "text_config": {"quantization_config": INT4}})


@pytest.mark.parametrize(
    ("name", "module", "excluded"),
    [
        ("lm_head", "lm_head", True),
        ("gate", "model.layers.3.mlp.gate", True),
        ("gate", "model.layers.3.mlp.gate_proj", False),
        ("model.layers.3.mlp.gate", "model.layers.3.mlp.gate_proj", False),
        ("model.layers.3", "model.layers.3.mlp.up_proj", True),
        ("model.layers.3", "model.layers.30.mlp.up_proj", False),
        ("re:.*self_attn.*", "model.layers.0.self_attn.o_proj", True),
        ("re:.*self_attn.*", "model.layers.0.mlp.up_proj", False),
    ],
)
def test_an_excluded_name_covers_the_module_and_its_children(name: str, module: str, excluded: bool) -> None:
    assert Quantization("fp8", (name,)).excludes(module) is excluded


@pytest.mark.parametrize(
    ("name", "module", "excluded"),
    [
        ("re:model.layers.1", "model.layers.10.mlp.up_proj", True),
        ("re:model.layers.1$", "model.layers.10.mlp.up_proj", False),
        ("re:self_attn", "model.layers.0.self_attn.o_proj", False),
        ("lm_head", "lm_head", True),
        ("gate", "model.layers.3.mlp.gate", False),
        ("model.layers.3", "model.layers.3.mlp.up_proj", False),
    ],
)
def test_compressed_tensors_names_match_as_in_its_own_library(name: str, module: str, excluded: bool) -> None:
    assert Quantization("int4", (name,)).excludes(module) is excluded


def test_a_wrapper_s_config_applies_to_its_text_model(tmp_path: Path) -> None:
    config = kimi_k25(hidden_size=64, moe_intermediate_size=32)
    write_int4_model(tmp_path / "model", config, seed=1)  # at the top
    top = json.loads((tmp_path / "model" / "config.json").read_text())
    assert open_model(tmp_path / "model").expert_format == "int4"
    top["text_config"]["quantization_config"] = top.pop("quantization_config")
    (tmp_path / "model" / "config.json").write_text(json.dumps(top))
    assert open_model(tmp_path / "model").expert_format == "int4"


# Damaged checkpoints

EXPERT = "model.layers.1.mlp.experts.2.up_proj."
Damage = Callable[[Path], None]


def rewrite_config(**changes: Any) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] = (
            None if changes.get("none") else config["quantization_config"] | changes
        )
        path.write_text(json.dumps(config))

    return damage


def entry(name: str, edit: Callable[[dict[str, Any]], None]) -> Damage:
    return lambda directory: edit_header(directory / "model.safetensors", lambda header: edit(header[name]))


def renamed(name: str, new: str) -> Damage:
    def edit(header: dict[str, Any]) -> None:
        header[new] = header.pop(name)

    return lambda directory: edit_header(directory / "model.safetensors", edit)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (renamed(EXPERT + "weight_scale_inv", "model.layers.0.other"), "up_proj.weight_scale_inv is missing"),
        (
            entry(EXPERT + "weight_scale_inv", lambda e: e.update(shape=[4, 1])),
            "weight_scale_inv is [4, 1], expected [2, 2]",
        ),
        (
            entry(EXPERT + "weight_scale_inv", lambda e: e.update(dtype="I32")),
            "weight_scale_inv is I32; supported: F32, BF16",
        ),
        (
            entry(EXPERT + "weight", lambda e: e.update(dtype="F8_E5M2")),
            "up_proj.weight is F8_E5M2; supported",
        ),
        (
            rewrite_config(none=True),
            "is F8_E4M3, quantised as fp8, but config.json has no quantization_config",
        ),
        (
            rewrite_config(modules_to_not_convert=["model.layers.1.mlp.experts"]),
            "experts.0.gate_proj.weight is F8_E4M3, but the quantization_config of config.json says that it is not",
        ),
    ],
)
def test_a_damaged_fp8_checkpoint_is_refused_by_name(damage: Damage, sentence: str, tmp_path: Path) -> None:
    write_fp8_model(tmp_path / "model", CONFIG, seed=1)
    damage(tmp_path / "model")
    with pytest.raises(CheckpointError) as caught:
        open_model(tmp_path / "model")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (renamed(EXPERT + "weight_scale", "model.layers.0.other"), "up_proj.weight_scale is missing"),
        (renamed(EXPERT + "weight_shape", "model.layers.0.other"), "up_proj.weight_shape is missing"),
        (renamed(EXPERT + "weight_packed", "model.layers.0.other"), "up_proj.weight is missing"),
        (
            entry(EXPERT + "weight_scale", lambda e: e.update(shape=[32, 6])),
            "weight_scale is [32, 6], expected [64, 3]",
        ),
        (
            entry(EXPERT + "weight_packed", lambda e: e.update(dtype="F32")),
            "weight_packed is F32; supported: I32",
        ),
        (
            rewrite_config(ignore=["re:.*experts.2.*"]),
            "experts.2.gate_proj.weight_packed is I32, but the quantization_config of config.json says that it",
        ),
    ],
)
def test_a_damaged_int4_checkpoint_is_refused_by_name(damage: Damage, sentence: str, tmp_path: Path) -> None:
    write_int4_model(tmp_path / "model", INT4_CONFIG, seed=1)
    damage(tmp_path / "model")
    with pytest.raises(CheckpointError) as caught:
        open_model(tmp_path / "model")
    assert sentence in str(caught.value)


def test_int4_columns_that_are_not_whole_groups_are_refused_by_name(tmp_path: Path) -> None:
    write_int4_model(tmp_path / "model", INT4_CONFIG | {"moe_intermediate_size": 72}, seed=1)
    with pytest.raises(
        UnsupportedModel, match=r"down_proj\.weight_packed has 72 columns; supported: whole groups of 32"
    ):
        open_model(tmp_path / "model")


def spoil(directory: Path, name: str, at: int, value: bytes) -> None:
    path = directory / "model.safetensors"
    header, begin = read_header(path)
    with path.open("r+b") as file:
        file.seek(begin + header[name]["data_offsets"][0] + at)
        file.write(value)


def run_every_expert(directory: Path, slots: int | None) -> None:
    with Engine.open(directory, memory="4GiB", threads=1, expert_slots=slots) as engine:
        for seed in range(8):
            engine.logits(prompt_ids(CONFIG, seed, 64))


SPOILED = [
    (EXPERT + "weight", 77, b"\x7f"),
    (EXPERT + "weight", 136 * 140 - 1, b"\xff"),
    (EXPERT + "weight_scale_inv", 12, np.float32(np.nan).tobytes()),
    (EXPERT + "weight_scale_inv", 0, np.float32(np.inf).tobytes()),
    ("model.layers.1.self_attn.o_proj.weight", 140 * 64 - 3, b"\x7f"),
]


@pytest.mark.parametrize(("name", "at", "value"), SPOILED)
@pytest.mark.parametrize("slots", [None, 2])
def test_codes_and_scales_that_are_not_finite_are_named_when_loaded(
    name: str, at: int, value: bytes, slots: int | None, tmp_path: Path
) -> None:
    write_fp8_model(tmp_path / "model", CONFIG, seed=1)
    spoil(tmp_path / "model", name, at, value)
    where = "layer 1, expert 2: " if name.startswith(EXPERT) else name + ": "
    with pytest.raises(CheckpointError) as caught:
        run_every_expert(tmp_path / "model", slots)
    assert where in str(caught.value)
    assert "hold a code or scale that is not a finite number" in str(caught.value)


@pytest.mark.parametrize(("name", "at", "value"), SPOILED)
@pytest.mark.parametrize("format", ["source", "q8"])
def test_codes_and_scales_that_are_not_finite_are_not_packed(
    name: str, at: int, value: bytes, format: str, tmp_path: Path
) -> None:
    write_fp8_model(tmp_path / "model", CONFIG, seed=1)
    spoil(tmp_path / "model", name, at, value)
    where = "up of expert 2 in layer 1" if name.startswith(EXPERT) else name
    with pytest.raises(CheckpointError, match=f"{where}.*not a finite number"):
        pack(open_model(tmp_path / "model"), tmp_path / "packed", format=format)
