"""Which KV blocks belong to which sequence. The keys and values themselves are native memory (`_native.KvCache`)."""

from __future__ import annotations


class KvBlocks:
    """A pool of blocks of `block_tokens` positions each."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def take(self, count: int) -> list[int]:
        """Hand out blocks; the caller has seen that there are enough."""
        assert count <= len(self._free)
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        self._free.extend(reversed(blocks))
        blocks.clear()
