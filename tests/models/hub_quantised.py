"""Write tiny checkpoints quantised as on the hub, with the same weights dequantised beside them.

    config.json  ->  directory with codes and scales
                 ->  <directory>.f32 with their values in F32

    fp8    `weight` E4M3 and `weight_scale_inv` [rows / 128, cols / 128], rounded up: every linear layer but the router
    int4   `weight_packed`, `weight_scale`, `weight_shape` of compressed-tensors, groups of 32: routed experts

Codes and scales are random, and the floats follow from the specifications: nothing is rounded. E4M3 is that
of the Open Compute Project (OFP8, revision 1.0, table 3); packing is that of `pack_to_int32` in compressed-tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.safetensors_file import Array, decode, encode, write_checkpoint
from tests.models.tiny import RawConfig, random_tensors

BLOCK, GROUP = 128, 32

FP8: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "modules_to_not_convert": ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"],
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
INT4: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": GROUP,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}  # fmt: skip


def e4m3_values() -> Array:
    """Return the value of each of the 256 codes by the specification's formula."""
    values = []
    for code in range(128):
        exponent, mantissa = code >> 3, code & 7
        if exponent == 15 and mantissa == 7:
            values.append(np.nan)
        elif exponent == 0:
            values.append(2.0**-6 * mantissa / 8)
        else:
            values.append(2.0 ** (exponent - 7) * (1 + mantissa / 8))
    return np.array(values + [-value for value in values], np.float32)


E4M3 = e4m3_values()


def dequantised_fp8(codes: Array, scales: Array) -> Array:
    """Return values [rows, cols] from codes [rows, cols] and scales [rows / 128, cols / 128], rounded up."""
    rows, cols = codes.shape
    spread = np.repeat(np.repeat(scales, BLOCK, axis=0), BLOCK, axis=1)[:rows, :cols]
    return E4M3[codes] * spread


def dequantised_int4(packed: Array, scales: Array) -> Array:
    """Return values [rows, cols] from int32 [rows, cols / 8] and scales [rows, cols / 32]."""
    fields = (packed.view(np.uint32)[:, :, None] >> np.arange(0, 32, 4, np.uint32)) & 15
    codes = fields.reshape(len(packed), -1).astype(np.float32) - 8
    return codes * np.repeat(scales, GROUP, axis=1)[:, : codes.shape[1]]


def is_fp8(name: str) -> bool:
    return (
        name.endswith(("_proj.weight", "in_proj_qkvz.weight"))
        or ".w1." in name
        or ".w2." in name
        or ".w3." in name
    )


def is_int4(name: str) -> bool:
    return ".experts." in name


def write_fp8_model(
    directory: Path, config: RawConfig, *, seed: int, scale_dtype: str = "F32", num_shards: int = 1
) -> Path:
    """Write `directory`, and the dequantised weights to `<directory>.f32`; return the latter."""
    rng = np.random.default_rng([seed, 8])
    stored: dict[str, tuple[str, Array]] = {}
    exact: dict[str, Array] = {}
    for name, values in random_tensors(config, seed, "BF16").items():
        if not is_fp8(name):
            stored[name], exact[name] = ("BF16", values), values
            continue
        codes = rng.choice(np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF]), values.shape)
        blocks = [-(-size // BLOCK) for size in values.shape]
        deviation = float(values.std()) / float(E4M3[np.isfinite(E4M3)].std())
        scales = (deviation * rng.uniform(0.5, 1.5, blocks)).astype(np.float32)
        scales = decode(scale_dtype, encode(scale_dtype, scales)).reshape(blocks)
        stored[name] = "F8_E4M3", codes
        stored[name + "_scale_inv"] = scale_dtype, scales
        exact[name] = dequantised_fp8(codes, scales)
    return _write_both(directory, config, FP8, stored, exact, num_shards)


def write_int4_model(directory: Path, config: RawConfig, *, seed: int, num_shards: int = 1) -> Path:
    """Do the same with INT4 experts."""
    rng = np.random.default_rng([seed, 4])
    stored: dict[str, tuple[str, Array]] = {}
    exact: dict[str, Array] = {}
    for name, values in random_tensors(config, seed, "BF16").items():
        if not is_int4(name):
            stored[name], exact[name] = ("BF16", values), values
            continue
        rows, cols = values.shape
        packed = rng.integers(0, 2**32, (rows, cols // 8), np.uint32).view(np.int32)
        scales = (float(values.std()) / 4.6 * rng.uniform(0.5, 1.5, (rows, -(-cols // GROUP)))).astype(
            np.float32
        )
        scales = decode("BF16", encode("BF16", scales))
        base = name.removesuffix("weight")
        stored[base + "weight_packed"] = "I32", packed
        stored[base + "weight_scale"] = "BF16", scales
        stored[base + "weight_shape"] = "I32", np.array([rows, cols], np.int32)
        exact[name] = dequantised_int4(packed, scales)
    return _write_both(directory, config, INT4, stored, exact, num_shards)


def _write_both(
    directory: Path,
    config: RawConfig,
    quantization: dict[str, Any],
    stored: dict[str, tuple[str, Array]],
    exact: dict[str, Array],
    num_shards: int,
) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    write_checkpoint(directory, stored, num_shards=num_shards)
    plain = directory.with_name(directory.name + ".f32")
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    write_checkpoint(plain, {name: ("F32", values) for name, values in exact.items()})
    return plain
