"""Keep the experts that fit the budget in memory; read the others from disk.

    dispatch  ->  lease: resident experts, then each as it lands  ->  outputs

One arena of slots serves all layers; `slots.py` lays them out. Native code does leases, reads and guesses
(native/ops/cached_experts.h), and a stack runs layers with it as long as nothing goes wrong. `ExpertCache` owns the
memory. `Lease` and `CachedRunner` take over a layer that takes long or whose read failed, lend the cores to other
models while they wait, and run the layers of a worker.

A model that shares its memory may get a slot for every expert. The cache then also reads the experts that no token has
chosen, a few after each lease. Once all are resident, native code runs steps without calling Python, as with
`resident.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from argosy import _native
from argosy.errors import ReadFailed
from argosy.experts.files import Arithmetic, ExpertFiles
from argosy.experts.runner import AdapterParts, Rows, RunnerStats, replace_parts
from argosy.experts.slots import Copy, Slots, lay_out


class Cores(Protocol):
    """The lock that lets steps of several models take turns; a running step holds it."""

    def acquire(self) -> bool:
        """Take the lock; return whether it was free."""
        ...

    def release(self) -> None: ...


class ExpertCache:
    """Slots for the experts of all layers. `resize` changes their number between steps.

    Attributes:
        slots: which expert is in which slot.
        slot_bytes: bytes of the arena for a slot; see `SlotLayout`.
        most: the limit of `resize`.
        core: leases, reads and guesses.
        lent: the lock for the cores, which other models may take while a lease waits for reads; None: the step keeps
        it.
        earlier: counters of the runner that this cache replaced.
        compute_s: the time spent computing experts that Python started.

    Args:
        num_slots: the number of slots at first.
        most: the maximum number of slots; None: `num_slots`.
        reads_all: while there is a slot for every expert, also read experts that no token chose.
        foreground: the work to which committing memory gives way; None: it gives way to nothing.
    """

    def __init__(
        self,
        files: ExpertFiles,
        *,
        num_slots: int,
        experts_per_token: int,
        most: int | None = None,
        reads_all: bool = False,
        arithmetic: Arithmetic | None = None,
        look_ahead: bool = True,
        foreground: _native.Foreground | None = None,
    ) -> None:
        self.most = num_slots if most is None else most
        self.lent: Cores | None = None
        self.earlier = RunnerStats()
        self.compute_s = 0.0
        self.others_run = False  # other models still had the cores when a lease took them back
        self._foreground = foreground
        self._parts: dict[int, AdapterParts] = {}  # by adapter
        self._populating: list[threading.Thread] = []
        layout = lay_out(files.records, experts_per_token=experts_per_token, alignment=files.alignment)
        self.slot_bytes = layout.slot_bytes
        arena = self._arena = _native.Arena(self.slot_bytes * self.most)
        self.table = files.table(arena, arithmetic or Arithmetic())
        arena.resize(num_slots * self.slot_bytes)
        self._num_held = num_slots
        self._populate()
        self.slots = Slots(layout, num_slots=num_slots, experts_per_token=experts_per_token)
        self._files = files
        self.core = _native.CachedExperts(
            files.reads(arena),
            self.table,
            kinds=self.slots.kinds(),
            keys=list(files.records),
            experts_per_token=experts_per_token,
            look_ahead=look_ahead,
            reads_all=reads_all,
        )

    @property
    def stats(self) -> RunnerStats:
        """Return the counters, without experts that native code ran while every one was in memory."""
        counts, earlier = self.core.counts, self.earlier
        return RunnerStats(
            lookups=earlier.lookups + counts.lookups,
            hits=earlier.hits + counts.hits,
            bytes_read=earlier.bytes_read + counts.bytes_read,
            reads_ahead=earlier.reads_ahead + counts.reads_ahead,
            idle_reads=earlier.idle_reads + counts.idle_reads,
            compute_s=earlier.compute_s + self.compute_s,
            decode_lookups=earlier.decode_lookups + counts.decode_lookups,
            decode_hits=earlier.decode_hits + counts.decode_hits,
        )

    def lease(self, layer: int, experts: Sequence[int], scan: Collection[int] = ()) -> Lease:
        """Lease experts of a layer; each is named once.

        `scan` names the experts that only prompt tokens asked for: they pass through the cache without displacing
        experts that decode uses.
        """
        return Lease(self, layer, experts, scan)

    def wants_guess(self, *, is_sweep: bool) -> bool:
        return self.core.wants_guess(is_sweep=is_sweep)

    def guess(self, layer: int, by_rank: Sequence[Sequence[int]], *, is_sweep: bool) -> None:
        self.core.guess(layer, by_rank, is_sweep=is_sweep)

    def failure(self) -> Exception:
        """Return the error of the read that failed in the open lease."""
        failure = self.core.failure
        assert failure is not None
        key, message, kind = failure
        if (adapter := self.core.failed_adapter) >= 0:
            name = self._parts[adapter].name
            sentence = (
                f"layer {key[0]}, expert {key[1]}: the part of the adapter {name} cannot be read: {message}"
            )
            return ReadFailed(
                sentence, hint="load the adapter again", layer=key[0], expert=key[1], adapter=adapter
            )
        return self._files.failure(key, message, kind)

    def set_adapter(self, number: int, parts: AdapterParts | None) -> None:
        """From the next lease on, an adapter's tokens have these parts beside their experts; earlier ones are freed."""
        self.core.set_parts(number, None)
        self.table.set_adapter(number, None if parts is None else parts.adapter)
        replace_parts(self._parts, number, parts)
        if parts is not None:
            self.core.set_parts(number, parts.stream(self._part_slots(parts)))

    def _part_slots(self, parts: AdapterParts) -> int:
        """Return the slots for an adapter's parts: the share that experts have, and one more (`AdapterNeeds`)."""
        share = parts.most * self.slots.num_slots // max(1, len(self._files.records))
        return min(parts.most, share + 1)

    def resize(self, num_slots: int, *, held: int | None = None) -> None:
        """Change the number of slots between two leases; the memory of removed slots goes back to the system at once.

        The experts that a miss would evict next leave. Other experts in removed slots are copied to lower slots.

        Args:
            held: slots that still have memory when this returns, at least `num_slots`: experts may stay there
                until the next call. None: no more than `num_slots`.
        """
        self.core.end(is_whole=False)  # left by a step that failed
        self.core.forget_hint()
        while self.core.num_early:
            self.core.collect_early()
        if num_slots != self.slots.num_slots:
            self.slots.resize(num_slots)
        before = self._num_held
        held = num_slots if held is None else max(num_slots, min(held, before))
        if moves := self.slots.moves(held):
            self._copy(moves)
        self._num_held = held
        self._arena.resize(held * self.slot_bytes)
        if held > before:
            self._populate()
        for parts in self._parts.values():
            parts.resize(self._part_slots(parts))

    def _copy(self, moves: Sequence[Copy]) -> None:
        memory = self._arena.array()
        for _, begin, to, nbytes in moves:
            memory[to : to + nbytes] = memory[begin : begin + nbytes]
        self.table.place([(key, to) for key, _, to, _ in moves])

    def close(self) -> None:
        self.core.end(is_whole=False)
        self.core.cancel_early()
        self._arena.close()
        for parts in self._parts.values():
            parts.close()
        for thread in self._populating:  # each ends after its present piece
            thread.join()

    def _populate(self) -> None:
        # Otherwise the next prompt's reads would pay for it: a second or more on a virtual machine.
        thread = threading.Thread(
            target=self._arena.populate, args=(self._foreground,), name="argosy-populate", daemon=True
        )
        thread.start()
        self._populating = [*filter(threading.Thread.is_alive, self._populating), thread]


