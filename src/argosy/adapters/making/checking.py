"""How far two models' distributions of the next token are apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def divergence(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Return the mean KL divergence of `found` from `expected`, in nats; both are logits [tokens, vocab_size].

    NaN if a logit is not a finite number.
    """
    first, second = (_log_softmax(logits.astype(np.float64)) for logits in (expected, found))
    return float((np.exp(first) * (first - second)).sum(axis=1).mean())


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    logits = logits - logits.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return found
