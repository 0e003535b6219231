"""Which tokens run in the next step.

Every sequence that decodes gets its one token in every step, so a long prompt never stops the others; prompts share
what is left of the chunk, first come first served. A sequence is admitted when its prompt and its whole answer have
KV blocks, so none has to be thrown out half-way; where layers have a recurrent state, when there is a slot for it too.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from argosy.engine.kv_cache import KvBlocks
from argosy.engine.recurrent_state import StateSlots
from argosy.engine.sequence import Sequence
from argosy.model.batch import Batch


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A batch, and the sequences whose next token comes out of it (one per row of `batch.last_rows`)."""

    batch: Batch
    ready: list[Sequence]


@dataclass(frozen=True, slots=True)
class _Decoding:
    """What stays the same from step to step while the same sequences decode, and no prompt is there."""

    sequences: list[Sequence]
    rows: NDArray[np.int32]  # 0, 1, 2 ...
    last_rows: NDArray[np.int64]  # the same
    is_decode: NDArray[np.bool_]
    block_table: NDArray[np.int32]
    state_slots: NDArray[np.int32] | None

    @classmethod
    def of(cls, sequences: list[Sequence]) -> _Decoding:
        count = len(sequences)
        return cls(
            sequences,
            np.arange(count, dtype=np.int32),
            np.arange(count),
            np.ones(count, np.bool_),
            _block_table(sequences),
            _state_slots(sequences),
        )


class Scheduler:
    def __init__(
        self,
        blocks: KvBlocks,
        *,
        chunk_tokens: int,
        max_sequences: int,
        states: StateSlots | None = None,
    ) -> None:
        self._blocks = blocks
        self._states = states  # None: no layer has a recurrent state
        self._chunk_tokens = chunk_tokens
        self._max_sequences = max_sequences
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._decoding = _Decoding.of([])

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or cancelled sequence out, and free its KV blocks and its recurrent state."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        self._blocks.give_back(sequence.blocks)
        if self._states is not None and sequence.state_slot is not None:
            self._states.give_back(sequence.state_slot)
            sequence.state_slot = None

    def next_batch(self) -> Scheduled:
        """The next step's tokens; call only while `has_work`."""
        self._admit()
        parts: list[tuple[Sequence, int]] = [(s, 1) for s in self._running if not s.is_prefilling]
        if len(parts) == len(self._running):
            return self._decode()
        left = self._chunk_tokens
        for sequence in self._running:
            if sequence.is_prefilling and left:
                count = min(left, len(sequence.prompt_ids) - sequence.num_computed)
                parts.append((sequence, count))
                left -= count
        return self._gather(parts)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_sequences:
            sequence = self._waiting[0]
            needed = self._blocks.blocks_for(len(sequence.prompt_ids) + sequence.max_new_tokens)
            if needed > self._blocks.num_free or (self._states is not None and not self._states.num_free):
                break
            self._waiting.popleft()
            if self._states is not None:
                sequence.state_slot = self._states.take()
            sequence.blocks = self._blocks.take(needed)
            self._running.append(sequence)

    def _decode(self) -> Scheduled:
        """One token for every sequence: the step that has to cost nothing."""
        if self._decoding.sequences != self._running:
            self._decoding = _Decoding.of(list(self._running))
        same, block_tokens = self._decoding, self._blocks.block_tokens
        positions = [s.num_computed for s in same.sequences]
        slots = [
            s.blocks[at // block_tokens] * block_tokens + at % block_tokens
            for s, at in zip(same.sequences, positions, strict=True)
        ]
        for sequence in same.sequences:
            sequence.num_computed += 1
        batch = Batch(
            token_ids=np.array([s.new_ids[-1] for s in same.sequences], np.int32),
            positions=np.array(positions, np.int32),
            sequence=same.rows,
            slots=np.array(slots, np.int64),
            block_table=same.block_table,
            is_decode=same.is_decode,
            last_rows=same.last_rows,
            state_slots=same.state_slots,
        )
        return Scheduled(batch, same.sequences)

    def _gather(self, parts: list[tuple[Sequence, int]]) -> Scheduled:
        """Chunks of prompts, beside one token for each sequence that decodes."""
        block_tokens = self._blocks.block_tokens
        table = _block_table([sequence for sequence, _ in parts])
        token_ids: list[int] = []
        positions, slots, ready, last_rows = [], [], [], []
        for row, (sequence, count) in enumerate(parts):
            start = sequence.num_computed
            token_ids += sequence.tokens_from(start, count)
            where = np.arange(start, start + count, dtype=np.int32)
            positions.append(where)
            slots.append(
                table[row, where // block_tokens].astype(np.int64) * block_tokens + where % block_tokens
            )
            if start + count == sequence.num_tokens:
                ready.append(sequence)
                last_rows.append(len(token_ids) - 1)
        counts = [count for _, count in parts]
        batch = Batch(
            token_ids=np.array(token_ids, np.int32),
            positions=np.concatenate(positions),
            sequence=np.repeat(np.arange(len(parts), dtype=np.int32), counts),
            slots=np.concatenate(slots),
            block_table=table,
            is_decode=np.repeat([not sequence.is_prefilling for sequence, _ in parts], counts),
            last_rows=np.array(last_rows, np.int64),
            state_slots=_state_slots([sequence for sequence, _ in parts]),
        )
        for sequence, count in parts:
            sequence.num_computed += count
        return Scheduled(batch, ready)


def _block_table(sequences: list[Sequence]) -> NDArray[np.int32]:
    """int32 [sequences, blocks]; entries beyond a sequence's own are 0."""
    table = np.zeros((len(sequences), max((len(s.blocks) for s in sequences), default=0)), np.int32)
    for row, sequence in enumerate(sequences):
        table[row, : len(sequence.blocks)] = sequence.blocks
    return table


def _state_slots(sequences: list[Sequence]) -> NDArray[np.int32] | None:
    """int32 [sequences], or None where no layer has a recurrent state."""
    slots = [sequence.state_slot for sequence in sequences if sequence.state_slot is not None]
    return np.array(slots, np.int32) if slots else None
