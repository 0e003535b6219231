"""Every expert in memory, read once at the start.

    reads of all experts  ->  one arena  ->  a table that the native stack uses without asking

Elsewhere: `cache.py` keeps only the experts that fit the budget.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from argosy import _native
from argosy.experts.files import Arithmetic, ExpertFiles
from argosy.experts.runner import AdapterParts, Rows, RunnerStats, replace_parts

Progress = Callable[[str, float], None]  # the current task, and the share done from 0 to 1

_WATCHED = 32  # tickets: readers take them in order, so the next to land is one of the oldest few


class ResidentReading:
    """Reads all experts into memory while the caller does something else.

    Reads start at construction. `wait` or `cancel` ends them; then `finish` or `close` takes the memory.
    """

    def __init__(self, store: _native.Store, files: ExpertFiles) -> None:
        self._store = store
        self._files = files
        self._places, arena_bytes = files.places()
        self._arena = _native.Arena(max(1, arena_bytes))
        self._bytes_read = 0
        # All at once: while the tokenizer is being built, no code here may get to run and start the next read.
        tickets = files.fetch(self._arena, list(self._places.items()))
        self._in_flight = dict(zip(tickets, self._places, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of memory for all experts."""
        return self._arena.nbytes

    def wait(self, progress: Progress | None = None) -> None:
        """Wait for every expert; harmless if all have landed.

        Raises:
            ReadFailed: the drive failed.   CorruptRecord: an expert does not match its checksum.
        """
        num_experts = len(self._in_flight)
        waiting = deque(self._in_flight)
        watched: list[int] = []
        try:
            while self._in_flight:
                while waiting and len(watched) < _WATCHED:
                    watched.append(waiting.popleft())
                done = self._store.wait_any(watched)
                landed = [(self._in_flight.pop(ticket), message, kind) for ticket, message, kind in done]
                watched = [ticket for ticket in watched if ticket in self._in_flight]
                for key, message, kind in landed:
                    if message is not None:
                        raise self._files.failure(key, message, kind)
                    self._bytes_read += self._files.expert_bytes(key)
                if progress is not None:
                    progress("reading experts", 1 - len(self._in_flight) / num_experts)
        finally:
            self.cancel()

    def finish(self, runtime: _native.Runtime, arithmetic: Arithmetic | None = None) -> ResidentRunner:
        """Return the runner of all experts, after `wait`."""
        table = self._files.table(self._arena, arithmetic or Arithmetic())
        table.place(list(self._places.items()))
        return ResidentRunner(
            runtime, self._arena, table, num_experts=len(self._places), bytes_read=self._bytes_read
        )

    def close(self) -> None:
        """Give the memory back, after `wait` or `cancel`."""
        self._arena.close()

    def cancel(self) -> None:
        """Wait until no read moves bytes, and discard all reads; harmless after `wait`."""
        for ticket in set(self._in_flight) - set(self._store.drop(list(self._in_flight))):
            self._store.cancel(ticket)
        self._in_flight.clear()


def load_resident(
    store: _native.Store,
    files: ExpertFiles,
    runtime: _native.Runtime,
    arithmetic: Arithmetic | None = None,
    *,
    progress: Progress | None = None,
) -> ResidentRunner:
    """Read every expert and wait: `ResidentReading` in one call."""
    reading = ResidentReading(store, files)
    reading.wait(progress)
    return reading.finish(runtime, arithmetic)


class ResidentRunner:
    """Every expert in memory (`load_resident`). A run yields all of its experts at once."""

    elsewhere = None

    def __init__(
        self,
        runtime: _native.Runtime,
        arena: _native.Arena,
        table: _native.ExpertTable,
        *,
        num_experts: int,
        bytes_read: int,
    ) -> None:
        self.resident = table
        self.num_resident = num_experts
        self.parts: dict[int, AdapterParts] = {}  # by adapter
        self._runtime = runtime
        self._arena = arena
        self._bytes_read = bytes_read
        self._compute_s = 0.0

    @property
    def stats(self) -> RunnerStats:
        runs = self.resident.num_runs  # the native stack runs experts by itself, so the table counts
        return RunnerStats(
            runs,
            runs,
            self._bytes_read,
            compute_s=self._compute_s,
            decode_lookups=runs,
            decode_hits=runs,
        )

    @contextmanager
    def run(
        self, layer: int, dispatch: _native.Dispatch, rows: Rows, out: Rows
    ) -> Iterator[Iterator[Sequence[int]]]:
        yield self._groups(layer, dispatch, rows, out)

    def _groups(
        self, layer: int, dispatch: _native.Dispatch, rows: Rows, out: Rows
    ) -> Iterator[Sequence[int]]:
        experts = dispatch.experts
        self._compute_s += self.resident.run(self._runtime, layer, experts, dispatch, rows, out)
        yield experts

    def set_adapter(self, number: int, parts: AdapterParts | None) -> None:
        """From the next step on, an adapter's tokens have these parts beside their experts; earlier ones are freed."""
        if parts is not None:
            parts.load_all()
        self.resident.set_adapter(number, None if parts is None else parts.adapter)
        replace_parts(self.parts, number, parts)

    def wants_guess(self, *, is_sweep: bool) -> bool:
        return False

    def guess(self, layer: int, by_rank: Sequence[Sequence[int]], *, is_sweep: bool) -> None:
        pass

    def close(self) -> None:
        self._arena.close()
        for parts in self.parts.values():
            parts.close()

    def give_back(self) -> None:
        """Close, and return the memory to the system at once, even if something else still holds the table."""
        self._arena.resize(0)
        self.parts.clear()
        self._arena.close()
