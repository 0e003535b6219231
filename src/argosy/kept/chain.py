"""Name the full KV blocks of a sequence by everything that they were computed from.

Each block's key is a keyed hash of the previous key and of the block's own content: token ids, and digests of the
media at placeholders and of the adapter, from its first position on. So equal keys mean equal prefixes.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from blake3 import blake3

from argosy.kept.kv_cache import BlockContent


class HasContent(Protocol):
    """The part of a sequence that says what its positions contain."""

    def tokens_from(self, start: int, count: int) -> list[int]: ...

    def marks_from(self, start: int, count: int) -> bytes: ...


class Chain:
    """The contents of a sequence's full blocks, hashed on demand."""

    def __init__(self, tenant: str, key: bytes, beginning: bytes, block_tokens: int) -> None:
        self._tenant = tenant
        self._key = key
        self._block_tokens = block_tokens
        self._last = beginning
        self._contents: list[BlockContent] = []

    def contents(self, sequence: HasContent, count: int) -> list[BlockContent]:
        """Return the contents of at least the first `count` blocks; all of their tokens must be known."""
        known, size = len(self._contents), self._block_tokens
        if known < count:
            ids = np.array(sequence.tokens_from(known * size, (count - known) * size), np.int32)
            for number, own in enumerate(ids.reshape(-1, size), start=known):
                tokens = own.tobytes() + sequence.marks_from(number * size, size)
                key = blake3(self._last + tokens, key=self._key).digest()
                self._contents.append(BlockContent(key, self._last, tokens, self._tenant))
                self._last = key
        return self._contents
