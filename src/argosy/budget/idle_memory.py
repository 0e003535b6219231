"""Lend experts the memory for prompts and sequences that is idle at the moment.

    KV blocks that hold nothing, buffers of steps longer than those that run   ->  `expert_memory.py`

The plan reserves KV blocks for a whole context, and working buffers for a chunk of a prompt. While text is generated,
steps are short, and sequences seldom fill the context. Meanwhile the rest of this memory holds experts.

A step that needs the memory takes it back before it runs: experts leave, the system gets their pages, and only then is
a block or a buffer written. The memory is lent again once no step has had prompt tokens for a while, because evicted
experts must be read again, and returned pages must be cleared.

Elsewhere: `kept/kv_cache.py` hands out blocks, the lowest first; native code owns the memory of blocks and buffers.
"""

from __future__ import annotations

from collections.abc import Callable

from argosy import _native
from argosy.budget.expert_memory import ExpertMemory
from argosy.budget.memory_plan import KV_PARTS
from argosy.kept.kv_cache import KvBlocks
from argosy.model.decoder import Decoder

BUFFERS, KV = "working buffers", "KV cache"  # the sources
# Steps without prompt tokens before memory is lent again. More frequent prompts keep it.
_LENT_AFTER = 8


class IdleMemory:
    """Lends the idle memory of prompts and sequences, and takes it back. Call everything with the engine's lock.

    Args:
        experts: the borrower.
        buffer_bytes: returns the size of buffers for steps of a number of tokens; None: buffers are never lent.
        step_tokens, decode_tokens: the most tokens of a step, and of a step without prompt tokens.
    """

    def __init__(
        self,
        experts: ExpertMemory,
        kv: _native.KvCache,
        blocks: KvBlocks,
        decoder: Decoder,
        *,
        buffer_bytes: Callable[[int], int] | None,
        step_tokens: int,
        decode_tokens: int,
    ) -> None:
        self._experts, self._kv, self._blocks, self._decoder = experts, kv, blocks, decoder
        self._buffer_bytes = buffer_bytes
        self._step_tokens, self._decode_tokens = step_tokens, decode_tokens
        self._part = -(-blocks.num_blocks // KV_PARTS)
        # Blocks that may have been written, from the first on.
        self._num_written = self._in_parts(blocks.num_used)
        self._max_tokens = step_tokens  # the most tokens of a step with the current buffers
        self._num_steps = 0  # steps since the last one with prompt tokens
        blocks.before_use = self._have_blocks
        kv.release(self._num_written)
        experts.allow(KV, self.idle_kv_bytes())

    def before_step(self, num_tokens: int, *, has_prompts: bool) -> None:
        """Provide the buffers for a step; lend memory that has been idle for long enough."""
        self._num_steps = 0 if has_prompts else self._num_steps + 1
        if num_tokens > self._max_tokens:
            # As small as possible: short prompts leave the rest to experts.
            self._have_buffers(min(self._step_tokens, 1 << (num_tokens - 1).bit_length()))
        if self._num_steps == _LENT_AFTER:
            self._have_buffers(self._decode_tokens)
            self._keep_blocks(self._blocks.num_used)

    def close(self) -> None:
        """Release the memory, so that it is free when the model is closed."""
        self._blocks.before_use = lambda num_blocks: None
        del self._kv, self._blocks, self._decoder

    def forget_blocks(self) -> None:
        """Return the memory of KV blocks that no longer exist."""
        self._num_written = min(self._num_written, self._blocks.num_blocks)
        self._kv.release(self._num_written)

    def idle_kv_bytes(self) -> int:
        """Return the part of the KV blocks' memory that experts may use."""
        num_blocks = self._blocks.num_blocks
        return self._kv.held_bytes(num_blocks) - self._kv.held_bytes(self._num_written)

    def _have_blocks(self, num_blocks: int) -> None:
        if num_blocks > self._num_written:
            self._num_written = self._in_parts(num_blocks)
            self._experts.allow(KV, self.idle_kv_bytes())

    def _in_parts(self, num_blocks: int) -> int:
        return min(self._blocks.num_blocks, -(-num_blocks // self._part) * self._part)

    def _keep_blocks(self, num_blocks: int) -> None:
        num_blocks = self._in_parts(num_blocks)
        if num_blocks < self._num_written:
            self._num_written = num_blocks
            self._kv.release(num_blocks)
            self._experts.allow(KV, self.idle_kv_bytes())

    def _have_buffers(self, max_tokens: int) -> None:
        if self._buffer_bytes is None or max_tokens == self._max_tokens:
            return
        idle = self._buffer_bytes(self._step_tokens) - self._buffer_bytes(max_tokens)
        is_more = max_tokens > self._max_tokens
        if is_more:
            self._experts.allow(BUFFERS, idle)
        self._decoder.resize(max_tokens)
        self._max_tokens = max_tokens
        if not is_more:
            self._experts.allow(BUFFERS, idle)
