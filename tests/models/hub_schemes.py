"""Write tiny checkpoints in every quantised scheme of the hub, with the same weights dequantised beside them.

    config.json, KINDS[name]  ->  directory with codes, scales, zero points
                              ->  <directory>.f32 with their values in F32

Codes, scales and zero points are random, and the floats follow from the formula of each format: nothing is rounded.
Packing is by bits: a row of codes is a little-endian stream, whose first code has the lowest bits, cut into words.

A kind says which matrices it quantises, so one checkpoint may mix several.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.hub_quantised import E4M3
from tests.models.mxfp4_models import E2M1
from tests.models.safetensors_file import NUMPY_DTYPE, Array, decode, encode, write_checkpoint
from tests.models.tiny import RawConfig, random_tensors

# The parts of a weight by the end of their names, where the weight's is "weight"; and its values.
Stored = tuple[dict[str, tuple[str, Array]], Array]
Quantise = Callable[[np.random.Generator, tuple[int, int], float], Stored]
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.(.*)")
# The order in which AWQ stores the eight outputs of a word.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def in_words(codes: Array, bits: int) -> Array:
    """Pack codes [rows, cols] into int32 [rows, cols * bits / 32], rounded up."""
    stream = ((codes[:, :, None].astype(np.uint32) >> np.arange(bits, dtype=np.uint32)) & 1).astype(np.uint8)
    stream = stream.reshape(len(codes), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view("<i4")


def as_stored(dtype: str, values: Array) -> Array:
    """Return the values after a float has been stored in a dtype."""
    return decode(dtype, encode(dtype, values.astype(np.float32))).reshape(values.shape)


def spread(scales: Array, shape: tuple[int, int], block: tuple[int, int]) -> Array:
    """Repeat scales [rows / block, cols / block] over a matrix; 0 in a block stands for all rows or columns."""
    height, width = block[0] or shape[0], block[1] or shape[1]
    return np.repeat(np.repeat(scales, height, axis=0), width, axis=1)[: shape[0], : shape[1]]


def grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // (block[0] or shape[0])), -(-shape[1] // (block[1] or shape[1]))


def integers(
    layout: str,
    bits: int,
    group: int,
    *,
    has_zeros: bool = False,
    scale_dtype: str = "BF16",
    has_act_order: bool = False,
) -> Quantise:
    """Integers in groups of columns; a group of 0 is a whole row. With act-order, any columns form a group."""

    def quantise(rng: np.random.Generator, shape: tuple[int, int], deviation: float) -> Stored:
        groups = grid(shape, (1, group))
        codes = rng.integers(0, 2**bits, shape)
        # AutoGPTQ stores zero points minus one, so the largest cannot be stored.
        zeros = rng.integers(1, 2**bits, groups) if has_zeros else np.full(groups, 2 ** (bits - 1))
        size = deviation / (2**bits / 12**0.5)
        scales = as_stored(scale_dtype, size * rng.uniform(0.5, 1.5, groups))
        parts = LAYOUTS[layout](codes, zeros, (scale_dtype, scales), bits, group, has_zeros)
        if has_act_order:
            group_of = rng.permutation(shape[1]) // group
            name = "weight_g_idx" if layout == "pack-quantized" else "g_idx"
            parts[name] = "I32", group_of.astype(np.int32)
            values = (codes - zeros[:, group_of]).astype(np.float32) * scales[:, group_of]
            return parts, values
        values = (codes - spread(zeros, shape, (1, group))).astype(np.float32)
        values *= spread(scales, shape, (1, group))
        return parts, values

    return quantise


def _pack_quantized(
    codes: Array, zeros: Array, scales: tuple[str, Array], bits: int, group: int, has_zeros: bool
) -> dict[str, tuple[str, Array]]:
    parts = {
        "weight_packed": ("I32", in_words(codes, bits)),
        "weight_scale": scales,
        "weight_shape": ("I64", np.array(codes.shape, np.int64)),
    }
    if has_zeros:  # packed along rows
        parts["weight_zero_point"] = "I32", np.ascontiguousarray(in_words(zeros.T, bits).T)
    return parts


def _int_quantized(
    codes: Array, zeros: Array, scales: tuple[str, Array], bits: int, group: int, has_zeros: bool
) -> dict[str, tuple[str, Array]]:
    parts = {"weight": ("I8", (codes - 128).astype(np.int8)), "weight_scale": scales}
    if has_zeros:
        parts["weight_zero_point"] = "I8", (zeros - 128).astype(np.int8)
    return parts


def _gptq(
    codes: Array,
    zeros: Array,
    scales: tuple[str, Array],
    bits: int,
    group: int,
    has_zeros: bool,
    less: int = 1,
) -> dict[str, tuple[str, Array]]:
    cols = codes.shape[1]
    return {
        "qweight": ("I32", np.ascontiguousarray(in_words(codes, bits).T)),
        "qzeros": ("I32", in_words(zeros.T - less, bits)),
        "scales": (scales[0], np.ascontiguousarray(scales[1].T)),
        "g_idx": ("I32", (np.arange(cols) // (group or cols)).astype(np.int32)),
    }  # fmt: skip


def _gptq_v2(*given: Any) -> dict[str, tuple[str, Array]]:
    return _gptq(*given, less=0)


def _awq(
    codes: Array, zeros: Array, scales: tuple[str, Array], bits: int, group: int, has_zeros: bool
) -> dict[str, tuple[str, Array]]:
    def packed(values: Array) -> Array:  # [inputs or groups, rows]
        eights = values.reshape(len(values), -1, 8)[:, :, list(AWQ_ORDER)]
        return in_words(eights.reshape(values.shape), bits)

    return {
        "qweight": ("I32", packed(codes.T)),
        "qzeros": ("I32", packed(zeros.T)),
        "scales": (scales[0], np.ascontiguousarray(scales[1].T)),
    }


LAYOUTS: Mapping[str, Callable[..., dict[str, tuple[str, Array]]]] = {
    "pack-quantized": _pack_quantized,
    "int-quantized": _int_quantized,
    "gptq": _gptq,
    "gptq_v2": _gptq_v2,
    "awq": _awq,
}


def fp8(
    block: tuple[int, int],
    scale_dtype: str,
    name: str = "weight_scale",
    shape_of: Callable[[int, int], tuple[int, ...]] = lambda rows, cols: (rows, cols),
) -> Quantise:
    """E4M3 codes with a scale for each block; `shape_of` says how the scales are stored."""

    def quantise(rng: np.random.Generator, shape: tuple[int, int], deviation: float) -> Stored:
        codes = rng.choice(np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF]), shape)
        size = deviation / float(E4M3[np.isfinite(E4M3)].std())
        scales, stored = random_scales(rng, grid(shape, block), size, scale_dtype)
        parts = {
            "weight": ("F8_E4M3", codes),
            name: (scale_dtype, stored.reshape(shape_of(*stored.shape))),
        }
        return parts, E4M3[codes] * spread(scales, shape, block)

    return quantise


def random_scales(
    rng: np.random.Generator, shape: tuple[int, ...], size: float, dtype: str
) -> tuple[Array, Array]:
    """Return values about `size`, and what is stored for them."""
    if dtype in ("U8", "F8_E8M0"):
        middle = 127 + round(float(np.log2(size)))
        stored = rng.integers(middle - 1, middle + 2, shape).astype(np.uint8)
        return np.exp2(stored.astype(np.float32) - 127), stored
    scales = as_stored(dtype, size * rng.uniform(0.5, 1.5, shape))
    return scales, scales


def fp4(
    group: int,
    scale_dtype: str,
    codes_name: str,
    factor: tuple[str, bool] | None = None,
    *,
    scale_name: str = "weight_scale",
    codes_dtype: str = "U8",
) -> Quantise:
    """E2M1 codes with a scale for each group of columns, and a factor of the matrix, which may divide."""

    def quantise(rng: np.random.Generator, shape: tuple[int, int], deviation: float) -> Stored:
        rows, cols = shape
        codes = rng.integers(0, 16, shape, np.uint8)
        size = deviation / float(E2M1.std())
        pairs = codes[:, 0::2] | codes[:, 1::2] << 4
        parts: dict[str, tuple[str, Array]] = {
            codes_name: (codes_dtype, pairs.view(NUMPY_DTYPE[codes_dtype]))
        }
        if factor is None:
            scales, stored = random_scales(rng, (rows, cols // group), size, scale_dtype)
        else:
            stored = rng.integers(0x30, 0x50, (rows, cols // group)).astype(np.uint8)
            own = np.float32(size / float(E4M3[0x40]) * rng.uniform(0.5, 1.5))
            name, divides = factor
            own = np.float32(1 / own) if divides else own
            parts[name] = "F32", np.array([own] if divides else own, np.float32)
            scales = E4M3[stored] / own if divides else E4M3[stored] * own
        parts[scale_name] = scale_dtype, stored
        return parts, E2M1[codes] * np.repeat(scales, group, axis=1)

    return quantise


# bitsandbytes' `get_4bit_type` and `create_dynamic_map`: the values of codes of weights, and of 8-bit scales.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
FP4 = (np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12).astype(
    np.float32
)


def dynamic_map() -> Array:
    positive = [
        10.0 ** (i - 6) * middle
        for i in range(7)
        for edges in [np.linspace(0.1, 1, 2**i + 1)]
        for middle in (edges[:-1] + edges[1:]) / 2
    ]
    return np.array(sorted([*positive, *(-value for value in positive), 0.0, 1.0]), np.float32)


def bnb_4bit(name: str, *, is_double: bool) -> Quantise:
    """Codes of four bits with a scale for 64 weights; is_double: scales are 8 bits, with a factor for 256."""
    table = {"nf4": NF4, "fp4": FP4}[name]

    def quantise(rng: np.random.Generator, shape: tuple[int, int], deviation: float) -> Stored:
        count = shape[0] * shape[1] // 64
        codes = rng.integers(0, 16, (count, 64), np.uint8)
        size = deviation / float(table.std())
        scales = (size * rng.uniform(0.5, 1.5, count)).astype(np.float32)
        state: dict[str, Any] = {
            "quant_type": name, "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)
        }  # fmt: skip
        parts: dict[str, tuple[str, Array]] = {
            "weight": ("U8", (codes[:, ::2] << 4 | codes[:, 1::2]).reshape(-1, 1)),
            "weight.absmax": ("F32", scales),
            "weight.quant_map": ("F32", table),
        }
        if is_double:
            stored = rng.integers(0, 256, count, np.uint8)
            factors = (size / 4 * rng.uniform(0.5, 1.5, -(-count // 256))).astype(np.float32)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": size}
            scales = dynamic_map()[stored] * np.repeat(factors, 256)[:count] + np.float32(size)
            parts |= {
                "weight.absmax": ("U8", stored),
                "weight.nested_absmax": ("F32", factors),
                "weight.nested_quant_map": ("F32", dynamic_map()),
            }
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        parts[f"weight.quant_state.bitsandbytes__{name}"] = "U8", text
        return parts, (table[codes] * scales[:, None]).reshape(shape)

    return quantise


def bnb_8bit(rng: np.random.Generator, shape: tuple[int, int], deviation: float) -> Stored:
    codes = rng.integers(-127, 128, shape).astype(np.int8)
    largest = (deviation * 3**0.5 * rng.uniform(0.5, 1.5, shape[0])).astype(np.float32)
    parts = {"weight": ("I8", codes), "SCB": ("F32", largest), "weight_format": ("U8", np.uint8(0))}
    return parts, codes * (largest[:, None] / np.float32(127))


def bitsandbytes(bits: int, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes", "_load_in_4bit": bits == 4, "_load_in_8bit": bits == 8,
        "load_in_4bit": bits == 4, "load_in_8bit": bits == 8, "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": ["lm_head", "gate"], "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    } | changes  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """How a checkpoint is quantised.

    settings: its `quantization_config`.
    quantise: by a part of the weights' names; the first that a name contains.
    format: the format of the experts in memory.
    has_exact_activations: whether products take float32 activations.
    extra: tensors of every quantised module that change nothing.
    rounding: the largest relative difference of values that need more bits than float32 has.
    """

    settings: Mapping[str, Any]
    quantise: Mapping[str, Quantise]
    format: str
    has_exact_activations: bool = False
    extra: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    rounding: float = 0.0


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    """The config of one group of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", r"re:.*mlp\.gate$"],
    }