class Lease:
    """A promise that weights stay in place until the lease ends: iterate once, inside `with`, over groups of experts.

    Hits come first, then misses as they land. The cache's table says where the experts of a group are; they stay there
    until the next group is requested or the lease ends. When a lease ends, even early, none of its reads is in flight.
    """

    __slots__ = ("_asked", "_cache", "_scan", "layer")

    def __init__(self, cache: ExpertCache, layer: int, experts: Sequence[int], scan: Collection[int]) -> None:
        self.layer = layer
        self._cache = cache
        self._asked = experts
        self._scan = scan

    def __enter__(self) -> Lease:
        self._cache.core.open(self.layer, list(self._asked), list(self._scan))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache.core.end(is_whole=kind is None)

    def __iter__(self) -> Iterator[Sequence[int]]:
        return groups(self._cache)


def groups(cache: ExpertCache) -> Iterator[Sequence[int]]:
    """Yield the groups of the open lease.

    Raises:
        ReadFailed, CorruptRecord, CheckpointError: an expert cannot be read.
    """
    core = cache.core
    while True:
        group = core.group()
        if group:
            yield group
        elif group is not None:
            return
        elif core.failure is not None:
            raise cache.failure()
        else:
            _wait(cache)


def _wait(cache: ExpertCache) -> None:
    """Wait for one read, or for all in flight if other models use the cores: taking those back may cost a step."""
    core = cache.core
    if (cores := cache.lent) is None:
        core.collect()
        return
    cores.release()
    try:
        core.collect()
        while cache.others_run and core.num_in_flight:
            core.collect()
    finally:
        cache.others_run = not cores.acquire()


