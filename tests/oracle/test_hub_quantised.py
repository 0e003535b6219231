"""FP8 and INT4 checkpoints written by torch have the values that torch reads, and the logits of transformers.

transformers' own FP8 reader is no reference: version 5.24 takes the block size to be rows divided by rows of scales,
which is wrong if the last block is partial. The compressed-tensors package is not needed: `pack_int4` follows its
format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from argosy import Engine, SamplingParams, _native
from tests.models.hub_quantised import E4M3, FP8, INT4, is_fp8, is_int4
from tests.models.make_models import load
from tests.models.references import LARGEST_DIFFERENCE, difference, mean_divergence
from tests.models.tiny import RawConfig, prompt_ids, qwen3_moe, random_tensors
from tests.models.tiny_latent import deepseek_v3, kimi_k2

pytestmark = pytest.mark.filterwarnings("default")

BLOCK, GROUP = 128, 32
Tensors = dict[str, torch.Tensor]
Quantise = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]


def fp8(scale_type: torch.dtype) -> Quantise:
    """Quantise as DeepSeek-V3 does: each block's largest magnitude becomes 448. Returns stored tensors, and values."""

    def quantise(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, cols = weight.shape
        grid = -(-rows // BLOCK), -(-cols // BLOCK)
        padded = torch.zeros(grid[0] * BLOCK, grid[1] * BLOCK)
        padded[:rows, :cols] = weight
        blocks = padded.reshape(grid[0], BLOCK, grid[1], BLOCK)
        scales = (blocks.abs().amax(dim=(1, 3)) / 448).to(scale_type)
        spread = scales.float()[:, None, :, None]
        codes = (blocks / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        values = (codes.float() * spread).reshape(padded.shape)[:rows, :cols].contiguous()
        codes = codes.reshape(padded.shape)[:rows, :cols].contiguous()
        return {name: codes, name + "_scale_inv": scales}, values

    return quantise


def int4(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Symmetric groups of 32; an int32 holds eight values, each plus 8, the first in the lowest bits."""
    groups = weight.reshape(len(weight), -1, GROUP)
    scales = (groups.abs().amax(dim=2) / 7).to(torch.bfloat16)
    codes = (groups / scales.float()[:, :, None]).round().clamp(-8, 7)
    values = (codes * scales.float()[:, :, None]).reshape(weight.shape)
    fields = (codes.to(torch.int64) + 8).reshape(len(weight), -1, 8)
    packed = sum(fields[:, :, i] << (4 * i) for i in range(8))
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    base = name.removesuffix("weight")
    stored = {
        base + "weight_packed": packed,
        base + "weight_scale": scales,
        base + "weight_shape": torch.tensor(weight.shape, dtype=torch.int32),
    }
    return stored, values


def write(
    directory: Path,
    config: RawConfig,
    quantisation: Mapping[str, object],
    quantise: Quantise,
    is_quantised: Callable[[str], bool],
) -> Path:
    """Write a checkpoint with safetensors' own library, and the same weights in float32 beside it."""
    stored: Tensors = {}
    exact: Tensors = {}
    for name, values in random_tensors(config, 50_000, "BF16").items():
        weight = torch.from_numpy(np.array(values, np.float32))
        if is_quantised(name):
            parts, exact[name] = quantise(name, weight)
            stored |= parts
        else:
            stored[name], exact[name] = weight.to(torch.bfloat16), weight
    plain = directory.with_name(directory.name + ".f32")
    for path, tensors, extra in (
        (directory, stored, {"quantization_config": quantisation}),
        (plain, exact, {"torch_dtype": "float32"}),
    ):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config | extra))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return plain


def logits_of_transformers(directory: Path, prompt: list[int]) -> np.ndarray:
    with torch.no_grad():
        return load(directory)(input_ids=torch.tensor([prompt])).logits[0].numpy()


def test_every_code_has_the_value_that_torch_gives_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3, codes)  # NaN where torch has NaN
    numbers = [code for code in range(256) if np.isfinite(codes[code])]
    assert len(numbers) == 254
    matrix = np.zeros(_native.matrix_bytes("f8", 2, 127), np.uint8)
    _native.transcode("f8_codes", np.array(numbers, np.uint8), 2, 127, out=matrix)
    _native.transcode("f8_scales", np.ones(1, np.float32).view(np.uint8), 2, 127, out=matrix)
    found = _native.dequantize("f8", matrix, 2, 127).reshape(-1)
    np.testing.assert_array_equal(found.view(np.uint32), codes[numbers].view(np.uint32))


@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(576, 200), (128, 128), (1, 1), (129, 257), (300, 127)])
def test_fp8_weights_are_those_of_torch_bit_for_bit(shape: tuple[int, int], scale_type: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    stored, values = fp8(scale_type)("weight", weight)
    rows, cols = shape
    matrix = np.zeros(_native.matrix_bytes("f8", rows, cols), np.uint8)
    codes = stored["weight"].view(torch.uint8).numpy().reshape(-1)
    _native.transcode("f8_codes", codes, rows, cols, out=matrix)
    block_type = "f8_scales" if scale_type == torch.float32 else "f8_scales_bf16"
    scales = stored["weight_scale_inv"].view(torch.uint8).numpy().reshape(-1)
    _native.transcode(block_type, scales, rows, cols, out=matrix)
    found = _native.dequantize("f8", matrix, rows, cols)
    np.testing.assert_array_equal(found.view(np.uint32), values.numpy().view(np.uint32))


@pytest.mark.parametrize("shape", [(16, 32), (1, 64), (40, 96)])
def test_int4_weights_are_those_of_torch_bit_for_bit(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    stored, values = int4("weight", weight)
    matrix = np.zeros(_native.matrix_bytes("int4", *shape), np.uint8)
    for part, block_type in (("weight_packed", "int4_quants"), ("weight_scale", "int4_scales")):
        data = stored[part].view(torch.uint8).numpy().reshape(-1)
        _native.transcode(block_type, data, *shape, out=matrix)
    np.testing.assert_array_equal(_native.dequantize("int4", matrix, *shape), values.numpy())


FP8_MODELS = {
    "qwen3_moe": qwen3_moe(hidden_size=168, head_dim=42, moe_intermediate_size=150),
    "deepseek_v3": deepseek_v3(hidden_size=144, kv_lora_rank=512, qk_rope_head_dim=64, num_hidden_layers=2),
}


@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", FP8_MODELS)
def test_logits_and_answers_of_fp8_equal_transformers(
    model: str, scale_type: torch.dtype, tmp_path: Path
) -> None:
    config = FP8_MODELS[model]
    plain = write(tmp_path / "model", config, FP8, fp8(scale_type), is_fp8)
    prompt = prompt_ids(config, 50_000, 40)
    with Engine.open(tmp_path / "model", memory="4GiB", kv_dtype="f32", threads=2) as engine:
        result = engine.generate(prompt, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
        logits = engine.logits(prompt + result.token_ids)
    expected = logits_of_transformers(plain, prompt + result.token_ids)
    assert difference(logits, expected) <= LARGEST_DIFFERENCE
    assert result.token_ids == expected[len(prompt) - 1 : -1].argmax(axis=1).tolist()


def test_logits_of_int4_equal_transformers(tmp_path: Path) -> None:
    # Every expert is chosen.
    config = kimi_k2(hidden_size=96, moe_intermediate_size=64, n_routed_experts=4, num_experts_per_tok=4)
    plain = write(tmp_path / "model", config, INT4, int4, is_int4)
    prompt = prompt_ids(config, 50_000, 40)
    with Engine.open(tmp_path / "model", memory="4GiB", kv_dtype="f32", threads=2) as engine:
        logits = engine.logits(prompt)
    config_of_transformers = json.loads((plain / "config.json").read_text()) | {"model_type": "deepseek_v3"}
    (plain / "config.json").write_text(json.dumps(config_of_transformers))
    assert mean_divergence(logits_of_transformers(plain, prompt), logits) <= 0.002
