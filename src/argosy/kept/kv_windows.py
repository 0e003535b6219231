"""Give layers with a sliding window memory for the positions that a sequence may still see, and for few others.

The keys and values of windowed layers lie in *window blocks*. A KV block has one while a running sequence may see its
positions, and longer while there is room: a prefix can be reused only where the window blocks of its end remain.

    KV block written -> window block in use, by one or more sequences -> idle -> evicted, or in use again

Ends of prefixes that are likely to come back are kept: ends of prompts and answers, and points where prompts diverged.
Other idle window blocks are evicted first, the least recently used one before the rest; then the least recently used
end. There are enough window blocks for all running sequences, so one can always be taken.

Elsewhere: `kv_cache.py` hands out KV blocks; `engine/prefix.py` finds prefixes; native code reads `of_block` in every
step.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

NONE = -1
_ENDS_PER_SEQUENCE = 2


class HasBlocks(Protocol):
    """The part of a sequence that names its KV blocks."""

    @property
    def blocks(self) -> list[int]: ...


class WindowSizes(NamedTuple):
    """How many window blocks there are, and their purpose."""

    num_window_blocks: int
    window: int  # positions that a token sees, its own included; the largest of all layers
    most_ends: int  # number of kept ends of prefixes


def window_sizes(
    *, num_blocks: int, block_tokens: int, window: int, max_sequences: int, step_tokens: int
) -> WindowSizes | None:
    """Size window blocks for all running sequences with two ends each; None if every KV block would get one.

    Besides the blocks that it sees, a sequence holds the blocks that a step writes; the first of them may be partly
    written already.
    """
    seen = _blocks_seen(window, block_tokens)
    most_ends = _ENDS_PER_SEQUENCE * max_sequences
    written = max_sequences + -(-step_tokens // block_tokens)
    needed = (max_sequences + most_ends) * seen + written
    return WindowSizes(needed, window, most_ends) if needed < num_blocks else None


def _blocks_seen(window: int, block_tokens: int) -> int:
    """Return the most blocks that can contain the positions that a token sees, its own excluded."""
    return -(-(window - 1) // block_tokens) + 1


class KvWindows:
    """Maps each KV block to its window block.

    Attributes:
        of_block: int32 [KV blocks], the window block of each, or NONE; changed in place.
    """

    def __init__(self, num_blocks: int, block_tokens: int, sizes: WindowSizes) -> None:
        self.of_block: NDArray[np.int32] = np.full(num_blocks, NONE, np.int32)
        self.sizes = sizes
        self._block_tokens = block_tokens
        self.reset()

    def reset(self) -> None:
        """Take back every window block, whatever state an interrupted call left."""
        num_blocks = len(self.of_block)
        self.of_block[:] = NONE
        self._free = list(range(self.sizes.num_window_blocks - 1, -1, -1))
        self._users = [0] * num_blocks  # running sequences that may see the block's positions
        self._num_ends = [0] * num_blocks  # kept ends that include the block
        # KV blocks without users or ends, least recent first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._ends: OrderedDict[int, list[int]] = OrderedDict()  # by their last KV block, least recent first
        self._in_use: dict[HasBlocks, range] = {}  # block indices of each running sequence

    def has(self, block: int) -> bool:
        return bool(self.of_block[block] != NONE)

    def first_seen(self, position: int) -> int:
        """Return the index of a sequence's first block that the token at `position`, or a later token, sees."""
        return max(0, position - self.sizes.window + 1) // self._block_tokens

    def num_usable(self, blocks: list[int]) -> int:
        """Return the most of a sequence's first blocks after which another sequence can continue."""
        usable = len(blocks)
        while usable:
            first = self.first_seen(usable * self._block_tokens)
            missing = next((at for at in reversed(range(first, usable)) if not self.has(blocks[at])), None)
            if missing is None:
                break
            # After any block from `missing` to `usable`, the next token sees the missing block.
            usable = missing
        return usable

    # ── running sequences ───────────────────────────────────────────────────────────────────────────────────────

    def begin(self, sequence: HasBlocks, position: int) -> None:
        """Let a sequence continue at `position`. The full blocks that it sees there have window blocks."""
        indices = range(self.first_seen(position), -(-position // self._block_tokens))
        for index in indices:
            self._use(sequence.blocks[index])
        self._in_use[sequence] = indices

    def reach(self, sequence: HasBlocks, end: int) -> None:
        """Give a sequence window blocks for the positions before `end` that the next step may write."""
        used = self._in_use[sequence]
        stop = max(used.stop, -(-end // self._block_tokens))
        for index in range(used.stop, stop):
            self._use(sequence.blocks[index])
        self._in_use[sequence] = range(used.start, stop)

    def leave(self, sequence: HasBlocks, position: int) -> None:
        """Release the blocks that a sequence does not see from `position` on."""
        used = self._in_use[sequence]
        start = min(max(used.start, self.first_seen(position)), used.stop)
        for index in range(used.start, start):
            self._release(sequence.blocks[index])
        self._in_use[sequence] = range(start, used.stop)

    def end(self, sequence: HasBlocks) -> None:
        """Release all blocks that a sequence sees, before it gives back its KV blocks."""
        for index in self._in_use.pop(sequence):
            self._release(sequence.blocks[index])

    # ── idle window blocks ──────────────────────────────────────────────────────────────────────────────────────

    def keep_end(self, blocks: list[int]) -> None:
        """Keep the blocks that the token after these first blocks of a sequence sees, if all of them remain."""
        first = self.first_seen(len(blocks) * self._block_tokens)
        seen = blocks[first:]
        if not seen or not all(self.has(block) for block in seen):
            return
        if seen[-1] not in self._ends:
            for block in seen:
                self._num_ends[block] += 1
                self._idle.pop(block, None)
            self._ends[seen[-1]] = seen
        self._ends.move_to_end(seen[-1])
        if len(self._ends) > self.sizes.most_ends:
            self._forget_end(next(iter(self._ends)))

    def forget_end(self, block: int) -> None:
        """Stop keeping the end whose last KV block this is, if it is kept."""
        if block in self._ends:
            self._forget_end(block)

    def drop(self, block: int) -> None:
        """Take back the window block of a KV block whose content is gone; no sequence sees that block."""
        if not self.has(block):
            return
        assert not self._users[block]
        for end in (
            [end for end, seen in self._ends.items() if block in seen] if self._num_ends[block] else []
        ):
            self._forget_end(end)
        del self._idle[block]
        self._take_back(block)

    def _use(self, block: int) -> None:
        if not self.has(block):
            self.of_block[block] = self._take()
        self._idle.pop(block, None)
        self._users[block] += 1

    def _release(self, block: int) -> None:
        self._users[block] -= 1
        self._note_idle(block)

    def _forget_end(self, end: int) -> None:
        for block in self._ends.pop(end):
            self._num_ends[block] -= 1
            self._note_idle(block)

    def _note_idle(self, block: int) -> None:
        if not self._users[block] and not self._num_ends[block]:
            self._idle[block] = None

    def _take(self) -> int:
        while not self._free:
            if self._idle:
                block, _ = self._idle.popitem(last=False)
                self._take_back(block)
            else:
                self._forget_end(next(iter(self._ends)))
        return self._free.pop()

    def _take_back(self, block: int) -> None:
        self._free.append(int(self.of_block[block]))
        self.of_block[block] = NONE
