"""Keep the experts that fit the budget in memory; read the others from disk.

    router  ->  expert cache  ->  kernel

One arena of equal slots serves all layers. `CachePolicy` decides which expert leaves, and is plain bookkeeping that
can be replayed on a recorded trace; `CachedSource` adds the reads. Every miss of a layer is issued before the first
expert is computed, as far as there are slots; a slot whose expert has been computed is free for the next miss, so a
layer may ask for more experts than there are slots.

Which expert leaves: the least recently used of all layers, except that a layer keeps its last `floor` experts (an
equal share of the slots, at most `experts_per_token`): with fewer slots than one token touches, a plain global LRU
evicts each expert just before it is needed again. Prompt tokens sweep through nearly every expert once per chunk. What
they alone ask for takes free slots, and then only the slots of a small window, newest first: a sweep comes round again
in the same order, so what was swept last is needed last. What decode uses stays; what was only swept in leaves first.

Elsewhere: `benchmarks/replay.py` measures policies on recorded routing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from types import TracebackType

import numpy as np

from argosy import _native
from argosy.experts.source import ExpertFiles, ExpertGroup, Key, Lease, SourceStats


class CachePolicy:
    """Which expert is in which slot, and which one leaves next. Knows nothing of bytes."""

    def __init__(self, *, num_slots: int, num_layers: int, experts_per_token: int) -> None:
        self.num_slots = num_slots
        self.floor = min(experts_per_token, num_slots // max(1, num_layers))
        # A quarter of the cache at most is given to a sweep, and never less than one token asks for.
        self.window_slots = max(experts_per_token, num_slots // 4)
        self._free = list(range(num_slots - 1, -1, -1))
        self._clock = 0
        # Per layer, least recently used first: expert -> (slot, when it was last used).
        self._layers: list[OrderedDict[int, tuple[int, int]]] = [OrderedDict() for _ in range(num_layers)]
        self._window: OrderedDict[Key, int] = OrderedDict()  # swept-in experts, oldest first
        self._pinned: set[Key] = set()

    def slot(self, key: Key) -> int | None:
        """The slot of a resident expert, or None."""
        if (found := self._layers[key[0]].get(key[1])) is not None:
            return found[0]
        return self._window.get(key)

    def resident(self) -> set[Key]:
        lasting = {(layer, expert) for layer, kept in enumerate(self._layers) for expert in kept}
        return lasting | set(self._window)

    def use(self, key: Key, *, is_scan: bool) -> None:
        """Note a hit, and pin it. A sweep does not make an expert younger."""
        self._pinned.add(key)
        if is_scan:
            return
        self._clock += 1
        layer, expert = key
        slot = self._window.pop(key, None)
        if slot is None:
            slot, _ = self._layers[layer].pop(expert)
        self._layers[layer][expert] = (slot, self._clock)

    def admit(self, key: Key, *, is_scan: bool) -> int | None:
        """Find a slot for a missing expert, evicting another if need be, and pin it. None: wait for an unpin."""
        if self._free:
            slot: int | None = self._free.pop()
        elif is_scan:
            slot = self._slot_for_sweep(key[0])
        else:
            slot = self._from_window(newest=False)
            if slot is None:
                slot = self._evict_oldest(key[0])
        if slot is None:
            return None
        self._pinned.add(key)
        if is_scan:
            self._window[key] = slot
        else:
            self._clock += 1
            self._layers[key[0]][key[1]] = (slot, self._clock)
        return slot

    def unpin(self, key: Key) -> None:
        self._pinned.discard(key)

    def drop(self, key: Key) -> None:
        """Forget an expert whose bytes never arrived."""
        self._pinned.discard(key)
        slot = self._window.pop(key, None)
        if slot is None:
            slot, _ = self._layers[key[0]].pop(key[1])
        self._free.append(slot)

    def _slot_for_sweep(self, layer: int) -> int | None:
        """From the window; from others only while the window is small, and never more at once than the window has."""
        if len(self._pinned & self._window.keys()) >= self.window_slots:
            return None
        slot = self._evict_oldest(layer) if len(self._window) < self.window_slots else None
        return self._from_window(newest=True) if slot is None else slot

    def _from_window(self, *, newest: bool) -> int | None:
        keys = reversed(self._window) if newest else iter(self._window)
        key = next((key for key in keys if key not in self._pinned), None)
        return None if key is None else self._window.pop(key)

    def _evict_oldest(self, asking_layer: int) -> int | None:
        oldest: tuple[int, int, int] | None = None  # (when used, layer, expert)
        for layer, kept in enumerate(self._layers):
            if len(kept) <= self.floor and layer != asking_layer:
                continue
            for expert, (_, used) in kept.items():
                if (layer, expert) not in self._pinned:
                    if oldest is None or used < oldest[0]:
                        oldest = (used, layer, expert)
                    break
        if oldest is None and self.floor:
            oldest = next(
                (
                    (used, layer, expert)
                    for layer, kept in enumerate(self._layers)
                    for expert, (_, used) in kept.items()
                    if (layer, expert) not in self._pinned
                ),
                None,
            )
        if oldest is None:
            return None
        return self._layers[oldest[1]].pop(oldest[2])[0]


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
