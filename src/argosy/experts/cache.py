"""Keep the experts that fit the budget in memory; read the others from disk.

    router  ->  expert cache  ->  kernel

One arena of equal slots serves all layers. `policy.CachePolicy` decides which expert leaves; `CachedSource` adds the
reads. Every miss of a layer is issued before the first expert is computed, as far as there are slots; a slot whose
expert has been computed is free for the next miss, so a layer may ask for more experts than there are slots.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from types import TracebackType

import numpy as np

from argosy import _native
from argosy.experts.policy import CachePolicy
from argosy.experts.source import ExpertFiles, ExpertGroup, Key, Lease, SourceStats


class CachedSource:
    """A fixed number of slots for all experts of all layers."""

    def __init__(
        self,
        store: _native.Store,
        files: ExpertFiles,
        *,
        num_slots: int,
        num_layers: int,
        experts_per_token: int,
    ) -> None:
        self.format = files.format
        self.stats = SourceStats()
        self.arena = _native.Arena(files.slot_bytes * num_slots)
        self.policy = CachePolicy(
            num_slots=num_slots, num_layers=num_layers, experts_per_token=experts_per_token
        )
        self._store = store
        self._files = files

    def lease(self, layer: int, expert_ids: Sequence[int], scan: Collection[int] = ()) -> Lease:
        return _CachedLease(self, layer, expert_ids, scan)

    def close(self) -> None:
        self.arena.close()


class _CachedLease:
    """Hits first, then misses as they land. Ends with no read in flight, also when it is cut short."""

    def __init__(
        self, source: CachedSource, layer: int, expert_ids: Sequence[int], scan: Collection[int]
    ) -> None:
        self._source = source
        self._scan = scan
        self._keys = [(layer, expert) for expert in expert_ids]
        self._hits: list[Key] = []
        self._missing: list[Key] = []  # the next to be read comes last
        self._held: list[Key] = []
        self._in_flight: dict[int, Key] = {}

    def __enter__(self) -> _CachedLease:
        try:
            self._find()
            self._issue()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _find(self) -> None:
        policy, stats, scan = self._source.policy, self._source.stats, self._scan
        for key in self._keys:  # before any miss may evict one of them
            if policy.slot(key) is None:
                self._missing.append(key)
            else:
                self._hits.append(key)
                self._held.append(key)
                policy.use(key, is_scan=key[1] in scan)
        # What decode waits for is read first; within that, in the order of the file.
        self._missing.sort(key=lambda key: (key[1] in scan, key), reverse=True)
        stats.lookups += len(self._keys)
        stats.hits += len(self._hits)

    def _end(self) -> None:
        """Give back what is held, and wait until no read moves bytes."""
        self._give_back()
        for ticket, key in self._in_flight.items():
            self._source._store.cancel(ticket)
            self._source.policy.drop(key)
        self._in_flight.clear()

    def __iter__(self) -> Iterator[ExpertGroup]:
        source = self._source
        if self._hits:
            yield self._group(self._hits)
        while self._in_flight or self._missing:
            self._give_back()
            self._issue()
            landed: list[Key] = []
            failed: Exception | None = None
            for ticket, message, kind in source._store.wait_any(list(self._in_flight)):
                key = self._in_flight.pop(ticket)
                if message is not None:
                    source.policy.drop(key)
                    failed = source._files.failure(key, message, kind)
                    continue
                source.stats.bytes_read += source._files.expert_bytes(key)
                landed.append(key)
            self._held = landed
            if failed is not None:
                raise failed
            yield self._group(landed)

    def _issue(self) -> None:
        """Start as many of the missing reads as there are slots for."""
        source = self._source
        while self._missing:
            key = self._missing[-1]
            slot = source.policy.admit(key, is_scan=key[1] in self._scan)
            if slot is None:
                break
            self._missing.pop()
            try:
                self._in_flight[source._files.fetch(source.arena, slot, key)] = key
            except BaseException:
                source.policy.drop(key)
                raise

    def _give_back(self) -> None:
        for key in self._held:
            self._source.policy.unpin(key)
        self._held = []

    def _group(self, keys: list[Key]) -> ExpertGroup:
        source = self._source
        offsets = np.empty((len(keys), 3), np.int64)
        for row, key in enumerate(keys):
            slot = source.policy.slot(key)
            assert slot is not None  # pinned since it was found or admitted
            offsets[row] = source._files.offsets(slot, key)
        return ExpertGroup([expert for _, expert in keys], offsets)
