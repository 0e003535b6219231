"""The factors of DoRA (arXiv:2402.09353): each row of a merged matrix gets the length that training gave it.

    y[r] = factor[r] * (W x + s B (A x))[r],  factor[r] = magnitude[r] / |(W + s B A)[r]|

W is the matrix as products use it, dequantised row by row: no copy of it is made. Lengths are computed in float64, once
for each adapter. The user's factor multiplies s in both places, as peft's `scale_layer` does. With a factor of 0, peft
still gives rows their magnitudes; here such an adapter is the base.

Sources: `tuners/lora` of peft 0.21, `tuner` of mlx-lm 0.32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.adapters.files import EmbeddingPair, LowRank
from argosy.adapters.values import widen
from argosy.errors import CheckpointError

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_BLOCK_BYTES = 4 << 20  # of `t` at once


class Factors:
    """The factors of one adapter.

    Args:
        path: the adapter's, for errors.   factor: multiplies every scale.
    """

    def __init__(self, path: Path, factor: float) -> None:
        self._path, self._factor = path, factor

    def of_rows(self, name: str, pair: LowRank, base: _native.Matrix) -> Floats | None:
        """Return the factors [1, rows] of the rows that a pair changes; None: it has no magnitude.

        Raises:
            CheckpointError: a row is zero, so that it cannot be scaled.
        """
        if pair.magnitude is None:
            return None
        squares, down = np.empty(pair.up.shape[1]), widen(pair.down, pair.format)
        for rows in _blocks(len(squares), pair.rank):
            t = self._scaled(pair.scale, widen(pair.up[:, rows], pair.format).T)
            _native.merged_squares(base, pair.row_begin + rows.start, t, down, squares[rows])
        return self._finish(name, pair.magnitude, squares).reshape(1, -1)

    def of_keys(self, name: str, pair: LowRank, base: _native.Matrix, num_heads: int) -> Floats | None:
        """Do as `of_rows` for `k_up`, whose matrix has the rows of each head transposed.

        Args:
            pair: down [rank, kv_rank], up [rank, heads * nope_dim].
            base: [heads * kv_rank, nope_dim].
        """
        if pair.magnitude is None:
            return None
        t = self._scaled(pair.scale, widen(pair.down, pair.format).T)
        up, squares = widen(pair.up, pair.format), np.zeros((num_heads, base.cols))
        for head in range(num_heads):
            own = np.ascontiguousarray(up[:, head * base.cols :][:, : base.cols])
            _native.merged_squares(base, head * len(t), t, own, squares[head], of_columns=True)
        return self._finish(name, pair.magnitude, squares.reshape(-1)).reshape(1, -1)

    def of_embedding(self, pair: EmbeddingPair, base: _native.Matrix) -> Floats | None:
        """Return factors in the shape of the magnitude: [1, hidden] of columns, or [vocabulary, 1] of tokens."""
        if pair.magnitude is None:
            return None
        of_columns = len(pair.magnitude) == 1
        squares, up = np.zeros(pair.magnitude.size), widen(pair.up, pair.format)
        for rows in _blocks(len(pair.rows), len(up)):
            t = self._scaled(pair.scale, widen(pair.rows[rows], pair.format))
            out = squares if of_columns else squares[rows]
            _native.merged_squares(base, rows.start, t, up, out, of_columns=of_columns)
        return self._finish("embed", pair.magnitude.reshape(-1), squares).reshape(pair.magnitude.shape)

    def _scaled(self, scale: float, values: Floats) -> Floats:
        return np.ascontiguousarray(np.float32(scale * self._factor) * values)

    def _finish(self, name: str, magnitude: Floats, squares: Doubles) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            factors = (magnitude / np.sqrt(squares)).astype(np.float32)
        wrong = np.flatnonzero(~(np.isfinite(factors) & (squares > 0)))
        if wrong.size:
            row = int(wrong[0])
            raise CheckpointError(
                f"{self._path.name}: row {row} of {name} has length {squares[row] ** 0.5:.3g} with its pair, so DoRA "
                f"cannot scale it to {float(magnitude[row]):.3g}",
                hint="was the adapter trained for another base model?",
                path=self._path,
                tensor=name,
            )
        return factors


def _blocks(num_rows: int, rank: int) -> Iterator[slice]:
    step = max(8, _BLOCK_BYTES // (4 * rank))
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))
