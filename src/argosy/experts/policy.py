"""Which expert leaves the cache: plain bookkeeping that can be replayed on a recorded trace.

The least recently used of all layers leaves, except that a layer keeps its last `floor` experts (an equal share of the
slots, at most `experts_per_token`): with fewer slots than one token touches, a plain global LRU evicts each expert just
before it is needed again. Prompt tokens sweep through nearly every expert once per chunk. What they alone ask for takes
free slots, and then only the slots of a small window, newest first: a sweep comes round again in the same order, so
what was swept last is needed last. What decode uses stays; what was only swept in leaves first.

Elsewhere: the reads are `cache.py`; `benchmarks/replay.py` measures policies on recorded routing.
"""

from __future__ import annotations

from collections import OrderedDict

from argosy.experts.source import Key


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
