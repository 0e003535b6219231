"""Quantize float32 into GGUF blocks for test models: fast and simple, not the best possible rounding.

`gguf.quants` has most of the 32-value types. The 256-value types, and IQ4_NL, are here, after the layouts in
ggml-common.h (llama.cpp): scales come from the largest and smallest value of a sub-block, without the searches of
llama-quantize. Quantising to the i-quants below four bits is a search in a grid for every eight values, which takes
minutes for a model: these are random blocks instead.
"""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray

BLOCK_TYPES = (
    *("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "IQ4_NL"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),
)
RANDOM_TYPES = (*("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0"),)


def block_shape(block_type: str) -> tuple[int, int]:
    """Values and bytes of one block."""
    values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[block_type]]
    return values, nbytes


def row_bytes(block_type: str, cols: int) -> int:
    values, nbytes = block_shape(block_type)
    if cols % values:
        raise ValueError(f"{block_type} packs {values} values, and a row has {cols}")
    return cols // values * nbytes


def to_blocks(block_type: str, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Convert values [rows, cols] to bytes [rows, row_bytes].

    Raises:
        ValueError: a row is not a whole number of blocks.
    """
    nbytes = row_bytes(block_type, rows.shape[1])
    if block_type in _QUANTISERS:
        values, _ = block_shape(block_type)
        blocks = _QUANTISERS[block_type](np.ascontiguousarray(rows, np.float32).reshape(-1, values))
        return blocks.reshape(len(rows), nbytes)
    # `quantize` takes 16 rows at a time, which should be long.
    long = np.ascontiguousarray(rows, np.float32).reshape(len(rows) // math.gcd(len(rows), 64), -1)
    packed = quantize(long, gguf.GGMLQuantizationType[block_type])
    return np.ascontiguousarray(packed).view(np.uint8).reshape(len(rows), nbytes)


def scale_blocks(block_type: str, blocks: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """The same blocks [n, block bytes] with every value times `factor`, to the precision of their float16 scales."""
    scaled = blocks.copy()
    for begin in _SCALES[block_type]:
        halves = scaled[:, begin : begin + 2].copy().view(np.float16)
        scaled[:, begin : begin + 2] = (halves.astype(np.float32) * factor).astype(np.float16).view(np.uint8)
    return scaled


def random_blocks(
    block_type: str, count: int, deviation: float, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Blocks [count, block bytes] of random codes with mean near 0, whose scales give about the standard deviation."""
    _, nbytes = block_shape(block_type)
    blocks = random.integers(0, 256, (count, nbytes), np.uint8)
    if block_type == "TQ2_0":  # of its four codes, quantisers use three
        blocks[:, :64] = _joined(random.integers(0, 3, (count, 4, 64), np.uint8), 2)
    _set_scales(block_type, blocks, np.ones(count, np.float32))
    some = gguf.dequantize(blocks[:1024], gguf.GGMLQuantizationType[block_type])
    scales = (
        random.uniform(0.5, 1.5, count) * deviation / (1.04 * float(some.std()))
    )  # 1.04: of their own spread
    _set_scales(block_type, blocks, scales.astype(np.float32))
    return blocks


def _set_scales(block_type: str, blocks: NDArray[np.uint8], scales: NDArray[np.float32]) -> None:
    halves = scales.astype(np.float16)
    if block_type == "IQ1_M":  # four bits of the scale on top of each of the last four words
        words = blocks[:, 48:].view(np.uint16)
        for number in range(4):
            part = halves.view(np.uint16) >> (4 * number) & 15
            words[:, number] = words[:, number] & 0xFFF | part << 12
        blocks[:, 48:] = words.view(np.uint8)
        return
    for begin in _SCALES[block_type]:
        blocks[:, begin : begin + 2] = halves.reshape(-1, 1).view(np.uint8)


# Where a block holds its float16 scales.
_SCALES = {
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    **dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}
_IQ4_VALUES = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)


