"""Checkpoints that mlx-lm converts have the weights and the logits of MLX, whatever the family and the mode."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from argosy import Engine, _native
from tests.engine.test_gguf import LARGEST_DIVERGENCE
from tests.models import make_mlx
from tests.models.configurations import CONFIGURATIONS
from tests.models.make_mlx import write
from tests.models.mlx_models import QUANTISED, MlxModel
from tests.models.references import LARGEST_DIFFERENCE, Reference, difference, mean_divergence
from tests.models.tiny import write_model

pytestmark = pytest.mark.filterwarnings("default")

ROWS, COLS = 40, 8192  # 10,240 groups of 32
AFFINE = [
    (bits, group, dtype)
    for bits in (2, 3, 4, 5, 6, 8)
    for group in (32, 64, 128)
    for dtype in ("f16", "bf16")
]
SCALES = {"mxfp4": "mxfp4_scales", "mxfp8": "mxfp8_scales", "nvfp4": "nvfp4_scales_alone"}


def random_words(bits: int) -> np.ndarray:
    return np.random.default_rng(bits).integers(0, 2**32, (ROWS, COLS * bits // 32), np.uint32)


def landed(format: str, **parts: np.ndarray) -> np.ndarray:
    """The values of a matrix whose parts land one after another; keys are block types, `_at_` stands for a colon."""
    matrix = np.zeros(_native.matrix_bytes(format, ROWS, COLS), np.uint8)
    for name, part in parts.items():
        raw = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        _native.transcode(name.replace("_at_", ":"), raw, ROWS, COLS, out=matrix)
    return _native.dequantize(format, matrix, ROWS, COLS)


@pytest.mark.parametrize(("bits", "group", "dtype"), AFFINE)
def test_affine_weights_are_those_of_mlx_bit_for_bit(bits: int, group: int, dtype: str) -> None:
    mx.set_default_device(mx.cpu)
    words, rng = random_words(bits), np.random.default_rng(group)
    kind = mx.float16 if dtype == "f16" else mx.bfloat16
    scales, biases = (
        mx.array(rng.standard_normal((ROWS, COLS // group), np.float32)).astype(kind) for _ in range(2)
    )
    expected = mx.dequantize(
        mx.array(words), scales.astype(mx.float32), biases.astype(mx.float32), group_size=group, bits=bits
    )
    format = f"affine{bits}_{group}_{dtype}"
    stored = {
        "codes": words,
        "scales": np.array(scales.view(mx.uint16)),
        "biases": np.array(biases.view(mx.uint16)),
    }
    found = landed(format, **{f"{format}_at_{name}": part for name, part in stored.items()})
    np.testing.assert_array_equal(found, np.array(expected))


@pytest.mark.parametrize("mode", SCALES)
def test_weights_of_small_floats_are_those_of_mlx_bit_for_bit(mode: str) -> None:
    mx.set_default_device(mx.cpu)
    bits, group = (8, 32) if mode == "mxfp8" else (4, 16 if mode == "nvfp4" else 32)
    words = random_words(bits)
    if mode == "mxfp8":  # E4M3's NaN is refused
        codes = words.view(np.uint8)
        codes[codes & 0x7F == 0x7F] = 0x7E
    # mxfp4 and mxfp8: any power of two whose products are float32; nvfp4: E4M3 of either sign
    scales = np.random.default_rng(bits).integers(0, 245, (ROWS, COLS // group)).astype(np.uint8)
    if mode == "nvfp4":
        scales[scales & 0x7F == 0x7F] = 0x38
    expected = mx.dequantize(mx.array(words), mx.array(scales), mode=mode, dtype=mx.float32)
    codes_type = f"{mode}_codes" if bits == 8 else f"{mode}_quants"
    found = landed(mode, **{codes_type: words, SCALES[mode]: scales})
    np.testing.assert_array_equal(found, np.array(expected))


# Of each family that mlx-lm runs as transformers does, a config without what mlx-lm lacks.
NAMES = (
    "deepseek_v2_lite", "deepseek_v3_plain", "glm4_moe_lite_plain", "glm4_moe_plain", "glm4_moe_qk_norm_scaled_sharded",
    "kimi_k25_wrapper", "kimi_k2_many_experts", "minimax_m2_plain", "minimax_m2_all_turns_tied", "mixtral_plain",
    "olmoe_plain", "qwen2_moe_plain_f16", "qwen3_5_moe_plain", "qwen3_moe_plain", "qwen3_next_plain",
    "qwen3_next_bias_yarn_f32", "gemma4_all_full_scaled_rope", "granitemoe_plain", "bailing_hybrid_plain",
)  # fmt: skip


@pytest.mark.parametrize("largest", [1e-3, 0.37, 2688.0, 1e6])
def test_nvfp4_weights_with_a_factor_are_those_of_mlx(largest: float) -> None:
    mx.set_default_device(mx.cpu)
    words = random_words(4)
    scales = np.random.default_rng(4).integers(0, 0x7F, (ROWS, COLS // 16), np.uint8)
    factor = np.array([largest], np.float32)
    expected = mx.dequantize(
        mx.array(words), mx.array(scales), group_size=16, bits=4, mode="nvfp4", global_scale=mx.array(factor),
        dtype=mx.float32,
    )  # fmt: skip
    found = landed("nvfp4", nvfp4_quants=words, nvfp4_scales=scales, nvfp4_largest=factor)
    np.testing.assert_allclose(found, np.array(expected), rtol=3 * 2**-24, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_renamed_checkpoints_are_those_of_mlx(name: str, tmp_path: Path) -> None:
    configuration = next(one for one in CONFIGURATIONS if one.name == name)
    model = MlxModel(name=name, config=configuration.config, seed=50_000)
    source = write_model(tmp_path / "hub", model.config, seed=model.seed, dtype=configuration.dtype)
    reference = Reference(write(model, tmp_path / "model", source))
    assert difference(logits(reference), reference.logits) <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("model", QUANTISED, ids=lambda model: model.name)
@pytest.mark.parametrize("seed", [1, 2])
def test_logits_of_quantised_checkpoints_are_those_of_mlx(model: MlxModel, seed: int, tmp_path: Path) -> None:
    reference = Reference(write(replace(model, seed=50_000 + seed), tmp_path / "model"))
    assert mean_divergence(reference.logits, logits(reference)) <= LARGEST_DIVERGENCE


def test_a_quantised_kv_b_proj_of_older_mlx_lm_is_read_whole(tmp_path: Path) -> None:
    """mlx-lm splits it today while it loads; the reference gets its values as floats, so nothing is rounded again."""
    model = next(one for one in QUANTISED if one.name == "glm4_moe_lite_affine")
    sizes = model.config
    directory, exact = write(model, tmp_path / "model"), tmp_path / "exact"
    weights = dict(mx.load(str(directory / "model.safetensors")))
    exact.mkdir()
    whole = dict(weights)
    for layer in range(sizes["num_hidden_layers"]):
        attention = f"model.layers.{layer}.self_attn."
        halves = []
        for name in ("embed_q", "unembed_out"):
            parts = [weights.pop(f"{attention}{name}.{part}") for part in ("weight", "scales", "biases")]
            halves.append(mx.dequantize(*parts, group_size=model.group, bits=model.bits))
            for part in ("weight", "scales", "biases"):
                del whole[f"{attention}{name}.{part}"]
        joined = mx.concatenate([halves[0].swapaxes(-1, -2), halves[1]], axis=1)
        quantised = mx.quantize(
            joined.reshape(-1, sizes["kv_lora_rank"]), group_size=model.group, bits=model.bits
        )
        weights |= dict(
            zip(
                (f"{attention}kv_b_proj.{part}" for part in ("weight", "scales", "biases")),
                quantised,
                strict=True,
            )
        )
        widened = (part if part.dtype == mx.uint32 else part.astype(mx.float32) for part in quantised)
        whole[f"{attention}kv_b_proj.weight"] = mx.dequantize(
            *widened, group_size=model.group, bits=model.bits
        )
    (directory / "model.safetensors.index.json").unlink()
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    mx.save_safetensors(str(exact / "model.safetensors"), whole)
    shutil.copy(directory / "config.json", exact)
    reference = Reference(directory)
    expected = make_mlx.logits(make_mlx.load(exact)[0], reference.input_ids)
    assert mean_divergence(expected, logits(reference)) <= LARGEST_DIVERGENCE


def logits(reference: Reference) -> np.ndarray:
    with Engine.open(reference.directory, memory="4GiB", kv_dtype="f32", threads=2) as engine:
        return engine.logits(reference.input_ids)
