"""Reuse the computed prefix of a prompt: KV blocks, recurrent state, files.

    tokens of full blocks  ->  chain of keyed hashes  ->  blocks in memory, then in files; compute the rest

A full KV block is identified by a keyed BLAKE3 of the tenant's secret, the model and all tokens up to its end, with the
digests of media among them (`kept/chain.py`). A hit compares every token, so no hash is trusted alone. Keys and values
depend only on the tokens before them, not on how they were divided into chunks, so an answer has the same bits with
and without a reused prefix. Tenants never share prefixes.

Where layers have a recurrent state, a prefix is usable only up to a snapshot. Snapshots are taken after the last full
block of a longer prompt, at points where prompts diverged, every SNAPSHOT_TOKENS of an answer, and after the last full
block of a prompt that stops halfway.

Where layers have a sliding window, a prefix is usable if the window blocks that its next token sees remain
(`kept/kv_windows.py`). They are kept with every snapshot; without recurrent state, at the places in prompts where
snapshots would be taken, and at the ends of answers. Where the last layers run only for the ends of prompts, they are
complete at the same places (`kept/tails.py`).

Elsewhere: `kept/kv_cache.py` tracks which sequences hold which block; `kept/recurrent_state.py` assigns snapshot
slots; `kept/prefix_files.py` reads and writes files; `scheduler.py` chooses the running sequences.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Protocol

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.engine.sequence import Sequence
from argosy.kept.chain import Chain
from argosy.kept.kv_cache import BlockContent, KvBlocks
from argosy.kept.prefix_files import Kind, PrefixFiles, tenant_key
from argosy.kept.recurrent_state import StateSlots
from argosy.kept.tails import PromptEnds, Tail
from argosy.media.settings import VIDEO_FILES

# A snapshot after the last full block forces the tokens after it into a separate step, so short prompts take none.
SNAPSHOT_PROMPT_TOKENS = 256
SNAPSHOT_TOKENS = 64  # answer tokens between two snapshots; only the last snapshot is kept
CLOSE_SECONDS = 10.0  # files not written by then are dropped, and their prompts recomputed


class BlockMemory(Protocol):
    """The bytes of KV blocks: `_native.KvCache`, or a test's replacement."""

    def copy_out(self, block: int, to: NDArray[np.uint8]) -> None: ...

    def copy_in(self, block: int, saved: NDArray[np.uint8]) -> None: ...

    def copy_block(self, from_block: int, to_block: int, is_windowed: bool = False) -> None: ...


@dataclass(frozen=True, slots=True)
class Prefix:
    """The known prefix of a sequence."""

    contents: list[BlockContent]  # all reusable blocks, and any known blocks after them
    blocks: list[int]  # blocks in memory to reuse
    num_matching: int  # matching blocks in memory; some are not reused if a snapshot is missing
    num_usable: int  # usable blocks in memory and in files
    num_blocks: int  # blocks of the sequence that may ever be reused

    @property
    def next_key(self) -> bytes | None:
        """The key of the first block that is not in memory; None if all are."""
        return self.contents[self.num_matching].key if self.num_matching < self.num_blocks else None


