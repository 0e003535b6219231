"""Build the step of the sequences that the scheduler chose: token ids, positions, KV slots, and inputs for media.

Elsewhere: `scheduler.py` chooses; `model/step.py` describes a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from argosy.engine.sequence import Sequence
from argosy.errors import ArgosyError
from argosy.kept.kv_windows import KvWindows
from argosy.model.step import Addition, Overrides, Step

_SPARE_COLUMNS = 8  # blocks that fit in a block table before it is reallocated


class Scheduled(NamedTuple):
    """A step, and the sequences for which it produces next tokens."""

    step: Step
    sequences: list[Sequence]  # rows of `step.block_table`
    counts: list[int] | None  # tokens of each sequence; None: one each, and all of them decode
    # In the order of `step.wanted`: one row each, and one more for every proposal. A pooled text wants no logits.
    ready: list[Sequence]
    proposals: dict[Sequence, list[int]]  # the unconfirmed last tokens of some decoding sequences

    def rows(self, logits: NDArray[np.float32]) -> list[tuple[Sequence, NDArray[np.float32], ListLike[int]]]:
        """Divide logits [rows, vocab_size] among the ready sequences: (sequence, its rows, its proposals)."""
        divided: list[tuple[Sequence, NDArray[np.float32], ListLike[int]]] = []
        at = 0
        for sequence in self.ready:
            proposals = self.proposals.get(sequence, ()) if self.proposals else ()
            end = at + 1 + len(proposals)
            divided.append((sequence, logits[at:end], proposals))
            at = end
        return divided


class CannotRun(Exception):
    """A sequence cannot run. No other sequence is affected, and nothing has run."""

    def __init__(self, sequence: Sequence, error: ArgosyError) -> None:
        super().__init__(str(error))
        self.sequence = sequence
        self.error = error


@dataclass(frozen=True, slots=True)
class _Decoding:
    """Arrays that stay the same between steps while the same sequences decode and no prompts run."""

    sequences: list[Sequence]
    rows: NDArray[np.int32]  # 0, 1, 2 ...
    wanted: NDArray[np.int64]  # the same
    is_decode: NDArray[np.bool_]
    block_table: NDArray[np.int32]
    state_slots: NDArray[np.int32] | None
    shifts: NDArray[np.float32] | None  # shifts of rotary positions; None: no sequence has media
    adapters: NDArray[np.int32] | None  # as `Step.adapters`

    @classmethod
    def of(cls, sequences: list[Sequence]) -> _Decoding:
        count = len(sequences)
        return cls(
            sequences,
            np.arange(count, dtype=np.int32),
            np.arange(count),
            np.ones(count, np.bool_),
            _block_table(sequences, spare=_SPARE_COLUMNS),
            _states_of(sequences),
            _shifts(sequences),
            _adapters(sequences, [np.array([s.num_computed], np.int32) for s in sequences]),
        )


class StepBuilder:
    """Builds one step after another.

    Args:
        block_tokens: positions of a KV block.
        windows: blocks of layers with a sliding window; None: there are no such layers.
        num_axes: axes of the model's rotary embedding.
        num_earlier: tokens before a step's that its n-grams reach back to.
    """

    def __init__(
        self, block_tokens: int, windows: KvWindows | None, num_axes: int, num_earlier: int = 0
    ) -> None:
        self._block_tokens, self._windows, self._num_axes = block_tokens, windows, num_axes
        self._num_earlier = num_earlier
        self._decoding = _Decoding.of([])

    def forget(self, sequence: Sequence | None = None) -> None:
        """Drop the arrays kept for a sequence that stopped, or for all: its blocks will differ."""
        if sequence is None or sequence in self._decoding.sequences:
            self._decoding = _Decoding.of([])

    def note_growth(self, sequence: Sequence) -> None:
        """Note that a sequence got more blocks."""
        same = self._decoding
        if sequence in same.sequences:
            count = len(sequence.blocks)
            if count <= same.block_table.shape[1]:
                same.block_table[same.sequences.index(sequence), :count] = sequence.blocks
            else:
                self._decoding = _Decoding.of([])

    def decode(self, running: list[Sequence]) -> Scheduled:
        """Build a step of one token per sequence. This step is the most frequent and must cost next to nothing."""
        if self._decoding.sequences != running:
            self._decoding = _Decoding.of(list(running))
        same, block_tokens = self._decoding, self._block_tokens
        positions = [s.num_computed for s in same.sequences]
        slots = [
            s.blocks[at // block_tokens] * block_tokens + at % block_tokens
            for s, at in zip(same.sequences, positions, strict=True)
        ]
        order = np.array(positions, np.int32)
        if self._windows is not None:
            for sequence, at in zip(same.sequences, positions, strict=True):
                if not at % block_tokens:
                    self._windows.reach(sequence, at + 1)
        step = Step(
            token_ids=np.array([s.new_ids[-1] for s in same.sequences], np.int32),
            sequence=same.rows,
            slots=np.array(slots, np.int64),
            block_table=same.block_table,
            is_decode=same.is_decode,
            order=order,
            wanted=same.wanted,
            state_slots=same.state_slots,
            angles=None
            if same.shifts is None
            else np.tile((order + same.shifts).astype(np.float32), (self._num_axes, 1)),
            window_blocks=None if self._windows is None else self._windows.of_block,
            earlier_ids=self._earlier_ids(same.sequences),
            adapters=same.adapters,
        )
        return Scheduled(step, same.sequences, None, same.sequences, {})

    def gather(self, parts: list[tuple[Sequence, int]], proposals: dict[Sequence, list[int]]) -> Scheduled:
        """Build a step of prompt chunks, and of each decoding sequence's uncomputed tokens followed by its
        proposals.
        """
        block_tokens = self._block_tokens
        sequences, counts = [sequence for sequence, _ in parts], []
        table = _block_table(sequences)
        token_ids: list[int] = []
        orders, slots, ready = [], [], []
        wanted: list[int] = []
        for row, (sequence, num_known) in enumerate(parts):
            start, proposed = sequence.num_computed, proposals.get(sequence, [])
            token_ids += sequence.tokens_from(start, num_known)
            if start + num_known == sequence.num_tokens and sequence.pool is None:
                ready.append(sequence)
                wanted += range(len(token_ids) - 1, len(token_ids) + len(proposed))
            token_ids += proposed
            counts.append(count := num_known + len(proposed))
            if self._windows is not None:
                self._windows.reach(sequence, start + count)
            order = np.arange(start, start + count, dtype=np.int32)
            orders.append(order)
            slots.append(
                table[row, order // block_tokens].astype(np.int64) * block_tokens + order % block_tokens
            )
        step = Step(
            token_ids=np.array(token_ids, np.int32),
            sequence=np.repeat(np.arange(len(parts), dtype=np.int32), counts),
            slots=np.concatenate(slots),
            block_table=table,
            is_decode=np.repeat([not sequence.is_prefilling for sequence in sequences], counts),
            order=np.concatenate(orders),
            wanted=np.array(wanted, np.int64),
            state_slots=_states_of(sequences),
            window_blocks=None if self._windows is None else self._windows.of_block,
            earlier_ids=self._earlier_ids(sequences),
            to_end=_to_end(sequences, orders),
            adapters=_adapters(sequences, orders),
        )
        if any(sequence.spans is not None for sequence in sequences):
            step = self._with_media(step, sequences, counts)
        return Scheduled(step, sequences, counts, ready, proposals)

    def _earlier_ids(self, sequences: list[Sequence]) -> NDArray[np.int32] | None:
        """Return int32 [sequences, num_earlier]: the ids before each sequence's first uncomputed token."""
        if not (most := self._num_earlier):
            return None
        earlier = np.full((len(sequences), most), -1, np.int32)
        for row, sequence in enumerate(sequences):
            if count := min(most, sequence.num_computed):
                earlier[row, most - count :] = sequence.tokens_from(sequence.num_computed - count, count)
        return earlier

    def _with_media(self, step: Step, sequences: list[Sequence], counts: list[int]) -> Step:
        """Add the inputs of media: rows, additions, angles, and how far positions see."""
        angles: list[NDArray[np.float32]] = []
        sees_until: list[NDArray[np.int32]] = []
        rows: list[NDArray[np.int64]] = []
        embeddings: list[NDArray[np.float32]] = []
        additions: dict[int, list[tuple[NDArray[np.int64], NDArray[np.float32]]]] = {}
        first_row = 0
        for sequence, count in zip(sequences, counts, strict=True):
            start, spans = sequence.num_computed, sequence.spans
            if spans is None:
                order = step.order[first_row : first_row + count]
                angles.append(np.tile(order.astype(np.float32), (self._num_axes, 1)))
                sees_until.append(order + np.int32(1))
            else:
                angles.append(spans.angles(start, count))
                sees_until.append(spans.sees_until(start, count))
                for at, made in spans.rows(start, count):
                    own = first_row + at
                    rows.append(own)
                    embeddings.append(made.embeddings)
                    for layer, vectors in made.additions.items():
                        additions.setdefault(layer, []).append((own, vectors))
            first_row += count
        with_spans = [sequence.spans for sequence in sequences if sequence.spans is not None]
        return step._replace(
            angles=np.concatenate(angles, axis=1) if any(one.has_angles for one in with_spans) else None,
            sees_until=np.concatenate(sees_until) if any(one.has_both_ways for one in with_spans) else None,
            overrides=Overrides(np.concatenate(rows), np.concatenate(embeddings)) if rows else None,
            additions=tuple(
                Addition(
                    layer,
                    np.concatenate([own for own, _ in parts]),
                    np.concatenate([vectors for _, vectors in parts]),
                )
                for layer, parts in sorted(additions.items())
            ),
        )


