"""How far is one next-token distribution from another?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROWS = 64  # processed at once, in float64


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64 [rows, vocab] from logits [rows, vocab]."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def divergence(
    reference: NDArray[np.float32], other: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """KL(reference || other) in nats for each row of logits, and whether both have the same best token."""
    divergences, agrees = [], []
    for start in range(0, len(reference), _ROWS):
        log_p = log_probabilities(reference[start : start + _ROWS])
        log_q = log_probabilities(other[start : start + _ROWS])
        divergences.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
        agrees.append(log_p.argmax(axis=-1) == log_q.argmax(axis=-1))
    return np.concatenate(divergences), np.concatenate(agrees)
