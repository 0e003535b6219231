"""Random GGUF blocks, built from their layout, and the values that the `gguf` package reads from them."""

from __future__ import annotations

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.native import ik_blocks

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Block type -> slot format, columns of a block, bytes of a block, offsets of its float16 values. Some have none: the
# scale of MXFP4 is the block's first byte, those of NVFP4 are the first four, and that of IQ1_M lies in the highest
# four bits of its last four words. Some of ik_llama.cpp's have a scale before the blocks of each row.
BLOCK_TYPES: dict[str, tuple[str, int, int, tuple[int, ...]]] = {
    "Q8_0": ("q8", 32, 34, (0,)),
    "Q4_0": ("q4", 32, 18, (0,)),
    "Q4_1": ("q4_1", 32, 20, (0, 2)),
    "Q5_0": ("q5_0", 32, 22, (0,)),
    "Q5_1": ("q5_1", 32, 24, (0, 2)),
    "Q4_K": ("q4_k", 256, 144, (0, 2)),
    "Q5_K": ("q5_k", 256, 176, (0, 2)),
    "Q6_K": ("q6_k", 256, 210, (208,)),
    "Q2_K": ("q2_k", 256, 84, (80, 82)),
    "Q3_K": ("q3_k", 256, 110, (108,)),
    "IQ4_NL": ("iq4_nl", 32, 18, (0,)),
    "IQ4_XS": ("iq4_xs", 256, 136, (0,)),
    "MXFP4": ("mxfp4", 32, 17, ()),
    "NVFP4": ("nvfp4", 64, 36, ()),
    "IQ2_XXS": ("iq2_xxs", 256, 66, (0,)),
    "IQ2_XS": ("iq2_xs", 256, 74, (0,)),
    "IQ2_S": ("iq2_s", 256, 82, (0,)),
    "IQ3_XXS": ("iq3_xxs", 256, 98, (0,)),
    "IQ3_S": ("iq3_s", 256, 110, (0,)),
    "IQ1_S": ("iq1_s", 256, 50, (0,)),
    "IQ1_M": ("iq1_m", 256, 56, ()),
    "TQ1_0": ("tq1_0", 256, 54, (52,)),
    "TQ2_0": ("tq2_0", 256, 66, (64,)),
    "Q1_0": ("q1_0", 128, 18, (0,)),
    "Q2_0": ("q2_0", 64, 18, (0,)),
    **{
        name: (name.lower(), 256, size, (0,) if row_scale is None else ())
        for name, (size, row_scale) in ik_blocks.SIZES.items()
    },
}
# Types that the `gguf` package does not read yet, or, like ik_llama.cpp's, never will: their numbers in files.
WITHOUT_PACKAGE = {"Q1_0": 41, "Q2_0": 42, **ik_blocks.NUMBERS}
BLOCK_TYPE_OF = {format: name for name, (format, *_) in BLOCK_TYPES.items()}


def block_cols(format: str) -> int:
    return BLOCK_TYPES[BLOCK_TYPE_OF[format]][1]


def put_iq1_m_scales(blocks: Bytes, scales: NDArray[np.float16]) -> None:
    """Write the scale of each block: [blocks, 56] and [blocks]."""
    for i in range(4):
        nibble = (scales.view(np.uint16) >> 4 * i & 15).astype(np.uint8)
        blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 15 | nibble << 4


def random_blocks(block_type: str, rows: int, cols: int, *, seed: int = 0, scale: float = 0.02) -> Bytes:
    """Make blocks with random quants and sub-scales; float16 scales and mins are of order `scale`, with both signs."""
    _, width, size, halves = BLOCK_TYPES[block_type]
    generator = np.random.default_rng([seed, rows, cols])
    blocks = generator.integers(0, 256, (rows * cols // width, size), dtype=np.uint8)
    for at in halves:
        values = generator.standard_normal(len(blocks)) * scale
        blocks[:, at : at + 2] = values.astype(np.float16).reshape(-1, 1).view(np.uint8)
    if block_type == "MXFP4":
        exponents = np.log2(np.abs(generator.standard_normal(len(blocks))) * scale).clip(-20, 20)
        blocks[:, 0] = (127 + exponents.round()).astype(np.uint8)
    if block_type == "NVFP4":  # FP8 with a bias of 7 for the exponents
        exponents = np.log2(np.abs(generator.standard_normal((len(blocks), 4))) * scale).clip(-9, 8)
        blocks[:, :4] = np.maximum(0, np.round(8 * (exponents + 7))).astype(np.uint8)
    if block_type == "IQ1_M":
        put_iq1_m_scales(blocks, (generator.standard_normal(len(blocks)) * scale).astype(np.float16))
    return with_row_scales(block_type, blocks, generator.standard_normal(rows) * scale).reshape(-1)


def with_row_scales(block_type: str, blocks: Bytes, scales: NDArray[np.floating]) -> Bytes:
    """Put a scale before the blocks of each row, if the type has one: [rows, bytes of a row]."""
    _, row_scale = ik_blocks.SIZES.get(block_type, (0, None))
    rows = blocks.reshape(len(scales), -1)
    if row_scale is None:
        return rows
    return np.hstack([scales.astype(row_scale).reshape(-1, 1).view(np.uint8), rows])


def dequantized(block_type: str, blocks: Bytes, rows: int, cols: int) -> Floats:
    blocks = blocks.reshape(rows, -1)
    if block_type in ik_blocks.SIZES:
        return ik_blocks.dequantized(block_type, blocks, cols)
    if block_type in ("Q1_0", "Q2_0"):
        return _few_bits(blocks.reshape(-1, 18), 1 if block_type == "Q1_0" else 2).reshape(rows, cols)
    kind = gguf.GGMLQuantizationType[block_type]
    with np.errstate(invalid="ignore", over="ignore"):
        return gguf.quants.dequantize(blocks.reshape(1, -1), kind).reshape(rows, cols)  # one row: in one call


def _few_bits(blocks: Bytes, bits: int) -> Floats:
    """Decode a float16 scale and codes of one bit (1 and -1) or two (-1 to 2), the first in the lowest bits (ggml)."""
    d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    codes = (blocks[:, 2:, None] >> np.arange(0, 8, bits, dtype=np.uint8) & (1 << bits) - 1).reshape(
        len(d), -1
    )
    values = codes.astype(np.float32)
    with np.errstate(invalid="ignore"):
        return d * (2 * values - 1 if bits == 1 else values - 1)
