"""Say which tokens of a prompt the last layers of a model need, and where they have seen enough to continue.

The *tail* of a model is its last layers, if they keep nothing but a window. A position then sees only the last
positions before it in each of them, so a prompt needs them only near its end: with n layers and windows of w positions,
layer l runs for the last 1 + (n - l) (w - 1) positions. Everything that they read is computed as in a full run, so all
numbers are the same, to the bit. A prefix whose tail is not complete can be reused only if the new prompt does not
read it, or if its end was foreseen: there too, the tail runs for the last positions before it.

    ends of a prompt  ->  a token's distance to the next one (`Step.to_end`)  ->  native/ops/stack.cpp leaves tokens out

Elsewhere: `config/model.py` finds the tail; `engine/prefix.py` foresees ends and finds prefixes.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Tail(NamedTuple):
    """The last layers, whose keys and values exist only near the ends of prompts.

    reach: positions before an end for which some of these layers run.
    window: positions that a token sees in them, its own included; the largest of all layers.
    block_tokens: positions of a KV block.
    """

    reach: int
    window: int
    block_tokens: int

    def num_usable(self, complete_from: Sequence[int], last: int) -> int:
        """Return the most of a prompt's first blocks after which it can continue.

        Args:
            complete_from: of each block, `PromptEnds.complete_from` of the sequence that computed it.
            last: the position from which on the prompt needs every layer.
        """
        usable = len(complete_from)
        while (
            usable
            and usable * self.block_tokens + self.reach - 1 > last // self.block_tokens * self.block_tokens
        ):
            missing = self._missing(complete_from, usable)
            if missing is None:
                break
            # After any block from `missing` to `usable`, the next token sees the missing block.
            usable = missing
        return usable

    def is_complete(self, complete_from: Sequence[int]) -> bool:
        """Return whether the token after these first blocks of a sequence finds all that it sees."""
        return self._missing(complete_from, len(complete_from)) is None

    def _missing(self, complete_from: Sequence[int], count: int) -> int | None:
        first = max(0, count * self.block_tokens - self.window + 1) // self.block_tokens
        return next((at for at in reversed(range(first, count)) if complete_from[at] > count), None)


class PromptEnds:
    """The positions of one prompt before which the tail is complete, from the last of which on every token runs.

    Args:
        wanted: where prefixes are likely to end; multiples of `tail.block_tokens`.
        last: the position from which on every layer is needed.
        start: the first position that is computed.
        is_complete: whether the tail is complete before `start`.
    """

    def __init__(
        self, tail: Tail, wanted: Iterable[int], last: int, *, start: int, is_complete: bool
    ) -> None:
        self._tail = tail
        self._start = start if is_complete else -1
        self._ends = [last // tail.block_tokens * tail.block_tokens]
        for end in wanted:
            self.add(end, start)

    def add(self, end: int, num_computed: int) -> None:
        """Complete the tail before `end` too, unless it is too late: `num_computed` positions have run."""
        if num_computed <= max(self._start, end - self._tail.reach + 1) and end < self._ends[-1]:
            insort(self._ends, end)

    def to_end(self, order: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the distance of these positions to the next end, 0 from the last one on."""
        ends = np.array([*self._ends, 0], np.int32)
        following = np.searchsorted(ends[:-1], order, side="right")
        distances: NDArray[np.int32] = np.where(
            following < len(self._ends), ends[following] - order, np.int32(0)
        )
        return distances

    def complete_from(self, block: int) -> int:
        """Return how many first blocks a prefix must have, at least, to find all that it sees in this one."""
        following = bisect_right(self._ends, block * self._tail.block_tokens)
        return self._ends[following] // self._tail.block_tokens if following < len(self._ends) else block + 1
