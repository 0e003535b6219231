"""Quantise to Q5_0 blocks, 5.5 bits a weight, choosing each block's scale for the least squared error.

Elsewhere: `gguf` reads these blocks, and its own quantiser derives the scale from the largest weight of a block.
"""

from __future__ import annotations

import numpy as np

BLOCK = 32
SCALE_FACTORS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.76)


def quantise_q5_0(weights: np.ndarray) -> np.ndarray:
    """Q5_0 blocks of the last axis: weight = scale x (code - 16), code from 0 to 31.

    Args:
        weights: float32 [..., cols], cols a multiple of 32.

    Returns:
        uint8 [..., cols / 32 x 22]: for each block the float16 scale, 32 high bits, 32 low nibbles.
    """
    blocks = weights.reshape(-1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    best_error = np.full(len(blocks), np.inf, dtype=np.float32)
    best_scale = np.zeros((len(blocks), 1), dtype=np.float16)
    best_codes = np.full(blocks.shape, 16, dtype=np.uint8)
    for sign in (-1, 1):  # code 0 is -16, code 31 only +15: either sign may give the finer grid
        for factor in SCALE_FACTORS:
            scale = (factor * sign * largest / 16).astype(np.float16)
            wide = scale.astype(np.float32)
            inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)
            codes = np.clip(np.rint(blocks * inverse) + 16, 0, 31)
            error = np.square(wide * (codes - 16) - blocks).sum(axis=1)
            better = error < best_error
            best_error[better], best_scale[better] = error[better], scale[better]
            best_codes[better] = codes[better].astype(np.uint8)
    high = np.packbits(best_codes >> 4, axis=1, bitorder="little")
    low = (best_codes[:, :16] & 15) | ((best_codes[:, 16:] & 15) << 4)
    packed = np.concatenate([best_scale.view(np.uint8), high, low], axis=1)
    return packed.reshape(*weights.shape[:-1], -1)
