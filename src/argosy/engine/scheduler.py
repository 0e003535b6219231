"""Which tokens run in the next step.

Every sequence that decodes gets its one token in every step, so a long prompt never stops the others; prompts share
what is left of the chunk, first come first served. A sequence is admitted when its prompt and its whole answer have
KV blocks, so none has to be thrown out half-way.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from argosy.engine.kv_cache import KvBlocks
from argosy.engine.sequence import Sequence
from argosy.model.batch import Batch


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A batch, and the sequences whose next token comes out of it (one per row of `batch.last_rows`)."""

    batch: Batch
    ready: list[Sequence]


class Scheduler:
    def __init__(self, blocks: KvBlocks, *, chunk_tokens: int, max_sequences: int) -> None:
        self._blocks = blocks
        self._chunk_tokens = chunk_tokens
        self._max_sequences = max_sequences
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or cancelled sequence out, and free its KV blocks."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        self._blocks.give_back(sequence.blocks)

    def next_batch(self) -> Scheduled:
        """The next step's tokens; call only while `has_work`."""
        self._admit()
        parts: list[tuple[Sequence, int]] = [(s, 1) for s in self._running if not s.is_prefilling]
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
            if needed > self._blocks.num_free:
                break
            self._waiting.popleft()
            sequence.blocks = self._blocks.take(needed)
            self._running.append(sequence)

    def _gather(self, parts: list[tuple[Sequence, int]]) -> Scheduled:
        block_tokens = self._blocks.block_tokens
        table = np.zeros((len(parts), max(len(s.blocks) for s, _ in parts)), np.int32)
        token_ids: list[int] = []
        positions, rows, slots, is_decode = [], [], [], []
        ready, last_rows = [], []
        num_tokens = 0
        for row, (sequence, count) in enumerate(parts):
            start = sequence.num_computed
            table[row, : len(sequence.blocks)] = sequence.blocks
            token_ids += sequence.tokens_from(start, count)
            where = np.arange(start, start + count, dtype=np.int32)
            positions.append(where)
            rows.append(np.full(count, row, np.int32))
            slots.append(
                table[row, where // block_tokens].astype(np.int64) * block_tokens + where % block_tokens
            )
            is_decode.append(np.full(count, not sequence.is_prefilling))
            num_tokens += count
            if start + count == sequence.num_tokens:
                ready.append(sequence)
                last_rows.append(num_tokens - 1)
            sequence.num_computed += count
        batch = Batch(
            token_ids=np.array(token_ids, np.int32),
            positions=np.concatenate(positions),
            sequence=np.concatenate(rows),
            slots=np.concatenate(slots),
            block_table=table,
            is_decode=np.concatenate(is_decode),
            last_rows=np.array(last_rows, np.int64),
        )
        return Scheduled(batch, ready)