def _inverse(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    there = np.abs(scale) > 1e-30
    return np.where(there, 1 / np.where(there, scale, 1), 0).astype(np.float32)


def _half(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    rounded = values.astype(np.float16)
    return rounded.reshape(-1, 1).view(np.uint8), rounded.astype(np.float32)


def _joined(parts: NDArray[np.integer[Any]], bits: int) -> NDArray[np.uint8]:
    """Join parts [n, k, m] of `bits` bits each into bytes [n, m], the first part in the lowest bits."""
    shifts = np.arange(parts.shape[1], dtype=np.uint8) * np.uint8(bits)
    return np.bitwise_or.reduce(parts << shifts[:, None], axis=1)  # type: ignore[no-any-return]


def _halves(quants: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    """Pack 4-bit codes [n, 256]: of each 64, the first 32 go into the low halves of 32 bytes."""
    return _joined(quants.reshape(-1, 2, 32), 4).reshape(-1, 128)


def _pairs(quants: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    """Pack 2-bit codes [n, 256]: of each 128, four runs of 32 share 32 bytes."""
    return _joined(quants.reshape(-1, 4, 32), 2).reshape(-1, 64)


# ── scale and min ───────────────────────────────────────────────────────────────────────────────────────────────────


def _with_minimum(
    values: NDArray[np.float32], cols: int, levels: int, largest: int
) -> tuple[NDArray[np.uint8], ...]:
    """For [n, 256]: d, dmin, scales and minima of each `cols` up to `largest`, and quants [n, 256] below `levels`."""
    groups = values.reshape(-1, 256 // cols, cols)
    low = np.minimum(groups.min(axis=2), 0)
    steps = (groups.max(axis=2) - low) / (levels - 1)
    d_bytes, d = _half(steps.max(axis=1) / largest)
    m_bytes, m = _half(-low.min(axis=1) / largest)
    scales = np.clip(np.rint(steps * _inverse(d)[:, None]), 0, largest).astype(np.uint8)
    minima = np.clip(np.rint(-low * _inverse(m)[:, None]), 0, largest).astype(np.uint8)
    step, offset = scales * d[:, None], minima * m[:, None]
    quants = np.clip(np.rint((groups + offset[:, :, None]) * _inverse(step)[:, :, None]), 0, levels - 1)
    return d_bytes, m_bytes, scales, minima, quants.astype(np.uint8).reshape(-1, 256)


def _q2_k(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    d, dmin, scales, minima, quants = _with_minimum(values, 16, 4, 15)
    return np.hstack([scales | (minima << 4), _pairs(quants), d, dmin])


def _q4_k(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    d, dmin, scales, minima, quants = _with_minimum(values, 32, 16, 63)
    return np.hstack([d, dmin, _six_bit_pairs(scales, minima), _halves(quants)])


def _q5_k(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    d, dmin, scales, minima, quants = _with_minimum(values, 32, 32, 63)
    high = _joined((quants >> 4).reshape(-1, 8, 32), 1)
    return np.hstack([d, dmin, _six_bit_pairs(scales, minima), high, _halves(quants & 15)])


def _six_bit_pairs(scales: NDArray[np.uint8], minima: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.hstack(
        [
            scales[:, :4] | (scales[:, 4:] >> 4 << 6),
            minima[:, :4] | (minima[:, 4:] >> 4 << 6),
            (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4),
        ]
    )


# ── scale alone ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _signed_scales(
    values: NDArray[np.float32], cols: int, end: float, largest: int
) -> tuple[NDArray[np.uint8], NDArray[np.int8], NDArray[np.float32]]:
    """For [n, 256]: d, a scale for each `cols` up to `largest`, and [n, groups, cols] divided by both.

    The value farthest from zero in a group comes out near `end`.
    """
    groups = values.reshape(-1, 256 // cols, cols)
    farthest = np.take_along_axis(groups, np.abs(groups).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
    steps = farthest / np.float32(end)
    d_bytes, d = _half(np.abs(steps).max(axis=1) / largest)
    scales = np.clip(np.rint(steps * _inverse(d)[:, None]), -largest, largest).astype(np.int8)
    return d_bytes, scales, groups * _inverse(scales * d[:, None])[:, :, None]


def _q3_k(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    d, scales, scaled = _signed_scales(values, 16, -4, 31)
    quants = (np.clip(np.rint(scaled), -4, 3) + 4).astype(np.uint8).reshape(-1, 256)
    codes = (scales + 32).view(np.uint8)
    low, high = _joined((codes & 15).reshape(-1, 2, 8), 4), _joined((codes >> 4).reshape(-1, 4, 4), 2)
    return np.hstack([_joined((quants >> 2).reshape(-1, 8, 32), 1), _pairs(quants & 3), low, high, d])


def _q6_k(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    d, scales, scaled = _signed_scales(values, 16, -32, 127)
    quants = (np.clip(np.rint(scaled), -32, 31) + 32).astype(np.uint8)
    low = _joined((quants & 15).reshape(-1, 2, 64), 4).reshape(
        -1, 128
    )  # the first 64 of each 128 in the low halves
    return np.hstack([low, _pairs(quants >> 4), scales.view(np.uint8), d])


def _iq4_codes(scaled: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest table entries, [n, 32]: the first 16 in the low halves of 16 bytes."""
    between = (_IQ4_VALUES[1:] + _IQ4_VALUES[:-1]) / 2
    return _joined(np.searchsorted(between, scaled).astype(np.uint8).reshape(-1, 2, 16), 4)


def _iq4_nl(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    farthest = np.take_along_axis(values, np.abs(values).argmax(axis=1)[:, None], axis=1)[:, 0]
    d_bytes, d = _half(farthest / _IQ4_VALUES[0])
    return np.hstack([d_bytes, _iq4_codes(values * _inverse(d)[:, None])])


def _iq4_xs(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    d, scales, scaled = _signed_scales(values, 32, _IQ4_VALUES[0], 31)
    codes = (scales + 32).view(np.uint8)
    high, low = (
        _joined((codes >> 4).reshape(-1, 4, 1), 2).reshape(-1, 2),
        _joined((codes & 15).reshape(-1, 2, 1), 4),
    )
    return np.hstack([d, high, low.reshape(-1, 4), _iq4_codes(scaled).reshape(-1, 128)])


_QUANTISERS = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
