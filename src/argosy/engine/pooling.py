"""Pool the hidden states of a text into one vector, its embedding.

    hidden states after the final norm  ─ the mean of all, or the last ─  divided by their length  ─>  Result.embedding

States are added one position after another, in float64. So a vector has the same bits with any chunks, batch and
number of threads.

A `LogitsReader` takes the place of the pool when a caller wants the logits of every position.

Elsewhere: `answers.py` gives each pool the rows of a step; `checkpoint/pooling.py` reads a checkpoint's declaration.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from argosy.config import Pooling
from argosy.errors import ArgosyError, UsageError
from argosy.model.model import Model

Array = NDArray[np.float32]


class Pool:
    """Collects the hidden states of one sequence, in order of position.

    Args:
        num_tokens: positions of the sequence, at least one.
    """

    def __init__(self, pooling: Pooling, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._num_pooled = num_tokens if pooling == "mean" else 1
        self._sum: NDArray[np.float64] | None = None
        self.needed_from = num_tokens - self._num_pooled
        """The first position whose hidden state is still needed."""

    @property
    def is_complete(self) -> bool:
        return self.needed_from == self._num_tokens

    def read(self, model: Model, rows: NDArray[np.int64]) -> None:
        """Read the next needed positions, which are these rows of the last step."""
        self.add(model.final_states(rows))

    def add(self, states: Array) -> None:
        """Add the hidden states [positions, hidden_size] of the next needed positions."""
        if self._sum is None:
            self._sum = np.zeros(states.shape[1], np.float64)
        for state in states:  # one by one: the order of these sums is fixed
            self._sum += state
        self.needed_from += len(states)

    def vector(self) -> Array:
        """The pooled vector, of length 1: float32 [hidden_size].

        Raises:
            ArgosyError: the vector is not finite: the weights or the arithmetic are broken.
        """
        assert self.is_complete
        assert self._sum is not None
        return normalised(self._sum / self._num_pooled)


class LogitsReader:
    """Passes on the logits of every position of one sequence, instead of pooling its hidden states.

    Args:
        take: receives the position of the first row, and the rows: float32 [rows, vocab_size].
    """

    def __init__(self, num_tokens: int, take: Callable[[int, Array], None]) -> None:
        self._num_tokens, self._take = num_tokens, take
        self.needed_from = 0

    @property
    def is_complete(self) -> bool:
        return self.needed_from == self._num_tokens

    def read(self, model: Model, rows: NDArray[np.int64]) -> None:
        """See `Pool.read`."""
        self._take(self.needed_from, model.logits(rows))
        self.needed_from += len(rows)

    def vector(self) -> None:
        """There is none."""


def normalised(vector: NDArray[np.floating]) -> Array:
    """Divide a vector [size] by its length; zeros stay zeros.

    Raises:
        ArgosyError: the vector is not finite.
    """
    # fsum is exact before it rounds, so the order of its terms does not matter.
    length = math.sqrt(math.fsum((vector.astype(np.float64) ** 2).tolist()))
    if not math.isfinite(length):
        raise ArgosyError("the embedding is not finite: the weights or the arithmetic are broken")
    return (vector / (length or 1.0)).astype(np.float32)


def shortened(vector: Array, dimensions: int) -> Array:
    """Return the first `dimensions` of an embedding, rescaled to length 1 (arXiv:2205.13147).

    Raises:
        UsageError: the embedding has fewer.
    """
    if not 1 <= dimensions <= len(vector):
        raise UsageError(f"dimensions must be from 1 to {len(vector)} with this model, found {dimensions}")
    return vector if dimensions == len(vector) else normalised(vector[:dimensions])
