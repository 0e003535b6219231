"""Keep the experts that fit the budget in memory; read the others from disk.

    router  ->  expert cache  ->  kernel

One arena of equal slots serves all layers. `policy.CachePolicy` decides which expert leaves; `CachedSource` adds the
reads. Every miss of a layer is issued before the first expert is computed, as far as there are slots; a slot whose
expert has been computed is free for the next miss, so a layer may ask for more experts than there are slots.

`guess` says what the next layer will probably ask for, and `look_ahead.LookAhead` what of that is worth a read. Once
the open lease has issued all of its own reads, those of the guess begin, in slots of its window; the next lease
takes them over wherever they are. So the drive does not wait for arithmetic between two layers.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from types import TracebackType

from argosy import _native
from argosy.config import Format
from argosy.errors import ArgosyError
from argosy.experts.look_ahead import LookAhead
from argosy.experts.policy import CachePolicy
from argosy.experts.source import ExpertFiles, ExpertGroup, Key, Lease, SourceStats

# Experts that are computed together: the slots of a group are free for other reads when it is done, and a prompt that
# found half a layer read ahead would else keep the drive waiting for them. More than one token asks for, usually.
_MOST_IN_GROUP = 8


class CachedSource:
    """A fixed number of slots for all experts of all layers."""

    resident_offsets = None

    def __init__(
        self,
        store: _native.Store,
        files: ExpertFiles,
        *,
        num_slots: int,
        num_layers: int,
        experts_per_token: int,
        look_ahead: bool = True,
    ) -> None:
        self.stats = SourceStats()
        self.arena = _native.Arena(files.slot_bytes * num_slots)
        # Else the reads of the first prompt pay for it: a second and more on a virtual machine.
        threading.Thread(target=self.arena.populate, name="argosy-populate", daemon=True).start()
        self.policy = CachePolicy(
            num_slots=num_slots, num_layers=num_layers, experts_per_token=experts_per_token
        )
        self._store = store
        self._files = files
        self._open: _CachedLease | None = None
        self._look_ahead = (LookAhead(experts_per_token), LookAhead(experts_per_token))  # decode, sweeps
        # With fewer slots a guess would take what a token itself needs.
        self._may_guess = look_ahead and num_slots >= 4 * experts_per_token
        self._hint: list[Key] = []  # not yet asked for; the next comes last
        self._is_sweep = False  # the hint's
        self._kept: set[Key] = set()  # of the hint, in memory, pinned until the next lease
        self._early: dict[Key, int] = {}  # reads that no lease waits for: expert -> ticket

    @property
    def num_resident(self) -> int:
        return self.policy.num_resident

    def formats(self, layer: int) -> tuple[Format, Format, Format]:
        return self._files.formats(layer)

    def lease(self, layer: int, expert_ids: Sequence[int], scan: Collection[int] = ()) -> Lease:
        return _CachedLease(self, layer, expert_ids, scan)

    def wants_guess(self, *, is_sweep: bool) -> bool:
        return (is_sweep or self._may_guess) and self._look_ahead[is_sweep].wants_guess

    def guess(self, layer: int, by_rank: Sequence[Sequence[int]], *, is_sweep: bool) -> None:
        self._forget_hint()
        look_ahead, slot, early = self._look_ahead[is_sweep], self.policy.slot, self._early
        missing = {
            expert: rank
            for rank, experts in enumerate(by_rank)
            for expert in experts
            if slot((layer, expert)) is None or (layer, expert) in early
        }
        look_ahead.remember(layer, missing)
        if self._open is not None and self._open.layer == layer:
            return  # its slots are in use already
        self._hint = [(layer, expert) for expert in reversed(look_ahead.trusted(by_rank))]
        if is_sweep:
            self._hint.sort(reverse=True)  # in the order of the file
        self._is_sweep = is_sweep
        self._read_ahead()

    def count_resident(self, lookups: int) -> None:
        raise AssertionError("a cache has no expert for good")

    def close(self) -> None:
        for ticket in self._early.values():
            self._store.cancel(ticket)
        self.arena.close()

    def _fetch(self, keys: Sequence[Key], *, urgency: _native.Urgency = "now") -> dict[Key, int]:
        """Start reads into the slots of experts that were just admitted; their tickets."""
        try:
            places = [(key, self._place(key)) for key in keys]
            return dict(zip(keys, self._files.fetch(self.arena, places, urgency=urgency), strict=True))
        except BaseException:
            for key in keys:
                self.policy.drop(key)
            raise

    def _place(self, key: Key) -> int:
        slot = self.policy.slot(key)
        assert slot is not None  # pinned since it was found or admitted
        return slot * self._files.slot_bytes

    # ── the hint ────────────────────────────────────────────────────────────────────────────────────────────

    def _read_ahead(self) -> None:
        """Start reads of the hint, unless the open lease still needs slots itself."""
        if not self._hint or (self._open is not None and self._open.is_short_of_slots):
            return
        policy, admitted = self.policy, []
        while self._hint:
            key = self._hint[-1]
            if key in self._early:
                pass
            elif policy.slot(key) is not None:
                policy.use(key, is_scan=True)  # the reads of its neighbours must not displace it
                self._kept.add(key)
            elif policy.admit(key, is_scan=True, is_guess=not self._is_sweep) is not None:
                admitted.append(key)
            else:
                break
            self._hint.pop()
        if admitted:
            self._early |= self._fetch(admitted, urgency="soon" if self._is_sweep else "maybe")

    def _take_over(self, key: Key) -> int | None:
        """Hand the early read of an expert to a lease."""
        self._kept.discard(key)
        return self._early.pop(key, None)

    def _forget_hint(self) -> None:
        """Give up what the last hint still holds, as far as no reader has begun it. Never waits.

        What a reader has begun stays in `_early` until it ends: whole, or given up half-way.
        """
        self._hint.clear()
        for key in self._kept:
            self.policy.unpin(key)
        self._kept.clear()
        if not self._early:
            return
        dropped = set(self._store.drop(list(self._early.values())))
        for key in [key for key, ticket in self._early.items() if ticket in dropped]:
            del self._early[key]
            self.policy.drop(key)
        if self._early:
            self._collect_early(block=False)

    def _collect_early(self, *, block: bool) -> None:
        """Free the slots of early reads that have ended. Experts that came anyway stay until something leaves."""
        keys = {ticket: key for key, ticket in self._early.items()}
        for ticket, message, _ in self._store.wait_any(list(keys), block):
            key = keys[ticket]
            del self._early[key]
            if message is not None:
                # It was given up half-way; or who needs it will read it again, and hear of the error.
                self.policy.drop(key)
                continue
            self.policy.unpin(key)
            self.stats.bytes_read += self._files.expert_bytes(key)
            self.stats.idle_reads += 1


class _CachedLease:
    """Hits first, then misses as they land. Ends with none of its reads in flight, also when it is cut short."""

    def __init__(
        self, source: CachedSource, layer: int, expert_ids: Sequence[int], scan: Collection[int]
    ) -> None:
        self.layer = layer
        self._source = source
        self._scan = scan
        self._keys = [(layer, expert) for expert in expert_ids]
        self._hits: list[Key] = []
        self._missing: list[Key] = []  # the next to be read comes last
        self._landed: deque[Key] = deque()  # not yet handed over
        self._held: list[Key] = []
        self._in_flight: dict[int, Key] = {}

    @property
    def is_short_of_slots(self) -> bool:
        return bool(self._missing)

    def __enter__(self) -> _CachedLease:
        self._source._open = self
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
        source, scan = self._source, self._scan
        policy, stats = source.policy, source.stats
        if len(scan) < len(self._keys):
            policy.begin(self.layer)
        source._look_ahead[bool(scan)].learn(self.layer, {expert for _, expert in self._keys})
        for key in self._keys:  # before any miss may evict one of them
            early = source._take_over(key)
            if early is not None:
                self._in_flight[early] = key
                stats.reads_ahead += 1
            elif policy.slot(key) is None:
                self._missing.append(key)
                continue
            else:
                self._hits.append(key)
                self._held.append(key)
            policy.use(key, is_scan=key[1] in scan)
        if self._in_flight:
            source._store.hurry(list(self._in_flight))
        source._forget_hint()
        # What decode waits for is read first; within that, in the order of the file.
        self._missing.sort(key=lambda key: (key[1] in scan, key), reverse=True)
        stats.lookups += len(self._keys)
        stats.hits += len(self._hits)

    def _end(self) -> None:
        """Give back what is held, and wait until no read of this lease moves bytes."""
        self._source._open = None
        self._held += self._landed
        self._landed.clear()
        self._give_back()
        for ticket, key in self._in_flight.items():
            self._source._store.cancel(ticket)
            self._source.policy.drop(key)
        self._in_flight.clear()

    def __iter__(self) -> Iterator[ExpertGroup]:
        source = self._source
        if self._hits:
            yield self._group(self._hits)
        landed = self._landed
        while landed or self._in_flight or self._missing:
            self._give_back()
            self._issue()
            if landed:
                self._held = [landed.popleft() for _ in range(min(_MOST_IN_GROUP, len(landed)))]
                yield self._group(self._held)
                continue
            if not self._in_flight:
                assert source._early  # else a slot could be had: nothing else is pinned
                source._collect_early(block=True)
                continue
            failed: ArgosyError | None = None
            for ticket, message, kind in source._store.wait_any(list(self._in_flight)):
                key = self._in_flight.pop(ticket)
                if message is not None:
                    source.policy.drop(key)
                    if kind == "dropped":  # by an earlier hint, before this lease took it over
                        self._missing.append(key)
                        continue
                    failed = source._files.failure(key, message, kind)
                    continue
                source.stats.bytes_read += source._files.expert_bytes(key)
                landed.append(key)
            if failed is not None:
                raise failed

    def _issue(self) -> None:
        """Start as many of the missing reads as there are slots for, then those of the hint."""
        source, admitted = self._source, []
        while self._missing:
            key = self._missing[-1]
            if source.policy.admit(key, is_scan=key[1] in self._scan) is None:
                break
            admitted.append(self._missing.pop())
        if admitted:
            self._in_flight.update((ticket, key) for key, ticket in source._fetch(admitted).items())
        source._read_ahead()

    def _give_back(self) -> None:
        for key in self._held:
            self._source.policy.unpin(key)
        self._held = []

    def _group(self, keys: list[Key]) -> ExpertGroup:
        source, experts = self._source, [expert for _, expert in keys]
        places = [source._place(key) for key in keys]
        return ExpertGroup(experts, source._files.offsets(self.layer, experts, places))
