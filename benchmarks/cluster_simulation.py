"""A group on a virtual clock: what a token should take when drives decide, with the code that really decides.

    Recording  ->  layers of a run: experts, and what the next layer's router would choose
    simulate   ->  seconds, with the owners of `cluster/placement.py`, the choice among them, and the cache of a worker

Owners are chosen by `_native.Owners`, as in a coordinator. A worker's experts are in an `ExpertCache` with its policy
and its look-ahead, as in a worker. Only the drive is imitated: `VirtualDrive` has the queues and the token bucket of
`native/store`, and a clock that goes on when somebody waits. Arithmetic and the network are a time for each layer,
which the caller measures. Used by `cluster.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.cluster.hello import MOST_ROWS
from argosy.cluster.placement import Host, place
from argosy.experts.cache import ExpertCache
from argosy.experts.runner import ExpertRunner, Rows, RunnerStats
from tests.experts.fake_store import FakeFiles

# As in native/store/store.h.
PART_BYTES = 1 << 20
MOST_BEGUN, MOST_BEGUN_BEFORE_GUESS = 16, 6
NUM_READERS = 4
ALIGNMENT = 4096


@dataclass(slots=True)
class Layer:
    """A routed layer of a step. by_rank: of the next routed layer, as its router saw it here; empty: not the last."""

    number: int
    experts: list[int]
    scan: list[int]
    following: int = -1
    by_rank: list[list[int]] = field(default_factory=list)


class Recording:
    """A group without workers that notes what layers ask for; an engine takes it as `experts`."""

    runs_here = True
    most_rows = MOST_ROWS

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def nbytes(self, files: ModelFiles) -> int:
        return 0

    def open(self, files: ModelFiles, local: ExpertRunner, **_: Any) -> ExpertRunner:
        return _Recorder(self, local)


class _Recorder:
    resident = elsewhere = None

    def __init__(self, recording: Recording, local: ExpertRunner) -> None:
        self._recording, self._local = recording, local

    @property
    def stats(self) -> RunnerStats:
        return self._local.stats

    @property
    def num_resident(self) -> int:
        return self._local.num_resident

    @contextmanager
    def run(
        self, layer: int, dispatch: _native.Dispatch, rows: Rows, out: Rows
    ) -> Iterator[Iterator[Sequence[int]]]:
        self._recording.layers.append(Layer(layer, list(dispatch.experts), list(dispatch.scan)))
        with self._local.run(layer, dispatch, rows, out) as groups:
            yield iter(groups)

    def wants_guess(self, *, is_sweep: bool) -> bool:
        return True

    def guess(self, layer: int, by_rank: Sequence[Sequence[int]], *, is_sweep: bool) -> None:
        last = self._recording.layers[-1]
        last.following, last.by_rank = layer, [list(experts) for experts in by_rank]

    def close(self) -> None:
        self._local.close()


@dataclass(slots=True, eq=False)
class _Request:
    parts_left: int
    is_begun: bool = False
    is_dropped: bool = False


class VirtualDrive:
    """The part of `_native.Store(bytes_per_s=)` that an expert cache uses, on a clock of its own.

    Parts begin in order of urgency, at most 16 at once, and land when a drive of that rate would have read them and all
    that began before.
    """

    def __init__(self, record_bytes: int, bytes_per_s: float) -> None:
        self.now = 0.0
        self._rate = bytes_per_s
        whole, rest = divmod(record_bytes, PART_BYTES)
        self._parts = [PART_BYTES] * whole + [rest] * bool(rest)
        self._queues: tuple[deque[tuple[int, int]], ...] = (deque(), deque(), deque())  # (ticket, bytes)
        self._begun: deque[tuple[float, int]] = deque()  # (when it lands, ticket), in that order
        self._free_at = 0.0
        self._requests: dict[int, _Request] = {}
        self._next_ticket = 1

    def go_to(self, time: float) -> None:
        """Let what lands until then land."""
        while self._begun and self._begun[0][0] <= time:
            self._land()
        self.now = max(self.now, time)

    # ── what a cache calls ────────────────────────────────────────────────────────────────────────────────────

    def open(self, path: str) -> int:
        return 0

    def info(self, file_id: int) -> tuple[str, int, int, bool, str]:
        return "", 0, ALIGNMENT, True, ""

    def fetch_many(self, arena: Any, records: Sequence[Any], urgency: str = "now") -> list[int]:
        tickets = list(range(self._next_ticket, self._next_ticket + len(records)))
        self._next_ticket += len(records)
        queue = self._queues[("now", "soon", "maybe").index(urgency)]
        for ticket in tickets:
            self._requests[ticket] = _Request(len(self._parts))
            queue.extend((ticket, nbytes) for nbytes in self._parts)
        self._begin()
        return tickets

    def wait_any(
        self, tickets: Sequence[int], most_ms: int | None = None
    ) -> list[tuple[int, str | None, str | None]]:
        wanted = [ticket for ticket in tickets if ticket in self._requests]
        while True:
            done = [ticket for ticket in wanted if not self._requests[ticket].parts_left]
            if done or not wanted or most_ms == 0:
                break
            self._land()
        found: list[tuple[int, str | None, str | None]] = []
        for ticket in done:
            is_dropped = self._requests.pop(ticket).is_dropped
            found.append((ticket, "dropped", "dropped") if is_dropped else (ticket, None, None))
        return found

    def hurry(self, tickets: Sequence[int]) -> None:
        chosen = set(tickets)
        for queue in self._queues[1:]:
            self._queues[0].extend(part for part in queue if part[0] in chosen)
            kept = [part for part in queue if part[0] not in chosen]
            queue.clear()
            queue.extend(kept)
        self._begin()

    def drop(self, tickets: Sequence[int]) -> list[int]:
        dropped = []
        for ticket in tickets:
            request = self._requests.get(ticket)
            if request is None or not (num_parts := self._unqueue(ticket)):
                continue
            request.parts_left -= num_parts
            if request.is_begun:
                request.is_dropped = True
            else:
                dropped.append(ticket)
                del self._requests[ticket]
        return dropped

    def cancel(self, ticket: int) -> None:
        if (request := self._requests.get(ticket)) is None:
            return
        request.parts_left -= self._unqueue(ticket)
        while request.parts_left:
            self._land()
        del self._requests[ticket]

    # ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _unqueue(self, ticket: int) -> int:
        removed = 0
        for queue in self._queues:
            kept = [part for part in queue if part[0] != ticket]
            removed += len(queue) - len(kept)
            queue.clear()
            queue.extend(kept)
        return removed

    def _begin(self) -> None:
        most = (MOST_BEGUN, MOST_BEGUN - NUM_READERS, MOST_BEGUN_BEFORE_GUESS)
        while (urgency := next((i for i, queue in enumerate(self._queues) if queue), None)) is not None:
            if len(self._begun) >= most[urgency]:
                return
            ticket, nbytes = self._queues[urgency].popleft()
            self._requests[ticket].is_begun = True
            self._free_at = max(self._free_at, self.now) + nbytes / self._rate
            self._begun.append((self._free_at, ticket))

    def _land(self) -> None:
        time, ticket = self._begun.popleft()
        self.now = max(self.now, time)
        self._requests[ticket].parts_left -= 1
        self._begin()


class _Worker:
    """A worker's cache, its drive, and the coordinator's idea of it."""

    def __init__(self, name: str, files: ModelFiles, *, slots: int, rate: float) -> None:
        record_bytes = max(record.nbytes for record in files.experts.values())
        config = files.config
        self.drive = VirtualDrive(record_bytes, rate)
        self.cache = ExpertCache(
            FakeFiles(self.drive, files.experts),
            num_slots=min(slots, len(files.experts)),
            experts_per_token=config.experts_per_token,
        )
        self.owner = _native.Owner(name)
        self.owner.peer = 1
        self.owner.set_rates(record_bytes, rate)
        self.owner.remember(slots, num_layers=config.num_layers, num_experts=config.num_experts)

    def run(self, layer: Layer, experts: list[int]) -> None:
        """Answer a request that arrives now, and note what the coordinator learns."""
        scan = set(layer.scan)
        with self.cache.lease(layer.number, experts, [e for e in experts if e in scan]) as lease:
            for group in lease:
                self.owner.note(layer.number, group)

    def guess(self, layer: Layer, ranks: list[list[int]]) -> None:
        is_sweep = bool(layer.scan)
        if self.cache.wants_guess(is_sweep=is_sweep):
            self.cache.guess(layer.following, ranks, is_sweep=is_sweep)


def simulate(
    files: ModelFiles, layers: Sequence[Layer], *, first: int, names: Sequence[str], slots: int, rate: float,
    replicas: int, layer_s: float,
) -> float:  # fmt: skip
    """Seconds from layer `first` of a recording to its end.

    Args:
        layers: all steps since the workers were started.
        names: the addresses of workers, by which they own experts.
        slots, rate: expert slots and bytes per second of each worker.
        layer_s: time of a layer without reads.
    """
    config = files.config
    workers = [_Worker(name, files, slots=slots, rate=rate) for name in names]
    try:
        hosts = [
            Host(
                name=worker.owner.name,
                cache_bytes=slots * max(record.nbytes for record in files.experts.values()),
                disk_bytes_per_s=rate,
            )
            for worker in workers
        ]
        placed = place(
            hosts, config.moe_layers, num_experts=config.num_experts, expert_bytes=files.expert_bytes,
            replicas=replicas,
        )  # fmt: skip
        table = np.full((config.num_layers, config.num_experts, replicas), -1, np.int16)
        for number, owners in placed.items():
            table[number] = owners
        by_name = {worker.owner.name: worker for worker in workers}
        everyone = _native.Owners([worker.owner for worker in workers], table)
        now = began = 0.0
        for at, layer in enumerate(layers):
            if at == first:
                began = now
            now += layer_s
            shares = everyone.choose(layer.number, layer.experts)
            guesses = everyone.split_guess(layer.following, layer.by_rank) if layer.by_rank else []
            ends = []
            for worker in workers:
                worker.drive.go_to(now)
            for owner, experts in shares:
                worker = by_name[owner.name]
                worker.run(layer, sorted(experts))
                ends.append(worker.drive.now)
            for worker, ranks in zip(workers, guesses, strict=False):
                if any(ranks):
                    worker.guess(layer, ranks)  # it reads the guess when it has answered
            now = max(ends)
        return now - began
    finally:
        for worker in workers:
            worker.cache.close()
