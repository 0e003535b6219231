"""Tiny checkpoints of `hub_schemes.py` have the values that compressed-tensors reads in them.

The library finds the scheme of each module from the same config, and decompresses it from the same file; modelopt's
NVFP4 goes through the library's own converter. So names, packing, rules and formulas are those of the format's authors.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.utils.match import is_match, match_targets
from safetensors.torch import load_file

from argosy.checkpoint.untrusted_file import read_object
from argosy.model.reading.quantization import read_stored
from tests.models.hub_schemes import KINDS, compressed, write_kind
from tests.models.safetensors_file import read_checkpoint
from tests.models.tiny import qwen3_moe

pytestmark = pytest.mark.filterwarnings("default")

CONFIG = qwen3_moe(
    hidden_size=256, head_dim=32, num_attention_heads=8, num_key_value_heads=2, moe_intermediate_size=128,
    num_hidden_layers=2, num_experts=3, num_experts_per_tok=2,
)  # fmt: skip
# compressed-tensors 0.20 no longer reads act-order.
OF_THE_LIBRARY = [
    name
    for name, kind in KINDS.items()
    if kind.settings["quant_method"] == "compressed-tensors" and "act-order" not in name
]


def values_of(format: str, parts: dict[str, torch.Tensor], scheme: QuantizationScheme) -> np.ndarray:
    """Decompress a module in float32, so that the library does not round to the dtype of its scales."""
    if parts["weight_scale"].dtype in (torch.bfloat16, torch.float16):
        parts["weight_scale"] = parts["weight_scale"].float()
    if "weight_packed" in parts and scheme.weights.type == "float":  # whose own way rounds to bfloat16
        codes = unpack_fp4_from_uint8(
            parts["weight_packed"], *_unpacked(parts["weight_packed"]), dtype=torch.float32
        )
        scales = parts["weight_scale"]
        scales = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
        factor = parts.get("weight_global_scale")
        return dequantize(
            codes, scales, args=scheme.weights, global_scale=factor, dtype=torch.float32
        ).numpy()
    weight = BaseCompressor.get_value_from_registry(format).decompress(parts, scheme)["weight"]
    return weight.float().numpy()


def _unpacked(packed: torch.Tensor) -> tuple[int, int]:
    return packed.shape[0], 2 * packed.shape[1]


def modules_of(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    return {module: parts for module, parts in modules.items() if "weight_scale" in parts}


@pytest.mark.parametrize("name", OF_THE_LIBRARY)
def test_values_are_those_that_the_library_reads(name: str, tmp_path: Path) -> None:
    exact = read_checkpoint(write_kind(tmp_path / "model", CONFIG, KINDS[name], seed=1))
    settings = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(settings)
    schemes = {target: one for one in config.config_groups.values() for target in one.targets}
    modules = modules_of(load_file(tmp_path / "model" / "model.safetensors"))
    assert len(modules) == 2 * (4 + 3 * 3)
    linear = torch.nn.Linear(1, 1)
    for module, parts in modules.items():
        assert not is_match(module, linear, config.ignore)
        scheme = schemes[match_targets(module, linear, schemes)[0]]
        found = values_of(scheme.format or config.format, parts, scheme)
        np.testing.assert_allclose(found, exact[f"{module}.weight"], rtol=3e-7, atol=0)


def test_modelopt_s_nvfp4_has_the_values_that_the_library_reads(tmp_path: Path) -> None:
    exact = read_checkpoint(write_kind(tmp_path / "model", CONFIG, KINDS["nvfp4"], seed=1))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors = {name: one for name, one in tensors.items() if not name.endswith("k_scale")}
    converter = ModelOptNvfp4Converter(targets=[r"re:.*_proj$"])
    settings = compressed(
        "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
    )
    scheme = QuantizationConfig.model_validate(settings).config_groups["group_0"]
    modules = modules_of(converter.process(tensors))
    assert len(modules) == 2 * (4 + 3 * 3)
    for module, parts in modules.items():
        found = values_of("nvfp4-pack-quantized", parts, scheme)
        np.testing.assert_allclose(found, exact[f"{module}.weight"], rtol=5e-7, atol=0)


@pytest.mark.parametrize(
    "targets", [["Linear"], ["re:.*self_attn.*", "re:.*experts.*up_proj"], ["re:model.layers.1"]]
)
@pytest.mark.parametrize(
    "ignore", [[], ["re:.*o_proj"], ["model.layers.0.self_attn.q_proj"], ["re:self_attn"]]
)
def test_modules_match_as_in_the_library(targets: list[str], ignore: list[str], tmp_path: Path) -> None:
    settings = compressed("pack-quantized", num_bits=4, strategy="group", group_size=32) | {"ignore": ignore}
    settings["config_groups"]["group_0"]["targets"] = targets
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    found = read_stored(read_object(tmp_path / "config.json"), tmp_path / "config.json")
    assert found is not None
    linear = torch.nn.Linear(1, 1)
    for layer in range(12):
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.experts.3.up_proj", "mlp.gate"):
            module = f"model.layers.{layer}.{part}"
            expected = is_match(module, linear, targets, ignore)
            assert (found.scheme_of(module) is not None) is expected, module