class PrefixCache:
    """Finds a sequence's prefix when it starts, and keeps its blocks for others.

    Args:
        blocks: the pool of KV blocks.
        kv: the bytes of the blocks.
        secret, identity: 32 bytes each: the hash key of contents, and the identity of the model.
        states: slots for the recurrent state; None if no layer has one.
        files: keeps prefixes across restarts; None: prefixes are not kept.
        is_on: if False, the cache finds nothing and keeps nothing.
        tail: the layers that only the ends of prompts need; without files. None: every layer runs for every token.
    """

    def __init__(
        self,
        blocks: KvBlocks,
        kv: BlockMemory,
        *,
        secret: bytes,
        identity: bytes,
        states: StateSlots | None = None,
        files: PrefixFiles | None = None,
        is_on: bool = True,
        tail: Tail | None = None,
    ) -> None:
        self.blocks = blocks
        self.windows = blocks.windows
        self._kv = kv
        self._secret = secret
        self._identity = identity
        self.states = states
        self._files = files
        self.tail = tail
        self._is_on = is_on and (states is None or states.most_snapshots > 0)
        self._to_write: deque[tuple[Kind, BlockContent]] = deque()

    def chain(self, tenant: str) -> Chain:
        key = tenant_key(self._secret, tenant)
        return Chain(tenant, key, blake3(self._identity, key=key).digest(), self.blocks.block_tokens)

    # ── starting a sequence ─────────────────────────────────────────────────────────────────────────────────────

    def find(self, sequence: Sequence) -> Prefix:
        """Find the longest usable prefix; at least the last token remains to be computed."""
        limit = sequence.reuse_limit // self.blocks.block_tokens if self._is_on else 0
        contents = sequence.chain.contents(sequence, limit)
        blocks: list[int] = []
        for content in contents[:limit]:
            if (block := self.blocks.find(content)) is None:
                break
            blocks.append(block)
        usable = num_matching = len(blocks)
        if (files := self._files) is not None:
            while usable < min(limit, sequence.load_until) and files.has("kv", contents[usable]):
                usable += 1
        usable = self._num_usable(sequence, blocks, usable)
        return Prefix(contents, blocks[:usable], num_matching, usable, limit)

    def begin(self, sequence: Sequence, prefix: Prefix) -> None:
        """Start a sequence at the end of `prefix`; it holds the prefix's blocks and its own blocks after them.

        If blocks must come from files, `load` reads them, and the sequence cannot run until then.
        """
        size = self.blocks.block_tokens
        sequence.loading = None
        sequence.num_computed = 0
        num_found = len(prefix.blocks)
        if self.states is None:
            sequence.num_computed = num_found * size
            if prefix.num_usable > num_found:
                sequence.loading = range(num_found, prefix.num_usable)
        elif prefix.num_usable:
            key = prefix.contents[prefix.num_usable - 1].key
            if prefix.num_usable == num_found and self.states.has_snapshot(key):
                assert sequence.state_slot is not None
                self.states.restore(key, sequence.state_slot)
                sequence.num_computed = num_found * size
            else:
                sequence.loading = range(num_found, prefix.num_usable)
        if self.windows is not None:
            self.windows.begin(sequence, sequence.num_computed)
            self.windows.keep_end(prefix.blocks)
        if self._is_on and self.states is not None:
            sequence.snapshots_at = self._snapshots_at(sequence, prefix)
        elif self._is_on and self.windows is not None:
            sequence.ends_at = self._snapshots_at(sequence, prefix)
        if self.tail is not None and _leaves_out(sequence):
            sequence.tail_ends = PromptEnds(
                self.tail,
                self._snapshots_at(sequence, prefix) if self._is_on else (),
                sequence.reuse_limit,
                start=sequence.num_computed,
                is_complete=self.tail.is_complete(self._completeness(prefix.blocks)),
            )
        if sequence.cached_tokens is None and sequence.loading is None:
            sequence.cached_tokens = sequence.num_computed

    def load(self, sequence: Sequence, max_blocks: int) -> bool:
        """Load some of the blocks in `sequence.loading` from files.

        Returns:
            False if a file that the recurrent state needs cannot be read, so the sequence must start again. It then
            finds a shorter prefix, because it requests no file from there on.
        """
        files, wanted = self._files, sequence.loading
        assert files is not None
        assert wanted is not None
        contents = sequence.chain.contents(sequence, wanted.stop)
        now = wanted[:max_blocks]
        with closing(files.read("kv", contents[now.start : now.stop])) as payloads:
            for index, payload in zip(now, payloads, strict=True):
                if payload is None:
                    sequence.load_until = index
                    if self.states is not None:
                        return False
                    wanted = now = range(index, index)  # the other blocks are computed
                    break
                self._kv.copy_in(sequence.blocks[index], payload)
                self.blocks.keep(sequence.blocks[index], contents[index])
        if self.states is None:
            sequence.num_computed = now.stop * self.blocks.block_tokens
        if now.stop < wanted.stop:
            sequence.loading = range(now.stop, wanted.stop)
            return True
        sequence.loading = None
        if self.states is not None:
            position = wanted.stop * self.blocks.block_tokens
            if not self._load_state(sequence, contents[wanted.stop - 1], position):
                sequence.load_until = wanted.stop - 1
                return False
            sequence.num_computed = position
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
        return True

    def copy_beginning(self, source: Sequence, sequence: Sequence) -> None:
        """Move a sequence to another's position; it shares the full blocks and gets its own block after them."""
        num_full, num_more = divmod(source.num_computed, self.blocks.block_tokens)
        if num_more:
            self._kv.copy_block(source.blocks[num_full], sequence.blocks[num_full])
        if (windows := self.windows) is not None:
            windows.begin(sequence, source.num_computed)
            if num_more:
                from_block, to_block = (
                    int(windows.of_block[one.blocks[num_full]]) for one in (source, sequence)
                )
                self._kv.copy_block(from_block, to_block, is_windowed=True)
        if self.states is not None:
            assert source.state_slot is not None
            assert sequence.state_slot is not None
            self.states.state.copy_slot(source.state_slot, sequence.state_slot)
        sequence.num_computed = sequence.cached_tokens = source.num_computed

    # ── keeping blocks ──────────────────────────────────────────────────────────────────────────────────────────

    def grown(self, sequence: Sequence, before: int) -> None:
        """Keep the blocks that became full since `before` tokens, and a snapshot if one is wanted here."""
        if not self._is_on:
            return
        size, at = self.blocks.block_tokens, sequence.num_computed
        num_full = at // size
        contents = sequence.chain.contents(sequence, num_full)
        ends = sequence.tail_ends
        for index in range(before // size, num_full):
            complete_from = 0 if ends is None else ends.complete_from(index)
            self.blocks.keep(sequence.blocks[index], contents[index], complete_from)
        if self.windows is not None:
            for end in [end for end in sequence.ends_at if before < end <= at]:
                self.windows.keep_end(sequence.blocks[: end // size])
        if self.states is not None and at % size == 0:
            if at in sequence.snapshots_at:
                self._snapshot(sequence)
            elif not sequence.is_prefilling and at % SNAPSHOT_TOKENS == 0:
                if last := sequence.last_snapshot // size:
                    self.states.forget(contents[last - 1].key)
                    if self.windows is not None:
                        self.windows.forget_end(sequence.blocks[last - 1])
                self._snapshot(sequence)
                sequence.last_snapshot = at
        if self._files is not None and before < len(sequence.prompt_ids) <= at:
            self._write_prompt(sequence, contents)

    def stopped(self, sequence: Sequence) -> None:
        """Release the window blocks that a sequence sees, before it gives back its KV blocks.

        The state of a prompt that stopped halfway is kept: clients often drop a slow request and send it again.
        """
        if self.states is not None and self._is_on and sequence.is_prefilling:
            num_full, more = divmod(sequence.num_computed, self.blocks.block_tokens)
            slot = sequence.state_slot
            # After a step that was not committed, the state is ahead; after a step that failed, it is invalid.
            if (
                num_full
                and not more
                and slot is not None
                and self.states.state.position(slot) == sequence.num_computed
            ):
                self._snapshot(sequence)
        if self.windows is None:
            return
        if self._is_on and self.states is None:
            self.windows.keep_end(sequence.blocks[: sequence.num_computed // self.blocks.block_tokens])
        self.windows.end(sequence)

    def tokens_to_snapshot(self, sequence: Sequence) -> int:
        """Return how many tokens a step may add without passing a place where a snapshot is taken."""
        if self.states is None or not self._is_on:
            return sys.maxsize
        return -sequence.num_tokens % SNAPSHOT_TOKENS

    def want_snapshot(self, sequence: Sequence, contents: list[BlockContent]) -> None:
        """Plan a snapshot where the prompt of `sequence`, now being computed, diverges from another's prefix."""
        if (self.states is None and self.windows is None and self.tail is None) or not self._is_on:
            return
        own = sequence.chain.contents(sequence, 0)
        shared = 0
        for mine, other in zip(own, contents, strict=False):
            if mine.key != other.key:
                break
            shared += 1
        end = shared * self.blocks.block_tokens
        (sequence.snapshots_at if self.states is not None else sequence.ends_at).add(end)
        if sequence.tail_ends is not None:
            sequence.tail_ends.add(end, sequence.num_computed)

    @property
    def file_bytes(self) -> int:
        """Size of the files."""
        return 0 if self._files is None else self._files.num_bytes

    def forget_others(self, tenants: Collection[str]) -> None:
        """Forget everything that earlier processes kept in files for tenants not listed."""
        if self._files is not None:
            self._files.forget_others(tenants)

    def forget(self, tenant: str) -> None:
        """Forget everything kept for a tenant, in memory and in files."""
        self._to_write = deque(item for item in self._to_write if item[1].tenant != tenant)
        self.blocks.forget(tenant)
        if self._files is not None:
            self._files.forget(tenant)

    @property
    def is_writing(self) -> bool:
        return bool(self._to_write)

    def write_some(self) -> bool:
        """Hand files to the writer thread while it is free. Return False if there is more to write."""
        while self._to_write:
            if not self._offer(*self._to_write[0]):
                return False
            self._to_write.popleft()
        return True

    def close(self) -> None:
        """Write the remaining files, for at most CLOSE_SECONDS, and close them."""
        if self._files is not None:
            until = monotonic() + CLOSE_SECONDS
            while not self.write_some() and monotonic() < until:
                sleep(0.001)
            self._to_write.clear()
            self._files.close()

    # ── helpers ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _num_usable(self, sequence: Sequence, blocks: list[int], usable: int) -> int:
        """Return the most of a sequence's first `usable` blocks after which windows, state and tail are known."""
        before, num_matching = -1, len(blocks)
        while usable and usable != before:
            before = usable
            if self.windows is not None:  # if not, there are no files
                usable = self.windows.num_usable(blocks[:usable])
            while usable and self.states is not None and not self._has_state(sequence, usable - 1):
                usable -= 1
            if self.tail is not None:
                usable = self._tail_usable(sequence, blocks[:usable], num_matching)
        return usable

    def _has_state(self, sequence: Sequence, block: int) -> bool:
        """Whether the recurrent state after a block of a sequence is known."""
        assert self.states is not None
        content = sequence.chain.contents(sequence, 0)[block]
        if self.states.has_snapshot(content.key):
            return True
        if self._files is None or block >= sequence.load_until:
            return False
        return self._files.has("state", content)

    def _tail_usable(self, sequence: Sequence, blocks: list[int], num_matching: int) -> int:
        """Return the most of these blocks after which the last layers can continue."""
        assert self.tail is not None
        last = sequence.reuse_limit if _leaves_out(sequence) else 0
        found = self._completeness(blocks)
        usable = self.tail.num_usable(found, last)
        if usable < num_matching:  # start early enough to complete the tail where prompts diverge
            usable = self.tail.num_usable(found[:usable], min(last, num_matching * self.blocks.block_tokens))
        return usable

    def _completeness(self, blocks: list[int]) -> list[int]:
        return [self.blocks.complete_from(block) for block in blocks]

    def _snapshots_at(self, sequence: Sequence, prefix: Prefix) -> set[int]:
        size = self.blocks.block_tokens
        wanted = {prefix.num_matching * size}  # more blocks matched than could be used: prompts diverge here
        if sequence.prefill_until >= SNAPSHOT_PROMPT_TOKENS:
            wanted.add((sequence.prefill_until - 1) // size * size)
        return {at for at in wanted if at > prefix.num_usable * size}

    def _snapshot(self, sequence: Sequence) -> None:
        """Keep the state after a sequence's last full block, where it stands, and the window blocks seen from there."""
        assert self.states is not None
        assert sequence.state_slot is not None
        num_full = sequence.num_computed // self.blocks.block_tokens
        key = sequence.chain.contents(sequence, num_full)[num_full - 1].key
        self.states.snapshot(sequence.state_slot, key)
        if self.windows is not None:
            self.windows.keep_end(sequence.blocks[:num_full])

    def _load_state(self, sequence: Sequence, content: BlockContent, position: int) -> bool:
        states, files = self.states, self._files
        assert states is not None
        assert files is not None
        assert sequence.state_slot is not None
        if not states.has_snapshot(content.key):
            (payload,) = files.read("state", [content])
            if payload is None:
                return False
            states.state.copy_in(states.place(content.key), payload.view(np.float32), position)
        states.restore(content.key, sequence.state_slot)
        return True

    def _write_prompt(self, sequence: Sequence, contents: list[BlockContent]) -> None:
        assert self._files is not None
        num_full = len(sequence.prompt_ids) // self.blocks.block_tokens
        if num_full * self._files.file_bytes("kv") > self._files.max_bytes // 2:
            return  # its later blocks would evict its first ones
        for content in contents[:num_full]:
            self._to_write.append(("kv", content))
            if self.states is not None and self.states.has_snapshot(content.key):
                self._to_write.append(("state", content))

    def _offer(self, kind: Kind, content: BlockContent) -> bool:
        """Hand one file to the writer thread. Also return True if the content has left memory meanwhile."""
        files, states = self._files, self.states
        assert files is not None
        if kind == "state":
            assert states is not None
            if not states.has_snapshot(content.key):
                return True
            slot = states.slot_of(content.key)
            return files.offer(kind, content, lambda to: states.state.copy_out(slot, to.view(np.float32)))
        block = self.blocks.find(content)
        if block is None:
            return True
        return files.offer(kind, content, lambda to: self._kv.copy_out(block, to))


def _leaves_out(sequence: Sequence) -> bool:
    """Whether layers may leave out tokens of a prompt: not where positions see later ones, whose end may differ."""
    return sequence.spans is None or not sequence.spans.has_both_ways


def identify(files: ModelFiles, instruction_set: str, *others: object) -> bytes:
    """Return 32 bytes that identify a model, its arithmetic, and everything else that its keys and values depend on.

    `instruction_set` is that of the engine's runtime: the order of sums differs between instruction sets.

    A file, our kernels included, is identified by its name, size and modification time: hashing a terabyte would take
    longer than reuse saves.
    """
    # Rows of media come from some of these, and settings say what the bytes of quantised weights mean.
    names = (*VIDEO_FILES, "config.json", "params.json", "hf_quant_config.json")
    paths = {str(path) for path in files.weight_paths}
    paths |= {str(path) for name in names if (path := files.path / name).is_file()}
    facts = [(Path(path).name, *_size_and_time(path)) for path in (*sorted(paths), _native.__file__)]
    return blake3(repr((files.config, facts, instruction_set, others)).encode()).digest()


def _size_and_time(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns
