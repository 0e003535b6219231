"""Settings that name no storage are passed over, whichever program wrote them, and settings of early versions are read.

The examples have the keys that the exporters of auto-round 0.3 to 0.16, gptqmodel 7.7, transformers 5.24, modelopt 0.47
and vLLM write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES, open_model
from argosy.model.reading.quantization import read_quantization
from tests.families.test_quantization import AUTO_ROUND, AWQ, EXPERT_UP, GPTQ, NVFP4, changed, schemes_of
from tests.models.hub_quantised import INT4
from tests.models.hub_schemes import KINDS, write_kind
from tests.models.safetensors_file import read_header
from tests.models.tiny import qwen3_moe

# Settings that AutoRound's files have, whichever method they name.
AUTO_ROUND_NOTES = {
    "autoround_version": "0.9.0", "data_type": "int", "enable_quanted_input": False, "iters": 1000,
    "low_gpu_mem_usage": True, "lr": 0.001, "nsamples": 512, "provider": "auto-round", "seqlen": 2048,
}  # fmt: skip
ATTENTION = {"targets": ["Qwen3MoeAttention"], "weights": None, "input_activations": {"num_bits": 8}}


@pytest.mark.parametrize(
    ("given", "storage"),
    [
        (GPTQ | AUTO_ROUND_NOTES | {"lm_head": False, "damp_percent": 0.01, "true_sequential": False}, "gptq"),
        (AWQ | AUTO_ROUND_NOTES | {"sym": True, "zero_point": False}, "awq"),
        (AUTO_ROUND | AUTO_ROUND_NOTES | {"model_free": True}, "gptq"),
        # gptqmodel 7.7, transformers 5.24, a rewriter of files
        (AWQ | {"method": "awq", "format": "gemm", "checkpoint_format": "gemm", "pack_dtype": "int32"}, "awq"),
        (AWQ | {"tokenizer": None, "dataset": None, "damp_percent": 0.1, "checkpoint_format": "gemm"}, "awq"),
        (AWQ | {"modules_to_not_convert": [], "ignore": ["lm_head"]}, "awq"),
        (INT4 | {"provider": "auto-round", "ignore": []}, "pack-quantized"),
        (changed(INT4, group__targets=["RoutedExperts"]), "pack-quantized"),
        (INT4 | {"config_groups": INT4["config_groups"] | {"attention": ATTENTION}}, "pack-quantized"),
        (NVFP4 | {"modules_to_not_convert": ["model.layers.*.self_attn"], "packed_modules_mapping": {}}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8_BLOCK_SCALES"}, "fp8"),
    ],
)  # fmt: skip
def test_settings_that_say_nothing_of_weights_are_passed_over(given: dict[str, Any], storage: str) -> None:
    (scheme,) = schemes_of(given, EXPERT_UP)
    assert str(scheme).startswith(f"{storage}, ")


@pytest.mark.parametrize(
    ("backend", "storage"),
    [
        ("auto_round:exllamav2", "gptq_v2"),  # of asymmetric weights: its packer takes no one from a zero
        ("auto_round:gptq:exllamav2", "gptq"),
        ("auto_round:awq", "awq"),
        ("auto_gptq:cuda", "gptq"),
        ("auto", "gptq"),
    ],
)
def test_the_backend_of_early_files_of_auto_round_tells_their_packing(backend: str, storage: str) -> None:
    early = {key: value for key, value in AUTO_ROUND.items() if key != "packing_format"}
    early |= {"quant_method": "intel/auto-round", "backend": backend, "sym": False}
    (scheme,) = schemes_of(early, EXPERT_UP)
    assert str(scheme).startswith(f"{storage}, ")


def test_the_first_expression_of_auto_round_that_matches_decides() -> None:
    expressions = {".*q_proj.*": {"bits": 2}, ".*attn.*": {"bits": 8}, ".*experts.*": {"bits": 16}}
    found = schemes_of(
        AUTO_ROUND | {"extra_config": expressions}, *(f"model.layers.0.{name}" for name in NAMES)
    )
    assert [scheme and scheme[6] for scheme in found] == ["2", "8", None, "4"]


NAMES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.experts.0.up_proj", "mlp.up_proj")


def test_the_former_key_of_compressed_tensors_is_read() -> None:
    raw = qwen3_moe(hidden_size=128, moe_intermediate_size=128, num_hidden_layers=2, num_experts=4)
    raw |= {"compression_config": INT4}
    assert read_quantization(raw) == read_quantization({"quantization_config": INT4})
    assert FAMILIES["qwen3_moe"].parse_config(raw).num_experts == 4
    with pytest.raises(CheckpointError, match=r"two different values .* in compression_config"):
        read_quantization(raw | {"quantization_config": GPTQ})


MX_FP: dict[str, Any] = AUTO_ROUND | {
    "packing_format": "auto_round:llm_compressor", "data_type": "mx_fp", "act_bits": 4, "act_data_type": "mx_fp",
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "storage"),
    [
        (MX_FP, "mxfp4-pack-quantized, 4 bits, symmetric, groups of 32"),
        (MX_FP | {"bits": 8, "data_type": "mx_fp_rceil"}, "mxfp8-quantized, 8 bits, symmetric, groups of 32"),
        (MX_FP | {"group_size": 16, "data_type": "nv_fp4"}, "nvfp4-divided, 4 bits, symmetric, groups of 16"),
        (MX_FP | {"extra_config": {EXPERT_UP: {"bits": 8}}}, "mxfp8-quantized, 8 bits, symmetric, groups of 32"),
        (MX_FP | {"extra_config": {EXPERT_UP: {"bits": 16, "data_type": "float"}}}, None),
    ],
)  # fmt: skip
def test_floats_of_auto_round_are_stored_as_in_compressed_tensors(given: Any, storage: str | None) -> None:
    assert schemes_of(given, EXPERT_UP) == [storage]


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"data_type": "int"}, 'data_type \'int\'; supported: "mx_fp", "nv_fp"'),
        ({"data_type": None}, 'data_type null; supported: "mx_fp"'),
        ({"bits": 6}, "bits 6; supported: 4, 8"),
        ({"group_size": 16}, "group_size 16; supported: 32"),
        ({"packing_format": "auto_round"}, "data_type 'mx_fp'; supported: \"int\""),
    ],
)
def test_other_floats_of_auto_round_are_refused(changes: Any, asked: str) -> None:
    with pytest.raises(UnsupportedModel, match=asked):
        schemes_of(MX_FP | changes, EXPERT_UP)


def add_tensor(path: Path, name: str, values: np.ndarray[Any, np.dtype[np.float16]]) -> None:
    header, begin = read_header(path)
    data = path.read_bytes()[begin:]
    header[name] = {
        "dtype": "F16",
        "shape": values.shape,
        "data_offsets": [len(data), len(data) + values.nbytes],
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data + values.tobytes())


def test_biases_of_a_gptq_file_may_be_zeros(tmp_path: Path) -> None:
    config = qwen3_moe(hidden_size=128, moe_intermediate_size=128, num_hidden_layers=2, num_experts=4)
    write_kind(tmp_path / "model", config, KINDS["gptq"], seed=1)
    bias = np.zeros(128, np.float16)
    file = tmp_path / "model" / "model.safetensors"
    add_tensor(file, "model.layers.0.mlp.experts.1.up_proj.bias", bias)  # as AutoGPTQ writes them
    open_model(tmp_path / "model")
    bias[100] = 2**-24
    add_tensor(file, "model.layers.0.mlp.experts.2.down_proj.bias", bias)
    with pytest.raises(CheckpointError, match=r"experts.2.down_proj.bias \[128\]: a qwen3_moe model with"):
        open_model(tmp_path / "model")
