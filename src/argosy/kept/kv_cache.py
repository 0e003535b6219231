"""Tracks the KV blocks of each sequence, and the contents of blocks that no sequence holds.

    taken -> held by one sequence -> its content is known -> given back -> kept, then reused or evicted

A block is free, held by one or more sequences, or kept: held by none, with a content that another sequence may reuse.
When free blocks run out, the cache evicts kept blocks: the least recently used block of the tenant with the most kept
blocks. So one tenant's flood of prompts does not evict the blocks of others. The cache hands out the lowest free block
first, so that the memory of the highest blocks can hold something else (`budget/idle_memory.py`).

Elsewhere: `engine/prefix.py` looks contents up; keys and values are native memory (`_native.KvCache`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from argosy.kept.kv_windows import KvWindows


class BlockContent(NamedTuple):
    """The content of a full block: its own tokens, after those of all blocks before it."""

    key: bytes  # hash of the tenant's secret, the model and all tokens so far
    parent: bytes  # the key of the previous block, or of the start
    tokens: bytes  # int32, the ids of this block; then digests of the media at their positions
    tenant: str


class KvBlocks:
    """A pool of blocks of `block_tokens` positions each.

    Attributes:
        before_use: called with the number of blocks, counted from the first, that may be written from now on; it
            returns when these blocks have memory.

    Args:
        forgotten: called with the key of each content that has left its last block.
        windows: the window blocks of layers with a sliding window; None: these layers use the KV blocks.
    """

    def __init__(
        self,
        num_blocks: int,
        block_tokens: int,
        forgotten: Callable[[bytes], None] = lambda key: None,
        *,
        windows: KvWindows | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.windows = windows
        self.block_tokens = block_tokens
        # Counts how often blocks became free. A sequence that did not fit need not try again until this changes.
        self.num_releases = 0
        self._forgotten = forgotten
        self.before_use: Callable[[int], None] = lambda num_blocks: None
        self._most_blocks = num_blocks
        self.reset()

    def reset(self) -> None:
        """Free every block and forget its content, whatever state an interrupted call left."""
        self._free = list(range(self.num_blocks))  # a heap
        self._holders = [0] * self._most_blocks
        self._contents: list[BlockContent | None] = [None] * self._most_blocks
        self._complete_from = [0] * self._most_blocks
        self._places: dict[bytes, int] = {}
        self._kept: dict[str, OrderedDict[int, None]] = {}  # by tenant, least recently used first
        self._num_kept = 0
        self.num_releases += 1
        if self.windows is not None:
            self.windows.reset()

    @property
    def num_available(self) -> int:
        """The number of blocks that `take` can hand out: free and kept ones."""
        return len(self._free) + self._num_kept

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_kept(self) -> int:
        return self._num_kept

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def take(self, count: int) -> list[int]:
        """Hand out blocks with no content. The caller has checked that there are enough."""
        assert count <= self.num_available
        while len(self._free) < count:
            self._set_free(self._evict())
        blocks = [heappop(self._free) for _ in range(count)]
        if blocks:
            self.before_use(1 + blocks[-1])
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def resize(self, num_blocks: int) -> None:
        """Change the number of blocks, at most to the first number. No sequence may hold a removed block."""
        assert not any(self._holders[num_blocks:])
        for block in range(num_blocks, self.num_blocks):
            if (content := self._contents[block]) is not None:
                self._remove_kept(content.tenant, block)
                self._drop_content(block)
                self._set_free(block)
        self._free = [block for block in self._free if block < num_blocks]
        self._free += range(self.num_blocks, num_blocks)
        heapify(self._free)
        self.num_blocks = num_blocks
        self.num_releases += 1

    @property
    def num_used(self) -> int:
        """The number of blocks up to the last one that is held or kept."""
        return next((at + 1 for at in reversed(range(self.num_blocks)) if self._is_used(at)), 0)

    def _is_used(self, block: int) -> bool:
        return self._holders[block] > 0 or self._contents[block] is not None

    def hold(self, blocks: Iterable[int]) -> None:
        """Let one more sequence use blocks that were found. The sequence reads them and never writes them."""
        for block in blocks:
            if self._holders[block] == 0:
                content = self._contents[block]
                assert content is not None  # otherwise it could not have been found
                self._remove_kept(content.tenant, block)
            self._holders[block] += 1

    def give_back(self, blocks: list[int]) -> None:
        """Release a sequence's blocks, given in order; the list is empty afterwards."""
        for block in reversed(blocks):  # more sequences can reuse the start than the end
            self._holders[block] -= 1
            if self._holders[block] > 0:
                continue
            content = self._contents[block]
            if content is None:
                self._set_free(block)
            else:
                self._kept.setdefault(content.tenant, OrderedDict())[block] = None
                self._num_kept += 1
        self.num_releases += 1
        blocks.clear()

    def keep(self, block: int, content: BlockContent, complete_from: int = 0) -> None:
        """Record the content of a held block; the block is never written again.

        Of two equal blocks `find` returns the first, unless the first has lost its window block or is less complete.

        Args:
            complete_from: see `PromptEnds`; lower is more complete.
        """
        assert self._holders[block] > 0
        if self._contents[block] is not None:
            return
        known = self._places.get(content.key)
        if known is not None:
            has_window = self.windows is None or self.windows.has(known)
            if has_window and self._complete_from[known] <= complete_from:
                return
            self._contents[known] = None
            if not self._holders[known]:
                self._remove_kept(content.tenant, known)
                self._set_free(known)
        self._contents[block] = content
        self._complete_from[block] = complete_from
        self._places[content.key] = block

    def find(self, content: BlockContent) -> int | None:
        """Return the block with this content, after comparing every token. Hold it before taking any block."""
        block = self._places.get(content.key)
        return block if block is not None and self._contents[block] == content else None

    def complete_from(self, block: int) -> int:
        """Return the `complete_from` of a block that was found."""
        return self._complete_from[block]

    def forget(self, tenant: str) -> None:
        """Make a tenant's contents impossible to find."""
        for block, content in enumerate(self._contents):
            if content is not None and content.tenant == tenant:
                self._drop_content(block)
                if self._holders[block] == 0:
                    self._remove_kept(tenant, block)
                    self._set_free(block)
        self.num_releases += 1

    def _set_free(self, block: int) -> None:
        heappush(self._free, block)
        if self.windows is not None:
            self.windows.drop(block)

    def _evict(self) -> int:
        tenant = max(self._kept, key=lambda name: len(self._kept[name]))
        block = next(iter(self._kept[tenant]))
        content = self._contents[block]
        assert content is not None
        self._remove_kept(content.tenant, block)
        self._drop_content(block)
        return block

    def _remove_kept(self, tenant: str, block: int) -> None:
        kept = self._kept[tenant]
        del kept[block]
        if not kept:
            del self._kept[tenant]
        self._num_kept -= 1

    def _drop_content(self, block: int) -> None:
        content = self._contents[block]
        assert content is not None
        self._contents[block] = None
        del self._places[content.key]
        self._forgotten(content.key)