def modelopt(algorithm: str, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head", "*.mlp.gate"],
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}, "producer": {"name": "modelopt"},
    } | changes  # fmt: skip


def gptq(bits: int, group: int, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": False,
    } | changes


# A code, its scale and the factor of the matrix are multiplied in any order, and a divisor is inverted first.
THREE_ROUNDINGS = 3 * 2.0**-24
NVFP4 = fp4(16, "F8_E4M3", "weight", ("weight_scale_2", False))
PER_TENSOR = fp8((0, 0), "F32", shape_of=lambda rows, cols: ())
ACTIVATIONS: Mapping[str, tuple[str, tuple[int, ...]]] = {"input_scale": ("F32", ()), "k_scale": ("F32", ())}
KINDS: Mapping[str, Kind] = {
    "ct int4 group 128": Kind(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=128),
        {"_proj.": integers("pack-quantized", 4, 128)},
        "int4_128_bf16",
    ),
    "ct int4 group 32 f16": Kind(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=32),
        {"_proj.": integers("pack-quantized", 4, 32, scale_dtype="F16")},
        "int4_32_f16",
    ),
    "ct int4 channel": Kind(
        compressed("pack-quantized", num_bits=4, strategy="channel"),
        {"_proj.": integers("pack-quantized", 4, 0)},
        "int4_128_bf16",
    ),
    "ct uint4 group 64": Kind(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=64, symmetric=False),
        {"_proj.": integers("pack-quantized", 4, 64, has_zeros=True)},
        "uint4_64_bf16",
    ),
    "ct int8 channel packed": Kind(
        compressed("pack-quantized", num_bits=8, strategy="channel"),
        {"_proj.": integers("pack-quantized", 8, 0, scale_dtype="F16")},
        "int8_128_f16",
    ),
    "ct w8a8": Kind(
        compressed("int-quantized", num_bits=8, strategy="channel"),
        {"_proj.": integers("int-quantized", 8, 0)},
        "int8_128_bf16",
    ),
    "ct w8a8 asymmetric": Kind(
        compressed("int-quantized", num_bits=8, strategy="group", group_size=64, symmetric=False),
        {"_proj.": integers("int-quantized", 8, 64, has_zeros=True)},
        "uint8_64_bf16",
    ),
    "gptq": Kind(
        gptq(4, 128), {"_proj.": integers("gptq", 4, 128, has_zeros=True, scale_dtype="F16")}, "uint4_128_f16"
    ),
    "gptq 8 bits": Kind(
        gptq(8, 32, checkpoint_format="gptq"),
        {"_proj.": integers("gptq", 8, 32, has_zeros=True, scale_dtype="F16")},
        "uint8_32_f16",
    ),
    "gptq channel": Kind(
        gptq(4, -1, sym=True),
        {"_proj.": integers("gptq", 4, 0, has_zeros=True, scale_dtype="F16")},
        "uint4_128_f16",
    ),
    "gptq_v2": Kind(
        gptq(4, 64, checkpoint_format="gptq_v2"),
        {"_proj.": integers("gptq_v2", 4, 64, has_zeros=True, scale_dtype="BF16")},
        "uint4_64_bf16",
    ),
    "gptq act-order": Kind(
        gptq(4, 32, desc_act=True, static_groups=False),
        {"_proj.": integers("gptq", 4, 32, has_zeros=True, scale_dtype="F16", has_act_order=True)},
        "uint4_32_f16_act_order",
    ),
    "gptq act-order in order": Kind(
        gptq(4, 64, desc_act=True, static_groups=True),
        {"_proj.": integers("gptq", 4, 64, has_zeros=True, scale_dtype="F16")},
        "uint4_64_f16_act_order",
    ),
    "gptq_v2 3 bits act-order": Kind(
        gptq(3, 64, desc_act=True, checkpoint_format="gptq_v2"),
        {"_proj.": integers("gptq_v2", 3, 64, has_zeros=True, scale_dtype="BF16", has_act_order=True)},
        "uint3_64_bf16_act_order",
    ),
    "ct int4 act-order": Kind(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, actorder="group"),
        {"_proj.": integers("pack-quantized", 4, 32, has_act_order=True)},
        "int4_32_bf16_act_order",
    ),
    "awq": Kind(
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True},
        {"_proj.": integers("awq", 4, 64, has_zeros=True, scale_dtype="F16")},
        "uint4_64_f16",
    ),
    "auto-round": Kind(
        {
            "quant_method": "auto-round",
            "bits": 4,
            "group_size": 128,
            "sym": True,
            "packing_format": "auto_round:auto_gptq",
            "extra_config": {
                f"model.layers.{layer}.self_attn.{name}_proj": {"bits": 8}
                for layer in range(3)
                for name in "qkvo"
            },
        },
        {
            "self_attn": integers("gptq", 8, 128, has_zeros=True, scale_dtype="F16"),
            "_proj.": integers("gptq", 4, 128, has_zeros=True, scale_dtype="F16"),
        },
        "uint4_128_f16",
    ),
    "fp8 tensor": Kind(modelopt("FP8"), {"_proj.": PER_TENSOR}, "f8", True, ACTIVATIONS),
    "fp8 channel": Kind(
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        {"_proj.": fp8((1, 0), "BF16")},
        "f8_row",
        True,
    ),
    "fp8 block 32 ue8m0": Kind(
        {
            "quant_method": "fp8",
            "weight_block_size": [32, 32],
            "scale_fmt": "ue8m0",
            "modules_to_not_convert": ["lm_head"],
        },
        {"_proj.": fp8((32, 32), "F8_E8M0", "weight_scale_inv")},
        "mxfp8",
        True,
    ),
    "fp8 and fp4 experts": Kind(
        {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0", "expert_dtype": "fp4"},
        {
            ".experts.": fp4(32, "F8_E8M0", "weight", scale_name="scale", codes_dtype="I8"),
            "_proj.": fp8((128, 128), "F8_E8M0", "scale"),
        },
        "mxfp4",
    ),
    "fp8 block 64": Kind(
        {"quant_method": "fp8", "weight_block_size": [64, 64], "activation_scheme": "dynamic"},
        {"_proj.": fp8((64, 64), "F32", "weight_scale_inv")},
        "f8_32",
        True,
    ),
    "ct fp8 block": Kind(
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
        {"_proj.": fp8((128, 128), "BF16")},
        "f8",
        True,
    ),
    "mxfp8": Kind(
        compressed(
            "mxfp8-quantized",
            num_bits=8,
            type="float",
            strategy="group",
            group_size=32,
            scale_dtype="torch.uint8",
        ),
        {"_proj.": fp8((1, 32), "U8")},
        "mxfp8",
        True,
    ),
    "ct mxfp4": Kind(
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        {"_proj.": fp4(32, "U8", "weight_packed")},
        "mxfp4",
    ),
    "nvfp4": Kind(modelopt("NVFP4"), {"_proj.": NVFP4}, "nvfp4", extra=ACTIVATIONS, rounding=THREE_ROUNDINGS),
    "ct nvfp4": Kind(
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        {"_proj.": fp4(16, "F8_E4M3", "weight_packed", ("weight_global_scale", True))},
        "nvfp4",
        extra={"input_global_scale": ("F32", (1,))},
        rounding=THREE_ROUNDINGS,
    ),
    "nf4": Kind(
        bitsandbytes(4), {"_proj.": bnb_4bit("nf4", is_double=True)}, "bnb4_double", True, rounding=2**-20
    ),
    "nf4 without double quantisation": Kind(
        bitsandbytes(4, bnb_4bit_use_double_quant=False),
        {"_proj.": bnb_4bit("nf4", is_double=False)},
        "bnb4",
        True,
    ),
    "fp4": Kind(
        bitsandbytes(4, bnb_4bit_quant_type="fp4"),
        {"_proj.": bnb_4bit("fp4", is_double=True)},
        "bnb4_double",
        True,
        rounding=2**-20,
    ),
    "llm.int8": Kind(bitsandbytes(8), {"_proj.": bnb_8bit}, "int8_row", True, rounding=2**-21),
    "modelopt mixed": Kind(
        modelopt(
            "MIXED_PRECISION",
            quantized_layers={
                "model.layers.*.self_attn*": {"quant_algo": "FP8"},
                "model.layers.*.mlp.experts*": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
            },
        ),
        {"self_attn": PER_TENSOR, "_proj.": NVFP4},
        "nvfp4",
        extra=ACTIVATIONS,
        rounding=THREE_ROUNDINGS,
    ),
}