def _block_table(sequences: list[Sequence], *, spare: int = 0) -> NDArray[np.int32]:
    """Return int32 [sequences, blocks]; entries beyond a sequence's own blocks are 0."""
    longest = max((len(s.blocks) for s in sequences), default=0)
    table = np.zeros((len(sequences), longest + spare), np.int32)
    for row, sequence in enumerate(sequences):
        table[row, : len(sequence.blocks)] = sequence.blocks
    return table


def _states_of(sequences: Iterable[Sequence]) -> NDArray[np.int32] | None:
    """Return int32 [sequences], or None if no layer has a recurrent state."""
    slots = [sequence.state_slot for sequence in sequences if sequence.state_slot is not None]
    return np.array(slots, np.int32) if slots else None


def _to_end(sequences: list[Sequence], orders: list[NDArray[np.int32]]) -> NDArray[np.int32] | None:
    """Return int32 [tokens], the distance of each token to the end of its prompt; None: every layer needs all."""
    if all(sequence.tail_ends is None for sequence in sequences):
        return None
    distances = np.concatenate(
        [
            np.zeros_like(order) if sequence.tail_ends is None else sequence.tail_ends.to_end(order)
            for sequence, order in zip(sequences, orders, strict=True)
        ]
    )
    return distances if distances.any() else None


def _adapters(sequences: list[Sequence], orders: list[NDArray[np.int32]]) -> NDArray[np.int32] | None:
    """Return int32 [tokens], the number of each token's adapter, or -1; None: no token has one."""
    if all(sequence.adapter is None for sequence in sequences):
        return None
    of_each = zip((sequence.adapter for sequence in sequences), orders, strict=True)
    numbers = [np.full_like(order, -1) if use is None else use.numbers(order) for use, order in of_each]
    return found if ((found := np.concatenate(numbers)) >= 0).any() else None


def _shifts(sequences: Iterable[Sequence]) -> NDArray[np.float32] | None:
    """Return float32 [sequences]: the offset of each answer's rotary positions from its indices; None if all are 0."""
    shifts = [0 if sequence.spans is None else sequence.spans.shift for sequence in sequences]
    return np.array(shifts, np.float32) if any(shifts) else None
