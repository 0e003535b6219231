"""Keep the experts that fit the budget in memory; read the others from disk.

    dispatch  ->  lease: experts that are here, then each as it lands  ->  outputs

One arena of slots serves all layers; `slots.py` lays them out. `policy.CachePolicy` decides which expert is evicted;
`ExpertCache` adds the reads, and gives out leases; `CachedRunner` computes what a lease hands over. As many misses of a
layer as there are slots are issued before the first expert is computed. A slot whose expert has been computed is free
for the next miss, so a layer may ask for more experts than there are slots.

A model that shares its memory may get a slot for every expert. Those that no token asked for are then read, too, a few
after each lease. Once all are here, native code runs steps without asking, as with `resident.py`.

`guess` tells which experts the next layer will probably ask for, and `look_ahead.LookAhead` decides which of them are
worth a read. These reads begin once the open lease has issued all of its own reads, in slots of the policy's window;
the next lease takes them over at whatever stage they are. So the drive does not wait for arithmetic between two layers.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Protocol

from argosy import _native
from argosy.errors import ArgosyError
from argosy.experts.files import Arithmetic, ExpertFiles, Key
from argosy.experts.look_ahead import LookAhead
from argosy.experts.runner import Rows, RunnerStats
from argosy.experts.slots import Copy, Slots, lay_out_slots

# Experts that are computed together. The slots of a group are free for other reads only when the group is done, so
# without this limit a prompt that found half a layer read ahead would keep the drive waiting. Usually more than one
# token asks for.
_MOST_IN_GROUP = 8
_FILLING = 4  # reads at once of experts that no token asked for


class Cores(Protocol):
    """The lock for which steps of several models take turns; whoever runs a step holds it."""

    def acquire(self) -> bool:
        """Take the lock; returns whether it was free."""
        ...

    def release(self) -> None: ...


class ExpertCache:
    """Slots for the experts of all layers. `resize` changes their number between steps.

    Attributes:
        slots: which expert is in which slot.
        slot_bytes: bytes of the arena for a slot; see `SlotLayout`.
        most_slots: the limit of `resize`.
        lent: the lock for the cores, which others may take while a lease waits for reads; None: the step keeps it.

    Args:
        num_slots: how many there are at most.
        first_slots: how many there are at first; None: as many.
        reads_all: read experts that no token asks for, too, while there is a slot for every one.
        foreground: committing memory gives way to it; None: to nothing.
    """

    def __init__(
        self,
        store: _native.Store,
        files: ExpertFiles,
        *,
        num_slots: int,
        experts_per_token: int,
        first_slots: int | None = None,
        reads_all: bool = False,
        arithmetic: Arithmetic | None = None,
        look_ahead: bool = True,
        foreground: _native.Foreground | None = None,
    ) -> None:
        self.stats = RunnerStats()
        self.most_slots = num_slots
        self.lent: Cores | None = None
        self._others_run = False  # they had the cores when a lease took them again
        self._foreground = foreground
        self._populating: list[threading.Thread] = []
        layout = lay_out_slots(files.records, experts_per_token=experts_per_token, alignment=files.alignment)
        self.slot_bytes = layout.slot_bytes
        self._arena = _native.Arena(self.slot_bytes * num_slots)
        self.table = files.table(self._arena, arithmetic or Arithmetic())
        self._may_fill = reads_all
        first_slots = num_slots if first_slots is None else first_slots
        self._arena.resize(first_slots * self.slot_bytes)
        self._held_slots = first_slots
        self._populate()
        self.slots = Slots(layout, num_slots=first_slots, experts_per_token=experts_per_token)
        self._store = store
        self._files = files
        self._open: Lease | None = None
        self._look_ahead = (LookAhead(experts_per_token), LookAhead(experts_per_token))  # decode, sweeps
        self._wants_guesses = look_ahead
        self._fewest_for_guesses = 4 * experts_per_token * len(layout.kinds)
        self._hint: list[int] = []  # experts of `_hint_layer` not yet requested; the next is last
        self._hint_layer = -1
        self._is_sweep = False  # whether the hint is for a sweep
        self._experts: dict[int, list[int]] = {}  # by layer, those that may be read here
        for layer, expert in files.records:
            self._experts.setdefault(layer, []).append(expert)
        self._kept: set[int] = set()  # resident experts of the hint, pinned until the next lease
        self._early: dict[Key, int] = {}  # reads that no lease waits for: expert -> ticket

    def lease(self, layer: int, experts: Sequence[int], scan: Collection[int] = ()) -> Lease:
        """Lease experts of a layer, each named once.

        `scan` names the experts that only prompt tokens asked for: they pass through the cache without displacing
        experts that decode uses.
        """
        return Lease(self, layer, experts, scan)

    def wants_guess(self, *, is_sweep: bool) -> bool:
        # With fewer slots, guesses would take slots that a token itself needs.
        has_room = self._wants_guesses and self.slots.num_slots >= self._fewest_for_guesses
        return (is_sweep or has_room) and self._look_ahead[is_sweep].wants_guess

    def guess(self, layer: int, by_rank: Sequence[Sequence[int]], *, is_sweep: bool) -> None:
        self._forget_hint()
        look_ahead, early = self._look_ahead[is_sweep], self._early
        missing = {expert: rank for rank, experts in enumerate(by_rank) for expert in experts}
        for expert in self.slots.policy_of[layer].find(layer, list(missing))[0]:
            if (layer, expert) not in early:
                del missing[expert]
        look_ahead.remember(layer, missing)
        if self._open is not None and self._open.layer == layer:
            return  # its slots are in use
        hint = look_ahead.trusted(by_rank)
        if is_sweep:
            hint.sort()  # in file order
        hint.reverse()
        self._hint, self._hint_layer, self._is_sweep = hint, layer, is_sweep
        self._read_ahead()

    def resize(self, num_slots: int, *, held_slots: int | None = None) -> None:
        """Have so many slots from now on, between two leases; the memory of others goes back to the system at once.

        The experts that a miss would evict next leave. Others in slots that go are copied to lower ones.

        Args:
            held_slots: slots that still have memory when this returns, at least `num_slots`: experts may stay there
                until the next call. None: no more than `num_slots`.
        """
        assert self._open is None
        self._forget_hint()
        while self._early:
            self._collect_early(block=True)
        if num_slots != self.slots.num_slots:
            self.slots.resize(num_slots)
        before, held = self._held_slots, num_slots
        if held_slots is not None:
            held = max(num_slots, min(held_slots, before))
        if moves := self.slots.moves(held):
            self._copy(moves)
        self._held_slots = held
        self._arena.resize(held * self.slot_bytes)
        if held > before:
            self._populate()

    def _copy(self, moves: Sequence[Copy]) -> None:
        memory = self._arena.array()
        for _, begin, to, nbytes in moves:
            memory[to : to + nbytes] = memory[begin : begin + nbytes]
        self.table.place([(key, to) for key, _, to, _ in moves])

    @property
    def has_all(self) -> bool:
        """Whether every expert has landed; between two steps."""
        return self.slots.num_resident == len(self._files.records) and not self._early

    def _fill(self, layer: int) -> None:
        """If there is a slot for every expert, start to read some of a layer that are not here."""
        has_room = self.slots.num_slots >= len(self._files.records)
        if not (has_room and self._may_fill) or len(self._early) >= _FILLING:
            return
        policy = self.slots.policy_of[layer]
        _, missing = policy.find(layer, self._experts.get(layer, ()))
        admitted: list[tuple[int, int]] = []
        for expert in missing[: _FILLING - len(self._early)]:
            slot = policy.admit((layer, expert), is_scan=True)
            assert slot is not None
            admitted.append((expert, slot))
        if admitted:
            tickets = self._fetch(layer, admitted, urgency="maybe")
            for (expert, _), ticket in zip(admitted, tickets, strict=True):
                self._early[layer, expert] = ticket

    def close(self) -> None:
        for ticket in self._early.values():
            self._store.cancel(ticket)
        self._arena.close()
        for thread in self._populating:  # each ends after the piece that it is at
            thread.join()

    def _populate(self) -> None:
        # Otherwise the next prompt's reads would pay for it: a second or more on a virtual machine.
        thread = threading.Thread(
            target=self._arena.populate, args=(self._foreground,), name="argosy-populate", daemon=True
        )
        thread.start()
        self._populating = [*filter(threading.Thread.is_alive, self._populating), thread]

    def _fetch(
        self, layer: int, admitted: Sequence[tuple[int, int]], *, urgency: _native.Urgency = "now"
    ) -> list[int]:
        """Start reads of (expert, slot) pairs that were just admitted; return their tickets."""
        try:
            place_of = self.slots.places_of[layer]
            places = [((layer, expert), place_of[slot]) for expert, slot in admitted]
            self.table.place(places)
            return self._files.fetch(self._arena, places, urgency=urgency)
        except BaseException:
            for expert, _ in admitted:
                self.slots.policy_of[layer].drop((layer, expert))
            raise

    # ── the hint ────────────────────────────────────────────────────────────────────────────────────────────

    def _read_ahead(self) -> None:
        """Start reads of the hint, unless the open lease still needs slots."""
        if not self._hint or (self._open is not None and self._open.is_short_of_slots):
            return
        layer, early = self._hint_layer, self._early
        policy = self.slots.policy_of[layer]
        found, self._hint = policy.find(layer, self._hint)
        kept = [expert for expert in found if (layer, expert) not in early]
        policy.use(layer, kept, is_scan=True)  # the reads of their neighbours must not displace them
        self._kept.update(kept)
        admitted: list[tuple[int, int]] = []
        while self._hint:
            expert = self._hint[-1]
            slot = policy.admit((layer, expert), is_scan=True, is_guess=not self._is_sweep)
            if slot is None:
                break
            admitted.append((self._hint.pop(), slot))
        if admitted:
            tickets = self._fetch(layer, admitted, urgency="soon" if self._is_sweep else "maybe")
            for (expert, _), ticket in zip(admitted, tickets, strict=True):
                early[layer, expert] = ticket

    def _take_over(self, layer: int, found: Sequence[int]) -> dict[int, int]:
        """Hand the hint's experts of a layer to a lease; return the reads in flight: ticket -> expert."""
        if layer == self._hint_layer:
            self._kept.difference_update(found)
        early = self._early
        if not early:
            return {}
        return {early.pop((layer, expert)): expert for expert in found if (layer, expert) in early}

    def _forget_hint(self) -> None:
        """Give up what the last hint still holds, except reads that have begun. Never waits.

        A read that has begun stays in `_early` until it ends: complete, or abandoned halfway.
        """
        self._hint = []
        if self._kept:
            self.slots.policy_of[self._hint_layer].unpin(self._hint_layer, self._kept)
            self._kept.clear()
        if not self._early:
            return
        dropped = set(self._store.drop(list(self._early.values())))
        for key in [key for key, ticket in self._early.items() if ticket in dropped]:
            del self._early[key]
            self.slots.policy_of[key[0]].drop(key)
        if self._early:
            self._collect_early(block=False)

    def _collect_early(self, *, block: bool) -> None:
        """Collect early reads that have ended: free the slots of failed ones, and keep experts that landed."""
        keys = {ticket: key for key, ticket in self._early.items()}
        for ticket, message, error in self._store.wait_any(list(keys), None if block else 0):
            key = keys[ticket]
            del self._early[key]
            if message is not None:
                # It was abandoned halfway; or a lease that needs the expert will read it again and get the error.
                self._may_fill = self._may_fill and error == "dropped"
                self.slots.policy_of[key[0]].drop(key)
                continue
            self.slots.policy_of[key[0]].unpin(key[0], [key[1]])
            self.stats.bytes_read += self._files.expert_bytes(key)
            self.stats.idle_reads += 1