def stacked(stored: Mapping[str, tuple[str, Array]]) -> dict[str, tuple[str, Array]]:
    """Stack the experts of a layer, and the rows of gate and up."""
    found: dict[str, tuple[str, Array]] = {}
    experts: dict[tuple[str, str], dict[tuple[int, str], tuple[str, Array]]] = {}
    for name, part in stored.items():
        if (match := _EXPERT.fullmatch(name)) is None:
            found[name] = part
        else:
            layer, expert, matrix, end = match.groups()
            experts.setdefault((layer, end), {})[int(expert), matrix] = part
    for (layer, end), parts in experts.items():
        count = 1 + max(expert for expert, _ in parts)
        dtype = parts[0, "gate"][0]
        rows = [np.concatenate([parts[at, one][1] for one in ("gate", "up")]) for at in range(count)]
        for matrix, arrays in (("gate_up", rows), ("down", [parts[at, "down"][1] for at in range(count)])):
            found[f"{layer}.{matrix}_proj{end.removeprefix('weight')}"] = dtype, np.stack(arrays)
    return found


def write_kind(
    directory: Path,
    config: RawConfig,
    kind: Kind,
    *,
    seed: int,
    num_shards: int = 1,
    settings_file: str = "",
    is_stacked: bool = False,
) -> Path:
    """Write `directory`, and the dequantised weights to `<directory>.f32`; return the latter.

    Args:
        settings_file: modelopt's file for the settings; if empty, they are in config.json.
        is_stacked: whether all experts of a layer are in one tensor, and gate and up too.
    """
    rng = np.random.default_rng([seed, 36])
    stored: dict[str, tuple[str, Array]] = {}
    exact: dict[str, Array] = {}
    for name, values in random_tensors(config, seed, "BF16").items():
        as_module = name.replace("attention.query_key_value", "self_attn.qkv_proj")
        quantise = next((one for part, one in kind.quantise.items() if part in as_module), None)
        if quantise is None or not as_module.endswith(
            ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
        ):
            stored[name], exact[name] = ("BF16", values), values
            continue
        parts, exact[name] = quantise(rng, values.shape, float(values.std()))
        base = name.removesuffix("weight")
        stored |= {base + end: part for end, part in parts.items()}
        for end, (dtype, shape) in kind.extra.items():
            stored[base + end] = dtype, np.full(shape, 0.01, np.float32)
    if is_stacked:
        stored = stacked(stored)
    directory.mkdir(parents=True)
    settings = dict(kind.settings)
    if settings_file:
        details = {
            "exclude_modules" if key == "ignore" else key: value
            for key, value in settings.items()
            if key not in ("quant_method", "kv_cache_scheme", "producer")
        }
        (directory / settings_file).write_text(json.dumps({"quantization": details}))
    config_file = directory / "config.json"
    config_file.write_text(
        json.dumps(config if settings_file else config | {"quantization_config": settings})
    )
    write_checkpoint(directory, stored, num_shards=num_shards)
    plain = directory.with_name(directory.name + ".f32")
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    write_checkpoint(plain, {name: ("F32", values) for name, values in exact.items()})
    return plain
