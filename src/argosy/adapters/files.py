"""What an adapter's files contain, under the model's own names, whatever program wrote them.

    PEFT directory, GGUF file, MLX directory  ->  AdapterFiles  ->  memory of a model

A low-rank pair adds `scale * up.T @ (down @ x)` to a product y = W x (LoRA, arXiv:2106.09685). `down` is the paper's A,
and `up` is its B transposed, so that both are read row by row. DoRA then scales rows (`magnitudes.py`).

Elsewhere: `native/ops/low_rank.h` has the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from argosy.checkpoint.formats import BYTES_PER_VALUE, round_up

PairFormat = Literal["f32", "f16", "bf16"]
Values = NDArray[Any]  # float32, float16, or uint16 with the bits of bfloat16
PAIR_ALIGNMENT = 64  # bytes; of `down` and of `up` in the part of an expert


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """A low-rank pair for some rows of a dense matrix.

    down: [rank, columns of the matrix].   up: [rank, rows].   row_begin: the matrix's first row that it changes.
    magnitude: [rows], the lengths of the merged rows (DoRA, arXiv:2402.09353); None: they stay as they come out.
    """

    format: PairFormat
    down: Values
    up: Values
    scale: float
    row_begin: int = 0
    magnitude: NDArray[np.float32] | None = None

    @property
    def rank(self) -> int:
        return len(self.down)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPart:
    """The pairs of gate, up and down of every routed expert of a layer: sizes of one expert's part, in bytes its
    `down` and `up` of gate, of up and of down in turn, each aligned to PAIR_ALIGNMENT.

    ranks: of gate, up and down; 0: the matrix has no pair. An expert without a pair has one of zeros.
    """

    format: PairFormat
    ranks: tuple[int, int, int]
    scales: tuple[float, float, float]
    hidden: int
    width: int

    @property
    def offsets(self) -> tuple[tuple[int, int], ...]:
        """Where `down` and `up` of each matrix begin."""
        return self._layout()[0]

    @property
    def nbytes(self) -> int:
        return self._layout()[1]

    def shapes(self, matrix: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of `down` and `up` of gate (0), up (1) or down (2)."""
        columns, rows = (self.hidden, self.width) if matrix < 2 else (self.width, self.hidden)
        return (self.ranks[matrix], columns), (self.ranks[matrix], rows)

    def _layout(self) -> tuple[tuple[tuple[int, int], ...], int]:
        size, end = BYTES_PER_VALUE[self.format], 0
        places = []
        for matrix in range(3):
            starts = []
            for rank, length in self.shapes(matrix):
                starts.append(end)
                end += round_up(rank * length * size, PAIR_ALIGNMENT)
            places.append((starts[0], starts[1]))
        return tuple(places), end


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingPair:
    """A pair of the embedding table: adds `scale * rows[id] @ up` to the embedding of a token.

    rows: [vocab_size, rank].   up: [rank, hidden_size].
    magnitude: the lengths of the columns of the merged table, [1, hidden_size], as peft has them, or of its rows,
        [vocab_size, 1], as mlx-lm; None: they stay as they come out.
    """

    format: PairFormat
    rows: Values
    up: Values
    scale: float
    magnitude: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFiles:
    """An adapter that fits its base model.

    dense: pairs by the canonical name of their matrix (`layers.3.q`, `layers.3.router`, `head`, and the others of
        `checkpoint/geometry.py`). Pairs of `kv_up` are given for
        `k_up` and `v_up`, whose rows are the key and the value halves of all heads: [heads * key_rows], not
        transposed, and [heads * value_rows].
    embedding: the pair of the embedding table.
    replaced: whole matrices that replace those of the base, by canonical name (`embed`, `head`, `router`).
    experts: by layer; absent layers have no pairs.
    read_expert: (layer, expert) -> the bytes of its part, `ExpertPart.nbytes` of them.
    digest: 32 bytes that identify all of this and its scales, but not the user's factor.
    invocation_tokens: the adapter is active from their last appearance in the prompt on; empty: always (activated
        LoRA, arXiv:2504.12397).
    notes: sentences for the user.
    """

    path: Path
    kind: Literal["peft", "gguf", "mlx"]
    digest: bytes
    dense: Mapping[str, tuple[LowRank, ...]] = field(default_factory=dict)
    embedding: EmbeddingPair | None = None
    replaced: Mapping[str, Replacement] = field(default_factory=dict)
    experts: Mapping[int, ExpertPart] = field(default_factory=dict)
    read_expert: Callable[[int, int], bytes] | None = None
    invocation_tokens: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """A matrix [rows, columns] instead of the base's."""

    format: PairFormat
    values: Values