class CachedRunner:
    """Runs experts out of a cache, in groups: first the resident ones, then the others as they land.

    While every expert is resident, native code runs them, and nothing ages.
    """

    def __init__(self, runtime: _native.Runtime, cache: ExpertCache) -> None:
        self.cache = cache
        self._runtime = runtime
        self._num_leased = 0  # experts that Python ran from a lease

    @property
    def resident(self) -> _native.ExpertTable | None:
        """See `ExpertRunner.resident`."""
        return self.cache.table if self.cache.core.has_all else None

    @property
    def elsewhere(self) -> _native.LayerExperts | None:
        """See `ExpertRunner.elsewhere`; None while other models may take the cores."""
        return self.cache.core if self.cache.lent is None else None

    @property
    def stats(self) -> RunnerStats:
        """See `ExpertRunner.stats`; experts that native code runs by itself count as hits."""
        cache, stats = self.cache, self.cache.stats
        num_native = cache.table.num_runs - self._num_leased - cache.core.num_run
        stats.lookups += num_native
        stats.hits += num_native
        stats.decode_lookups += num_native
        stats.decode_hits += num_native
        return stats

    @property
    def num_resident(self) -> int:
        return self.cache.slots.num_resident

    @contextmanager
    def run(
        self, layer: int, dispatch: _native.Dispatch, rows: Rows, out: Rows
    ) -> Iterator[Iterator[Sequence[int]]]:
        core, is_whole = self.cache.core, False
        if not core.is_running(dispatch):  # otherwise the stack began the run, and stopped
            core.open_for(layer, dispatch)
        try:
            yield self._groups(layer, dispatch, rows, out)
            is_whole = True
        finally:
            core.end(is_whole=is_whole)

    def _groups(
        self, layer: int, dispatch: _native.Dispatch, rows: Rows, out: Rows
    ) -> Iterator[Sequence[int]]:
        cache = self.cache
        if done := cache.core.take_done():
            yield done
        for group in groups(cache):
            cache.compute_s += cache.table.run(self._runtime, layer, group, dispatch, rows, out)
            self._num_leased += len(group)
            yield group

    def set_adapter(self, number: int, parts: AdapterParts | None) -> None:
        self.cache.set_adapter(number, parts)

    def wants_guess(self, *, is_sweep: bool) -> bool:
        return self.cache.wants_guess(is_sweep=is_sweep)

    def guess(self, layer: int, by_rank: Sequence[Sequence[int]], *, is_sweep: bool) -> None:
        self.cache.guess(layer, by_rank, is_sweep=is_sweep)

    def close(self) -> None:
        self.cache.close()
