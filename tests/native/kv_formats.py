"""Rounding in each format of the KV cache, computed with numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from argosy.config import KvDtype


def rounded(values: NDArray[np.float32], dtype: KvDtype) -> NDArray[np.float32]:
    """Round keys, values or latent vectors [..., dim] as a KV cache does."""
    if dtype == "f32":
        return values
    if dtype == "f16":
        return values.astype(np.float16).astype(np.float32)
    kept = np.empty_like(values)
    for begin in range(0, values.shape[-1], 32):
        group = values[..., begin : begin + 32]
        scale = (
            (abs(group).max(axis=-1, keepdims=True) / np.float32(127)).astype(np.float16).astype(np.float32)
        )
        kept[..., begin : begin + 32] = scale * np.rint(group * (np.float32(1) / scale)).clip(-127, 127)
    return kept
