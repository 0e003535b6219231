"""Where the media spans of a sequence lie, and the inputs that their positions need in a step.

    Prompt.spans  ->  Spans  ->  overrides, additions, angles and sees_until of a step; digests of KV blocks

Text needs none of this: a sequence without media has no `Spans`.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from argosy.errors import ArgosyError, UsageError
from argosy.prompt.media_span import Making, MediaSpan, SpanRows

# Offset of the span's part in the block, first position of that part in the span, kind, digest.
_MARK = struct.Struct("<IQ8s32s")


class Spans:
    """The media spans of one sequence's prompt, and the rows computed for them so far.

    Args:
        placed: (start, span) pairs, in order and without overlaps.
        hidden_size, num_layers, num_axes: the model's sizes.

    Raises:
        UsageError: a span needs more axes than the model's rotary embedding has.
    """

    def __init__(
        self,
        placed: Sequence[tuple[int, MediaSpan]],
        *,
        hidden_size: int,
        num_layers: int,
        num_axes: int,
    ) -> None:
        self.placed = tuple(placed)
        self._hidden_size = hidden_size
        self._num_layers = num_layers
        self._num_axes = num_axes
        self._starts = [start for start, _ in placed]
        # After a span, the rotary position of text is its index plus this.
        self._shifts: list[float] = [0]
        self._rows: dict[int, SpanRows] = {}  # rows of spans that are being computed, by number
        self._making: tuple[int, Making] | None = None  # a span's number, and its rows
        self._share_made = 0.0
        for _, span in placed:
            if span.angles is not None and span.angles.shape[0] not in (1, num_axes):
                raise UsageError(
                    f"a span of kind {span.kind} has angles on {span.angles.shape[0]} axes, and this model rotates"
                    f" on {num_axes}"
                )
            moved = span.num_positions if span.num_angles is None else span.num_angles
            self._shifts.append(self._shifts[-1] + moved - span.num_positions)
        self.has_angles = any(self._shifts) or any(span.angles is not None for _, span in placed)
        self.has_both_ways = any(span.sees_both_ways for _, span in placed)

    @property
    def shift(self) -> float:
        """The offset from a token's index in the answer to its rotary position."""
        return self._shifts[-1]

    def _within(self, start: int, end: int) -> Iterator[tuple[int, int, MediaSpan, int, int]]:
        """Yield the spans that overlap positions start to end: (number, first position, span, overlap begin, overlap
        end).
        """
        for number in range(max(0, bisect_right(self._starts, start) - 1), len(self.placed)):
            at, span = self.placed[number]
            if at >= end:
                return
            begin, stop = max(start, at), min(end, at + span.num_positions)
            if begin < stop:
                yield number, at, span, begin, stop

    def mark(self, start: int, count: int) -> bytes:
        """Return a digest of the media at these positions, to complement the placeholders; empty for text."""
        return b"".join(
            _MARK.pack(begin - start, begin - at, span.kind.encode(), span.digest)
            for _, at, span, begin, _ in self._within(start, start + count)
        )

    def cut(self, start: int, end: int) -> int:
        """Return the position, at most `end`, up to which a step from `start` can run.

        The result is `start` itself if a span that must run as a whole begins there and does not fit.
        """
        for _, at, span, begin, _ in self._within(start, end):
            if span.sees_both_ways and at + span.num_positions > end:
                return begin
        return end

    def whole(self, start: int) -> int:
        """Return how many positions from `start` on must run in one step."""
        for _, at, span, _, _ in self._within(start, start + 1):
            if span.sees_both_ways:
                return at + span.num_positions - start
        return 1

    def angles(self, start: int, count: int) -> NDArray[np.float32]:
        """Return rotary positions: float32 [axes, count]."""
        order = np.arange(start, start + count)
        ends = [at + span.num_positions for at, span in self.placed]
        shifts = np.array(self._shifts)[np.searchsorted(ends, order, side="right")]
        angles = np.tile((order + shifts).astype(np.float32), (self._num_axes, 1))
        for number, at, span, begin, end in self._within(start, start + count):
            if span.angles is not None:
                first = at + self._shifts[number]
                angles[:, begin - start : end - start] = first + span.angles[:, begin - at : end - at]
        return angles

    def sees_until(self, start: int, count: int) -> NDArray[np.int32]:
        """Return one more than the last position that each position sees: int32 [count]."""
        until = np.arange(start + 1, start + count + 1, dtype=np.int32)
        for _, at, span, begin, end in self._within(start, start + count):
            if span.sees_both_ways:
                until[begin - start : end - start] = at + span.num_positions
        return until

    def has_rows_until(self, start: int, end: int) -> int:
        """Return the position, at most `end`, up to which all media from `start` on have rows."""
        for number, _, _, begin, _ in self._within(start, end):
            if any(one not in self._rows for one in self._together(number)):
                return begin
        return end

    def _together(self, number: int) -> range:
        """Return a span's number, and that of the next one if it leads into it: a step runs both."""
        (at, span), following = self.placed[number], self.placed[number + 1 : number + 2]
        leads = any(
            begin == at + span.num_positions and one.sees_both_ways and not span.sees_both_ways
            for begin, one in following
        )
        return range(number, number + 1 + leads)

    @property
    def holds_rows(self) -> bool:
        """Whether rows exist that no step has used yet, or are being computed."""
        return bool(self._rows) or self._making is not None

    @property
    def share_made(self) -> float | None:
        """Return the finished share of the span that is being computed, 0 to 1; None if there is none."""
        return None if self._making is None else self._share_made

    def make_some(self, start: int) -> bool:
        """Do the next piece of work for the rows of the span at position `start`; return whether they are complete.

        Raises:
            ArgosyError: the rows cannot be computed, or do not fit the model.
        """
        for number in [one for found in self._within(start, start + 1) for one in self._together(found[0])]:
            span = self.placed[number][1]
            if number in self._rows:
                continue
            if self._making is not None and self._making[0] != number:
                self._stop_making()
            if self._making is None:
                made = span.make_rows()
                if isinstance(made, SpanRows):
                    self._rows[number] = self._checked(span, made)
                    continue
                self._making, self._share_made = (number, made), 0.0
            try:
                if (share := next(self._making[1])) is not None:
                    self._share_made = share
            except StopIteration as done:
                self._making = None
                self._rows[number] = self._checked(span, done.value)
                continue
            except BaseException:
                self._making = None
                raise
            return False
        return True

    def drop_rows(self) -> None:
        """Free the computed rows, and stop computing more."""
        self._stop_making()
        self._rows.clear()

    def _stop_making(self) -> None:
        if self._making is not None:
            self._making[1].close()
            self._making = None

    def rows(self, start: int, count: int) -> Iterator[tuple[NDArray[np.int64], SpanRows]]:
        """Yield the rows of media at these positions, part by part: (positions, counted from `start`, and their rows).

        All rows must exist (`has_rows_until`). A span's rows are freed with its last part.
        """
        for number, at, span, begin, end in self._within(start, start + count):
            made = self._rows[number]
            places = np.array(
                [one for one in range(begin - at, end - at) if one not in span.tokens], np.int64
            )
            part = places if span.tokens else slice(begin - at, end - at)  # a slice copies nothing
            if len(places):
                additions = {layer: vectors[part] for layer, vectors in made.additions.items()}
                yield places + (at - start), SpanRows(made.embeddings[part], additions)
            if end == at + span.num_positions:
                del self._rows[number]  # computed again only if the sequence is preempted

    def _checked(self, span: MediaSpan, rows: SpanRows) -> SpanRows:
        expected = (span.num_positions, self._hidden_size)
        for array in (rows.embeddings, *rows.additions.values()):
            if array.dtype != np.float32 or array.shape != expected:
                raise ArgosyError(
                    f"a span of kind {span.kind} needs float32 rows {list(expected)}, found"
                    f" {array.dtype} {list(array.shape)}"
                )
        for layer in rows.additions:
            if not 0 <= layer < self._num_layers:
                raise ArgosyError(
                    f"a span of kind {span.kind} adds to layer {layer}; the model has {self._num_layers}"
                )
        return rows
