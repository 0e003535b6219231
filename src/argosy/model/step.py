"""The tokens that run together in one step, flattened over their sequences."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Overrides(NamedTuple):
    """Vectors given instead of the embeddings of some tokens: rows int64 [R], embeddings float32 [R, hidden]."""

    rows: NDArray[np.int64]
    embeddings: NDArray[np.float32]


class Addition(NamedTuple):
    """Vectors float32 [R, hidden], added to the hidden state of rows int64 [R] after a layer."""

    layer: int
    rows: NDArray[np.int64]
    vectors: NDArray[np.float32]


class Step(NamedTuple):
    """The input of one forward pass: T tokens of S sequences. Text needs only the fields without a default.

    A named tuple is faster to create than a frozen dataclass, and every token of an answer creates one.

    token_ids: int32 [T]. The id of a row in `overrides` is ignored, and must be in range.
    sequence: int32 [T], a row of `block_table`.
    slots: int64 [T], the place of a token's keys and values: KV block * tokens per block + offset.
    block_table: int32 [S, blocks]; unused entries are 0.
    is_decode: bool [T]; prompt tokens are False.
    order: int32 [T], the index of the token in its sequence, 0 first.
    wanted: int64 [W], rows whose logits are needed; several of a sequence are allowed.
    state_slots: int32 [S], the slot of each sequence's recurrent state; None if no layer has one.
    angles: float32 [axes, T], the rotary position on each axis (`RopeConfig.axes`); None: `order` on every axis.
    sees_until: int32 [T]. A token sees the positions of its sequence from order + 1 - window (or 0) to sees_until - 1,
        its own included. Later positions must be written in this step or an earlier one. In DeepSeek-V4's attention,
        neighbours with the same end also see the first of them. None: order + 1.
    overrides: embeddings of media, each row at most once.
    additions: vectors of media for the output of layers, each row at most once in an addition.
    taps: layers whose hidden states after their additions are handed back (`Decoder.tapped`).
    window_blocks: int32 [KV blocks], the window block of each KV block whose positions a token writes, or sees in a
        layer with a sliding window; None if such layers have no blocks of their own.
    earlier_ids: int32 [S, n], the token ids right before the first token of each sequence, the last one nearest; -1
        before its start. Only for n-gram tables; None: every sequence starts in this step.
    to_end: int32 [T], how far before the end of its prompt a token is; the last layers may leave out those that are far
        (`ModelConfig.reaches`). None: every layer runs for every token.
    adapters: int32 [T], the number of each token's adapter (`Model.set_adapter`); -1: none. None: no token has one.
    """

    token_ids: NDArray[np.int32]
    sequence: NDArray[np.int32]
    slots: NDArray[np.int64]
    block_table: NDArray[np.int32]
    is_decode: NDArray[np.bool_]
    order: NDArray[np.int32]
    wanted: NDArray[np.int64]
    state_slots: NDArray[np.int32] | None = None
    angles: NDArray[np.float32] | None = None
    sees_until: NDArray[np.int32] | None = None
    overrides: Overrides | None = None
    additions: tuple[Addition, ...] = ()
    taps: tuple[int, ...] = ()
    window_blocks: NDArray[np.int32] | None = None
    earlier_ids: NDArray[np.int32] | None = None
    to_end: NDArray[np.int32] | None = None
    adapters: NDArray[np.int32] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)