class Lease:
    """A promise that weights stay until given back: iterate once, inside `with`, over groups of experts.

    Hits first, then misses as they land. The cache's table says where the experts of a group are; they stay there until
    the next group is requested or the lease ends. No read of a lease is in flight at its end, even if it is cut short.
    """

    __slots__ = (
        "_asked", "_cache", "_held", "_hits", "_in_flight", "_landed", "_missing", "_policy", "_scan", "layer",
    )  # fmt: skip

    def __init__(self, cache: ExpertCache, layer: int, experts: Sequence[int], scan: Collection[int]) -> None:
        self.layer = layer
        self._cache = cache
        self._policy = cache.slots.policy_of[layer]
        self._asked = experts
        self._scan = scan
        self._hits: list[int] = []
        self._missing: list[int] = []  # the next to be read is last
        self._landed: list[int] = []  # not yet handed over, the oldest first
        self._held: list[int] = []
        self._in_flight: dict[int, int] = {}  # ticket -> expert

    @property
    def is_short_of_slots(self) -> bool:
        return bool(self._missing)

    def __enter__(self) -> Lease:
        self._cache._open = self
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
        if kind is None:
            self._cache._fill(self.layer)

    def _find(self) -> None:
        cache, layer, asked, scan = self._cache, self.layer, self._asked, self._scan
        policy, stats = self._policy, cache.stats
        if len(scan) < len(asked):
            policy.begin(layer)
        found, missing = policy.find(layer, asked)  # before a miss can evict one of them
        self._in_flight = in_flight = cache._take_over(layer, found)
        self._held = self._hits = found
        if scan:
            policy.use(layer, [expert for expert in found if expert in scan], is_scan=True)
            policy.use(layer, [expert for expert in found if expert not in scan], is_scan=False)
            # Experts that decode waits for are read first; otherwise the file order decides.
            missing.sort(key=lambda expert: (expert in scan, expert), reverse=True)
        else:
            policy.use(layer, found, is_scan=False)
            missing.sort(reverse=True)
        self._missing = missing
        if in_flight:
            early = in_flight.values()
            self._held = self._hits = [expert for expert in found if expert not in early]
            stats.reads_ahead += len(in_flight)
            cache._store.hurry(list(in_flight))
        cache._forget_hint()
        cache._look_ahead[bool(scan)].learn(layer, asked)
        stats.lookups += len(asked)
        stats.hits += len(self._hits)
        if len(scan) < len(asked):
            stats.decode_lookups += len(asked) - len(scan)
            stats.decode_hits += sum(expert not in scan for expert in self._hits) if scan else len(self._hits)

    def _end(self) -> None:
        """Give back the held experts, and wait until no read of this lease moves bytes."""
        cache, layer = self._cache, self.layer
        cache._open = None
        self._give_back()
        if self._landed:
            self._policy.unpin(layer, self._landed)
            self._landed.clear()
        if self._in_flight:
            for ticket, expert in self._in_flight.items():
                cache._store.cancel(ticket)
                self._policy.drop((layer, expert))
            self._in_flight.clear()

    def __iter__(self) -> Iterator[Sequence[int]]:
        cache, layer = self._cache, self.layer
        if self._hits:
            yield self._hits
        landed = self._landed
        while landed or self._in_flight or self._missing:
            self._give_back()
            self._issue()
            if landed:
                self._held = landed[:_MOST_IN_GROUP]
                del landed[:_MOST_IN_GROUP]
                yield self._held
                continue
            if not self._in_flight:
                assert cache._early  # otherwise a slot would be free: nothing else is pinned
                cache._collect_early(block=True)
                continue
            failed: ArgosyError | None = None
            for ticket, message, kind in self._wait():
                expert = self._in_flight.pop(ticket)
                key = layer, expert
                if message is not None:
                    self._policy.drop(key)
                    if kind == "dropped":  # dropped by an earlier hint, before this lease took it over
                        self._missing.append(expert)
                        continue
                    failed = cache._files.failure(key, message, kind)
                    continue
                cache.stats.bytes_read += cache._files.expert_bytes(key)
                landed.append(expert)
            if failed is not None:
                raise failed

    def _wait(self) -> list[tuple[int, str | None, str | None]]:
        """Wait for a read; while others use the cores, for all in flight: taking them may cost a step of theirs."""
        cache, tickets = self._cache, list(self._in_flight)
        if (cores := cache.lent) is None:
            return cache._store.wait_any(tickets)
        cores.release()
        try:
            done = cache._store.wait_any(tickets)
            while cache._others_run and len(done) < len(tickets):
                left = set(tickets).difference(ticket for ticket, _, _ in done)
                done += cache._store.wait_any(list(left))
            return done
        finally:
            cache._others_run = not cores.acquire()

    def _issue(self) -> None:
        """Start reads of missing experts while there are slots, then reads of the hint."""
        cache, layer = self._cache, self.layer
        if self._missing:
            admitted: list[tuple[int, int]] = []
            while self._missing:
                expert = self._missing[-1]
                slot = self._policy.admit((layer, expert), is_scan=expert in self._scan)
                if slot is None:
                    break
                admitted.append((self._missing.pop(), slot))
            if admitted:
                tickets = cache._fetch(layer, admitted)
                for (expert, _), ticket in zip(admitted, tickets, strict=True):
                    self._in_flight[ticket] = expert
        cache._read_ahead()

    def _give_back(self) -> None:
        if self._held:
            self._policy.unpin(self.layer, self._held)
            self._held = []


