"""Quantise float32 into GGUF blocks, for test models: fast and plain, not the best rounding that there is.

`gguf.quants` has the types of 32 values; the K types of 256 are here, after the layouts in ggml-common.h (llama.cpp):
scales come from the largest and smallest value of a sub-block, without the searches of llama-quantize.
"""

from __future__ import annotations

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray

BLOCK_TYPES = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q5_K", "Q6_K")


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
    """Values [rows, cols] as bytes [rows, row_bytes].

    Raises:
        ValueError: a row is not a whole number of blocks.
    """
    nbytes = row_bytes(block_type, rows.shape[1])
    if block_type in _K_TYPES:
        blocks = _K_TYPES[block_type](np.ascontiguousarray(rows, np.float32).reshape(-1, 256))
        return blocks.reshape(len(rows), nbytes)
    packed = quantize(np.ascontiguousarray(rows, np.float32), gguf.GGMLQuantizationType[block_type])
    return np.ascontiguousarray(packed).view(np.uint8).reshape(len(rows), nbytes)


def scale_blocks(block_type: str, blocks: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """The same blocks [n, block bytes] with every value times `factor`, to the precision of their float16 scales."""
    scaled = blocks.copy()
    for begin in _SCALES[block_type]:
        halves = scaled[:, begin : begin + 2].copy().view(np.float16)
        scaled[:, begin : begin + 2] = (halves.astype(np.float32) * factor).astype(np.float16).view(np.uint8)
    return scaled


# Where a block keeps its float16 scales.
_SCALES = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def _inverse(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(scale > 0, 1 / np.maximum(scale, 1e-30), 0).astype(np.float32)


def _half(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    rounded = values.astype(np.float16)
    return rounded.reshape(-1, 1).view(np.uint8), rounded.astype(np.float32)


def _with_minimum(values: NDArray[np.float32], levels: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Of Q4_K and Q5_K: header [n, 16] with d, dmin and the packed scales, and quants [n, 8, 32] below `levels`."""
    groups = values.reshape(-1, 8, 32)
    low = np.minimum(groups.min(axis=2), 0)
    steps = (groups.max(axis=2) - low) / (levels - 1)
    d_bytes, d = _half(steps.max(axis=1) / 63)
    m_bytes, m = _half(-low.min(axis=1) / 63)
    scales = np.clip(np.rint(steps * _inverse(d)[:, None]), 0, 63).astype(np.uint8)
    minima = np.clip(np.rint(-low * _inverse(m)[:, None]), 0, 63).astype(np.uint8)
    step, offset = scales * d[:, None], minima * m[:, None]
    quants = np.clip(np.rint((groups + offset[:, :, None]) * _inverse(step)[:, :, None]), 0, levels - 1)
    packed = np.hstack(
        [
            scales[:, :4] | (scales[:, 4:] >> 4 << 6),
            minima[:, :4] | (minima[:, 4:] >> 4 << 6),
            (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4),
        ]
    )
    return np.hstack([d_bytes, m_bytes, packed]), quants.astype(np.uint8)


def _pairs(quants: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Low four bits of [n, 8, 32]: groups 2i and 2i + 1 share 32 bytes."""
    low = quants & 15
    return (low[:, 0::2] | (low[:, 1::2] << 4)).reshape(-1, 128)


def _q4_k(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    header, quants = _with_minimum(values, 16)
    return np.hstack([header, _pairs(quants)])


def _q5_k(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    header, quants = _with_minimum(values, 32)
    high = np.zeros((len(quants), 32), np.uint8)
    for group in range(8):
        high |= (quants[:, group] >> 4) << group
    return np.hstack([header, high, _pairs(quants)])


def _q6_k(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    groups = values.reshape(-1, 16, 16)
    steps = np.abs(groups).max(axis=2) / 31
    d_bytes, d = _half(steps.max(axis=1) / 127)
    scales = np.clip(np.rint(steps * _inverse(d)[:, None]), 0, 127).astype(np.int8)
    inverse = _inverse(scales * d[:, None])
    quants = (np.clip(np.rint(groups * inverse[:, :, None]), -32, 31) + 32).astype(np.uint8)
    halves = quants.reshape(-1, 2, 4, 32)  # of 128 values, in four runs of 32
    low = (halves[:, :, :2] & 15) | ((halves[:, :, 2:] & 15) << 4)
    high = halves >> 4 << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.hstack(
        [
            low.reshape(-1, 128),
            np.bitwise_or.reduce(high, axis=2).reshape(-1, 64),
            scales.view(np.uint8),
            d_bytes,
        ]
    )


_K_TYPES = {"Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
