"""Write tiny gpt-oss checkpoints as on the hub, experts in MXFP4, with the same weights dequantised beside them.

    config.json  ->  directory with blocks and scales (OCP Microscaling Formats specification v1.0)
                 ->  directory with their values in F32, in the unquantised layout

Codes and exponents are random, and the floats follow from the specification: nothing is rounded.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.models.safetensors_file import Array, write_checkpoint
from tests.models.tiny import RawConfig, random_tensors

# E2M1 has a sign bit, two exponent bits and one mantissa bit.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
QUANTIZATION = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


def write_mxfp4_model(directory: Path, config: RawConfig, *, seed: int, num_shards: int = 1) -> Path:
    """Write `directory`, and the dequantised weights to `<directory>.f32`; return the latter."""
    rng = np.random.default_rng([seed, 6])
    stored: dict[str, tuple[str, Array]] = {}
    exact: dict[str, Array] = {}
    for name, values in random_tensors(config, seed, "BF16").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name], exact[name] = ("BF16", values), values
            continue
        rows = values.swapaxes(1, 2)  # [experts, rows, inputs]
        codes, exponents = random_codes(rows.shape, float(values.std()), rng)
        stored[name + "_blocks"] = ("U8", in_bytes(codes))
        stored[name + "_scales"] = ("U8", exponents)
        exact[name] = np.ascontiguousarray(dequantised(codes, exponents).swapaxes(1, 2))
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    write_checkpoint(directory, stored, num_shards=num_shards)
    plain = directory.with_name(directory.name + ".f32")
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    write_checkpoint(plain, {name: ("F32", values) for name, values in exact.items()})
    return plain


def random_codes(shape: tuple[int, ...], deviation: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return codes [..., cols] and exponents [..., cols / 32] of weights with about the wanted standard deviation."""
    codes = rng.integers(0, 16, shape, np.uint8)
    middle = 127 + round(float(np.log2(deviation / E2M1.std())))
    exponents = rng.integers(middle - 1, middle + 2, (*shape[:-1], shape[-1] // 32)).astype(np.uint8)
    return codes, exponents


def in_bytes(codes: Array) -> Array:
    """Pack codes into bytes [..., cols / 32, 16], the even column of a pair in the low half."""
    pairs = codes.reshape(*codes.shape[:-1], -1, 16, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).astype(np.uint8)


def dequantised(codes: Array, exponents: Array) -> Array:
    scales = np.exp2(exponents.astype(np.float32) - 127)
    return E2M1[codes] * np.repeat(scales, 32, axis=-1)
