"""Tokens that run together in one step, flattened over their sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of one forward pass: T tokens of S sequences.

    token_ids, positions, sequence: int32 [T]; `sequence` is a row of `block_table`.
    slots: int64 [T], the place of a token's keys and values: KV block * tokens per block + offset.
    block_table: int32 [S, blocks]; unused entries are 0.
    is_decode: bool [T]; prompt tokens are False.
    last_rows: int64 [L], rows whose logits are needed.
    state_slots: int32 [S], the slot of each sequence's recurrent state; None if no layer has one.
    """

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    sequence: NDArray[np.int32]
    slots: NDArray[np.int64]
    block_table: NDArray[np.int32]
    is_decode: NDArray[np.bool_]
    last_rows: NDArray[np.int64]
    state_slots: NDArray[np.int32] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)
