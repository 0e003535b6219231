"""`quantization_config` is read strictly, and checked against the tensors in the files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pytest

from argosy import Engine
from argosy.checkpoint.pack import pack
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import open_model
from argosy.model.reading.quantization import read_quantization
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


def schemes_of(given: Any, *modules: str) -> list[str | None]:
    """Describe the schemes of modules."""
    found = read_quantization({"quantization_config": given})
    assert found is not None
    schemes = [found.scheme_of(module) for module in modules]
    return [None if scheme is None else str(scheme) for scheme in schemes]


def in_groups(num_groups: int, num_expressions: int) -> dict[str, Any]:
    """Groups of compressed-tensors with as many expressions each."""
    group = copy.deepcopy(INT4["config_groups"]["group_0"])
    group["targets"] = [f"re:{number}" for number in range(num_expressions)]
    return changed(INT4, config_groups={f"g{number}": group for number in range(num_groups)})


NVFP4 = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "ignore": ["lm_head", "model.layers.0.self_attn*"],
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
AUTO_ROUND = {
    "quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "packing_format": "auto_round:auto_gptq",
}  # fmt: skip
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP8_CODES = "fp8, 8 bits, symmetric, "
Q, EXPERT_UP, ROUTER = (
    f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.experts.3.up_proj", "mlp.gate")
)


@pytest.mark.parametrize(
    ("given", "q", "up"),
    [
        (FP8, FP8_CODES + "blocks of 128 x 128", ...),
        # MiniMax-M2
        (changed(FP8, fmt="float8_e4m3fn", modules_to_not_convert=["gate"]), FP8_CODES + "blocks of 128 x 128", ...),
        # DeepSeek-V3.1
        (changed(FP8, scale_fmt="ue8m0", ignored_layers=["q_proj"]), None, FP8_CODES + "blocks of 128 x 128"),
        (changed(FP8, weight_block_size=[32, 64], activation_scheme="static"), FP8_CODES + "blocks of 32 x 64", ...),
        (changed(FP8, weight_block_size=None), FP8_CODES + "one scale a matrix", ...),
        (INT4, None, "pack-quantized, 4 bits, symmetric, groups of 32"),
        (
            changed(INT4, quantization_status=None, version="0.12.0", global_compression_ratio=None, ignore=None),
            "pack-quantized, 4 bits, symmetric, groups of 32",
            ...,
        ),
        (
            changed(INT4, weights__symmetric=False, weights__group_size=128, weights__actorder="static", ignore=[]),
            "pack-quantized, 4 bits, with zero points, groups of 128",
            ...,
        ),
        (
            changed(INT4, weights__actorder="group", ignore=[]),
            "pack-quantized, 4 bits, symmetric, groups of 32, act-order",
            ...,
        ),
        (changed(GPTQ, desc_act=True), "gptq, 4 bits, with zero points, groups of 128, act-order", ...),
        (
            changed(INT4, weights__num_bits=8, weights__strategy="channel", weights__group_size=None, ignore=[]),
            "pack-quantized, 8 bits, symmetric, one scale a row",
            ...,
        ),
        (
            changed(
                INT4,
                format="int-quantized",
                group__input_activations={"num_bits": 8, "dynamic": True},
                weights__num_bits=8,
                weights__strategy="channel",
                weights__group_size=None,
                kv_cache_scheme={"num_bits": 8},
                sparsity_config={"format": "dense"},
            ),
            None,
            "int-quantized, 8 bits, symmetric, one scale a row",
        ),
        (
            changed(
                INT4,
                format="float-quantized",
                weights__num_bits=8,
                weights__type="float",
                weights__strategy="block",
                weights__group_size=None,
                weights__block_structure=[128, 128],
            ),
            None,
            FP8_CODES + "blocks of 128 x 128",
        ),
        (
            changed(
                INT4, format="mixed-precision", group__format="nvfp4-pack-quantized", weights__group_size=16,
                weights__type="float", weights__strategy="tensor_group",
            ),
            None,
            "nvfp4-divided, 4 bits, symmetric, groups of 16",
        ),
        (MXFP4, "mxfp4-blocks, 4 bits, symmetric, groups of 32", ...),
        (NVFP4, None, "nvfp4, 4 bits, symmetric, groups of 16"),
        ({"quant_algo": "FP8", "quant_method": "modelopt"}, FP8_CODES + "one scale a matrix", ...),
        ({"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}, FP8_CODES + "blocks of 128 x 128", ...),
        (
            {
                "quant_method": "modelopt_mixed",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {
                    Q: {"quant_algo": "FP8"},
                    "model.layers.*.mlp.experts*": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
                },
            },
            FP8_CODES + "one scale a matrix",
            "nvfp4, 4 bits, symmetric, groups of 16",
        ),
        (BNB, "bnb-4bit, 4 bits, symmetric, groups of 64", ...),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bnb-8bit, 8 bits, symmetric, one scale a row", ...),
        (GPTQ, "gptq, 4 bits, with zero points, groups of 128", ...),
        (
            changed(GPTQ, checkpoint_format="gptq_v2", group_size=-1, dynamic={"-:.*self_attn": {}}),
            None,
            "gptq_v2, 4 bits, with zero points, one scale a row",
        ),
        (
            changed(GPTQ, dynamic={r"+:.*\.q_proj": {"bits": 8, "group_size": 64}}),
            "gptq, 8 bits, with zero points, groups of 64",
            "gptq, 4 bits, with zero points, groups of 128",
        ),
        (changed(AWQ, modules_to_not_convert=["self_attn"]), None, "awq, 4 bits, with zero points, groups of 64"),
        (
            changed(AUTO_ROUND, extra_config={Q: {"bits": 8}, ".*mlp.experts.*": {"bits": 16, "data_type": "float"}}),
            "gptq, 8 bits, with zero points, groups of 32",
            None,
        ),
        (changed(AUTO_ROUND, packing_format="auto_round:auto_awq"), "awq, 4 bits, with zero points, groups of 32", ...),
        (changed(AUTO_ROUND, packing_format="auto_round"), "gptq_v2, 4 bits, with zero points, groups of 32", ...),
    ],
)  # fmt: skip
def test_supported_configs_are_read(given: dict[str, Any], q: str | None, up: Any) -> None:
    assert schemes_of(given, Q, EXPERT_UP) == [q, q if up is ... else up]
    found = read_quantization({"quantization_config": given})
    assert read_quantization({"text_config": {"quantization_config": given}}) == found
    assert (
        read_quantization({"quantization_config": given, "text_config": {"quantization_config": given}})
        == found
    )


def test_no_quantization_config_is_none() -> None:
    assert read_quantization({}) is None
    assert read_quantization({"quantization_config": None, "text_config": {}}) is None


METHODS = "supported: fp8, compressed-tensors, modelopt, gptq, awq, auto-round, mxfp4, bitsandbytes, and "
GROUPS = "supported: 32, 64, 128"


@pytest.mark.parametrize(
    ("given", "asked", "supported"),
    [
        ({"quant_method": "hqq", "bits": 4}, "quantization_config 'hqq'", METHODS),
        ({"quant_method": ["fp8"]}, "quantization_config ['fp8']", METHODS),
        ({"quant_algo": "NVFP4"}, "quantization_config 'NVFP4'", METHODS),
        ([], "quantization_config []", METHODS),
        (changed(FP8, weight_block_size=[128]), "weight_block_size [128]", "supported: [rows, columns]"),
        (changed(FP8, weight_block_size=[0, 128]), "weight_block_size 0", "a whole number from 1"),
        (changed(FP8, weight_block_size=[True, 128]), "weight_block_size true", "a whole number from 1"),
        (changed(FP8, weight_block_size=[128, 2**31]), "weight_block_size 2147483648", "a whole number from 1"),
        (changed(FP8, activation_scheme="other"), "activation_scheme 'other'", '"dynamic", "static"'),
        (changed(FP8, fmt="e5m2"), "quantization_config.fmt 'e5m2'", '"e4m3"'),
        (changed(FP8, surprise=1), "quantization_config.surprise 1", "which is not known and may change weights"),
        (changed(INT4, format="marlin-24"), "quantization_config.format 'marlin-24'", '"pack-quantized", "int-quant'),
        (changed(INT4, config_groups={}), "quantization_config.config_groups {}", "groups with targets"),
        (changed(INT4, sparsity_config={"format": "sparse-24-bitmask"}), "quantization_config.sparsity_config", "null"),
        (changed(INT4, transform_config={"r": 1}), "quantization_config.transform_config", "null"),
        (changed(INT4, weights__num_bits=0), "config_groups.group_0.weights.num_bits 0", "supported: 4, 8"),
        (changed(INT4, weights__num_bits=3), "config_groups.group_0.weights.num_bits 3", "supported: 4, 8"),
        (changed(INT4, weights__num_bits=True), "config_groups.group_0.weights.num_bits true", "supported: 4, 8"),
        (changed(INT4, weights__symmetric=1), "config_groups.group_0.weights.symmetric 1", "supported: true, false"),
        (changed(INT4, weights__group_size=48), "config_groups.group_0.weights.group_size 48", GROUPS),
        (changed(INT4, weights__group_size=-1), "config_groups.group_0.weights.group_size -1", GROUPS),
        (changed(INT4, weights__group_size=128.5), "config_groups.group_0.weights.group_size 128.5", GROUPS),
        (changed(INT4, weights__strategy="tensor"), "weights.strategy 'tensor'", '"group", "channel"'),
        (changed(INT4, weights__type="float"), "config_groups.group_0.weights.type 'float'", 'supported: "int"'),
        (changed(INT4, weights__actorder="other"), "weights.actorder 'other'", 'null, false, "weight", "static"'),
        (
            changed(INT4, weights__actorder="group", weights__strategy="channel"),
            "weights.actorder 'group'",
            'supported: null, false, "weight", "static"',
        ),
        (changed(INT4, weights__dynamic=True), "weights.dynamic true", "supported: false"),
        (changed(INT4, group__targets=["Embedding"]), "config_groups.group_0.targets ['Embedding']", '"Linear"'),
        (changed(INT4, group__weights=[4]), "config_groups.group_0.weights [4]", METHODS),
        (changed(MXFP4, dequantize=True), "quantization_config.dequantize true", "supported: false"),
        (changed(NVFP4, quant_algo="NVFP4_AWQ"), "quant_algo 'NVFP4_AWQ'", "supported: FP8, FP8_PER_CHANNEL"),
        (changed(NVFP4, pre_quant_scale=True), "pre_quant_scale true", "supported: false"),
        (changed(NVFP4, group_size=32), "quantization_config.group_size 32", "supported: 16"),
        (changed(NVFP4, quant_algo="MIXED_PRECISION"), "quantized_layers null", METHODS),
        (changed(BNB, bnb_4bit_quant_type="int4"), "bnb_4bit_quant_type 'int4'", 'supported: "nf4", "fp4"'),
        (changed(BNB, bnb_4bit_quant_storage="bfloat16"), "bnb_4bit_quant_storage 'bfloat16'", 'supported: "uint8"'),
        (changed(BNB, load_in_8bit=True), "quantization_config.load_in_4bit true", "load_in_4bit or load_in_8bit"),
        (changed(BNB, llm_int8_has_fp16_weight=True), "llm_int8_has_fp16_weight true", "supported: false"),
        (changed(GPTQ, bits=5), "quantization_config.bits 5", "supported: 2, 3, 4, 8"),
        (changed(GPTQ, bits=0), "quantization_config.bits 0", "supported: 2, 3, 4, 8"),
        (changed(GPTQ, group_size=100), "quantization_config.group_size 100", "supported: 32, 64, 128, -1"),
        (changed(GPTQ, desc_act=1), "quantization_config.desc_act 1", "supported: false, true"),
        (changed(GPTQ, checkpoint_format="marlin"), "checkpoint_format 'marlin'", '"gptq", "gptq_v2"'),
        (changed(GPTQ, dynamic={".*": {"bits": 6}}), "dynamic..*.bits 6", "supported: 2, 3, 4, 8"),
        (changed(AWQ, version="gemv"), "quantization_config.version 'gemv'", "supported: gemm"),
        (changed(AWQ, bits=8), "quantization_config.bits 8", "supported: 4"),
        (changed(AUTO_ROUND, data_type="mx_fp"), "quantization_config.data_type 'mx_fp'", 'supported: "int"'),
        (changed(AUTO_ROUND, packing_format="fake"), "packing_format 'fake'", '"auto_round:auto_gptq"'),
        (changed(AUTO_ROUND, extra_config={Q: {"bits": 5}}), "q_proj.bits 5", "supported: 2, 3, 4, 8"),
    ],
)  # fmt: skip
def test_other_configs_are_refused_by_name_with_the_supported_ones(
    given: Any, asked: str, supported: str
) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        read_quantization({"quantization_config": given})
    assert asked in str(caught.value)
    assert supported in str(caught.value)
    assert "argosy pack" not in str(caught.value.hint)  # it would refuse most of them, already quantised


@pytest.mark.parametrize("method", ["hqq", "exl3", "quip", "aqlm", "quark", "torchao", "vptq", "spqr"])
def test_a_known_method_that_is_not_read_says_what_to_get(method: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        read_quantization({"quantization_config": {"quant_method": method}})
    assert "GGUF" in str(caught.value.hint)


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
        (changed(INT4, ignore=["re:.*a.*b.*c.*d"]), "which has more than 3 repetitions or 256 alternatives"),
        (changed(INT4, ignore=["re:" + "(a|a)" * 9]), "which has more than 3 repetitions or 256 alternatives"),
        (changed(INT4, ignore=["re:" + "(a)?" * 9]), "which has more than 3 repetitions or 256 alternatives"),
        (changed(INT4, ignore=["re:(a?)??"]), "which repeats a group"),
        (changed(FP8, ignored_layers=["re:" + "(" * 500 + "a" + ")" * 500]), "which has more than 64 groups"),
        (changed(INT4, group__targets=["re:(a+)+$"]), "targets has 're:(a+)+$', which repeats a group"),
        (changed(GPTQ, dynamic={"+:(a+)+$": {}}), "dynamic has '+:(a+)+$', which repeats a group"),
        (changed(AUTO_ROUND, extra_config={"(a+)+$": {}}), "extra_config has '(a+)+$', which repeats a group"),
        (changed(INT4, ignore=[f"re:{i}" for i in range(257)]), "ignore has 257 expressions; at most 256 are"),
        (changed(NVFP4, ignore=[f"a*{i}*" for i in range(257)]), "modules_to_not_convert has 257 expressions"),
        (changed(NVFP4, ignore=["a*" * 600]), "ignore has an expression of 1200 characters; at most 1024 are read"),
        (in_groups(257, 1), "config_groups has 257 groups; at most 256 are read"),
        (in_groups(3, 100), "config_groups has 300 expressions; at most 256 are read"),
        (changed(AWQ, modules_to_not_convert=[f"a{i}" for i in range(2049)]), "has 2049 texts to find in names;"),
        (changed(GPTQ, dynamic={f"a{i}": {"bits": (2, 4)[i % 2]} for i in range(257)}), "dynamic has 257 expressions"),
    ],
)  # fmt: skip
def test_invalid_or_costly_module_lists_are_refused(given: Any, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_quantization({"quantization_config": given})
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        changed(NVFP4, ignore=[f"model.layers.{number}.mlp*" for number in range(200_000)]),
        changed(FP8, ignored_layers=["." * steps for steps in range(1500)]),
        changed(AWQ, modules_to_not_convert=[f"model.layers.{number}.mlp.gate" for number in range(2048)]),
        changed(GPTQ, dynamic={rf"-:.*model\.layers\.{number}\.mlp\.gate.*": {} for number in range(2048)}),
    ],
    ids=["beginnings", "steps", "texts", "expressions"],
)
def test_long_lists_of_modules_cost_little(given: Any) -> None:
    found = read_quantization({"quantization_config": given})
    assert found is not None
    start = process_time()
    for expert in range(2000):
        assert found.scheme_of(f"model.layer.0.mlp.experts.{expert}.up_proj") is not None
    assert process_time() - start < 0.5  # 2 s and more if each name of the list were tried


@pytest.mark.parametrize(
    "expression",
    [
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        r"re:model\.layers\.\d+\.mlp\.experts\.[0-9]+\..*",
        r"re:^(?!.*experts).*$",
        r"re:(?:a|b)[*+?]\*[]+]",
        r"re:.*q(_a)?_proj$",
        r"re:.*layers\.(56|57|58|59|60|61|62|63)\.mlp\..*(gate|up|down)_proj$",
        "re:[[a-z]+",  # Python warns about it
    ],
)
def test_expressions_in_released_checkpoints_are_accepted(expression: str) -> None:
    assert read_quantization({"quantization_config": changed(INT4, ignore=[expression])}) is not None


@pytest.mark.parametrize(("inside", "outside", "storage"), [
    ({}, {}, "fp8"),
    ({}, {"expert_dtype": "fp4"}, "mxfp4-pack-quantized"),
    ({"expert_dtype": "fp4"}, {}, "mxfp4-pack-quantized"),
    ({"expert_dtype": "fp8"}, {"expert_dtype": "fp4"}, "fp8"),
])  # fmt: skip
def test_deepseek_v4_says_outside_how_experts_are_stored(
    inside: dict[str, Any], outside: dict[str, Any], storage: str
) -> None:
    found = read_quantization({"quantization_config": FP8 | inside, **outside})
    assert found is not None
    scheme = found.scheme_of("layers.0.ffn.experts.3.w1")
    assert scheme is not None
    assert scheme.storage == storage


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
    (scheme,) = schemes_of(changed(FP8, modules_to_not_convert=[name]), module)
    assert (scheme is None) is excluded


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
    (scheme,) = schemes_of(changed(INT4, ignore=[name]), module)
    assert (scheme is None) is excluded


@pytest.mark.parametrize(
    "glob",
    ["model.*", "*", "*up_proj", "*.3.*", "model.layers.*.mlp.*", "model.layers.3.mlp*", "a*b", "*.3", "mo*mo*l", "**"],
)  # fmt: skip
def test_globs_match_as_those_of_a_shell(glob: str) -> None:
    modules = [
        "model.layers.3.mlp.up_proj",
        "model.layers.30.mlp.up_proj",
        "lm_head",
        "a.b",
        "ab",
        "b",
        "model",
        "",
    ]
    found = schemes_of(changed(NVFP4, ignore=[glob]), *modules)
    assert [scheme is None for scheme in found] == [fnmatchcase(module, glob) for module in modules]


def test_groups_of_compressed_tensors_take_names_before_expressions_before_classes() -> None:
    groups = {}
    for bits, targets in ((4, ["Linear"]), (8, ["re:.*self_attn.*", "model.layers.3.mlp.gate"])):
        own = copy.deepcopy(INT4["config_groups"]["group_0"])
        own["targets"] = targets
        own["weights"]["num_bits"] = bits
        groups[str(bits)] = own
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.gate", "model.layers.3.mlp.up_proj"]
    for order in (list(groups), list(groups)[::-1]):
        given = changed(INT4, config_groups={name: groups[name] for name in order}, ignore=[])
        assert [str(one).partition(" bits")[0][-1] for one in schemes_of(given, *modules)] == ["8", "8", "4"]
    for targets, bits in ((["re:.*q_proj"], "4"), (["re:.*self_attn.+"], "8")):  # the first in the alphabet
        groups["4"]["targets"] = targets
        (scheme,) = schemes_of(changed(INT4, config_groups=groups, ignore=[]), Q)
        assert str(scheme).startswith(f"pack-quantized, {bits} bits")
    groups["4"]["targets"] = ["model.layers.3.mlp.gate"]
    with pytest.raises(CheckpointError, match=r"describes model.layers.3.mlp.gate in two ways: .* 8 bits"):
        schemes_of(changed(INT4, config_groups=groups, ignore=[]), *modules)


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
            "supported: scales in F32, BF16, F16, U8, F8_E8M0, found I32",
        ),
        (
            entry(EXPERT + "weight", lambda e: e.update(dtype="F8_E5M2")),
            "up_proj.weight is F8_E5M2; supported",
        ),
        (
            rewrite_config(none=True),
            "is F8_E4M3, the codes of a quantised weight, but config.json has no quantization_config",
        ),
        (
            rewrite_config(modules_to_not_convert=["model.layers.1.mlp.experts"]),
            "experts.0.gate_proj.weight is F8_E4M3, the codes of a quantised weight, but the quantization_config",
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
            "experts.2.gate_proj.weight_packed is I32, the codes of a quantised weight, but the quantization_config of",
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
        UnsupportedModel,
        match=r"down_proj\.weight_packed holds a matrix \[96, 72\] as .*; supported: .* groups of 32",
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