class CachedRunner:
    """Runs experts out of a cache, in groups: those that are here, then the others as they land.

    While every expert is here, native code runs them, and nothing ages.
    """

    elsewhere = None

    def __init__(self, runtime: _native.Runtime, cache: ExpertCache) -> None:
        self.cache = cache
        self._runtime = runtime
        self._num_leased = 0  # experts that ran out of a lease

    @property
    def resident(self) -> _native.ExpertTable | None:
        """See `ExpertRunner.resident`."""
        return self.cache.table if self.cache.has_all else None

    @property
    def stats(self) -> RunnerStats:
        """See `ExpertRunner.stats`; what native code runs without asking is a hit."""
        stats, num_native = self.cache.stats, self.cache.table.num_runs - self._num_leased
        if not num_native:
            return stats
        return replace(
            stats,
            lookups=stats.lookups + num_native,
            hits=stats.hits + num_native,
            decode_lookups=stats.decode_lookups + num_native,
            decode_hits=stats.decode_hits + num_native,
        )

    @property
    def num_resident(self) -> int:
        return self.cache.slots.num_resident

    @contextmanager
    def run(
        self, layer: int, dispatch: _native.Dispatch, rows: Rows, out: Rows
    ) -> Iterator[Iterator[Sequence[int]]]:
        with self.cache.lease(layer, dispatch.experts, dispatch.scan) as lease:
            yield self._groups(lease, dispatch, rows, out)

    def _groups(
        self, lease: Lease, dispatch: _native.Dispatch, rows: Rows, out: Rows
    ) -> Iterator[Sequence[int]]:
        table, stats = self.cache.table, self.cache.stats
        for group in lease:
            stats.compute_s += table.run(self._runtime, lease.layer, group, dispatch, rows, out)
            self._num_leased += len(group)
            yield group

    def wants_guess(self, *, is_sweep: bool) -> bool:
        return self.cache.wants_guess(is_sweep=is_sweep)

    def guess(self, layer: int, by_rank: Sequence[Sequence[int]], *, is_sweep: bool) -> None:
        self.cache.guess(layer, by_rank, is_sweep=is_sweep)

    def close(self) -> None:
        self.cache.close()
