"""The seam between layers and weights: ask for experts, get a lease.

    router  ->  expert source  ->  kernel

A layer asks for the experts its tokens chose. The lease hands them over in groups: first all that are in memory,
then each group as it lands, so that reading and computing overlap. Weights of a group stay where they are until the
next group is asked for, or the lease ends. What is resident decides how fast a token comes, never which token comes.

`ResidentSource` holds every expert; `cache.CachedSource` holds what the budget allows. A model can be tested with
any other object that has `lease`.

Elsewhere: choosing experts is `model/router`; the bytes on disk are `checkpoint/`; reading is `native/store`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import ExpertRecord
from argosy.checkpoint.manifest import round_up
from argosy.config import Format
from argosy.errors import ArgosyError, CorruptRecord, ReadFailed

Key = tuple[int, int]  # (layer, expert)
Progress = Callable[[str, float], None]  # what is going on, and the share done from 0 to 1


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """Experts that can be computed now.

    expert_ids: as asked for.   offsets: int64 [experts, 3], bytes from the arena's start to gate, up and down.
    """

    expert_ids: Sequence[int]
    offsets: NDArray[np.int64]


class Lease(Protocol):
    """A promise that weights stay until given back: iterate once, inside `with`."""

    def __enter__(self) -> Lease: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __iter__(self) -> Iterator[ExpertGroup]: ...


@dataclass(slots=True)
class SourceStats:
    """Counters since the source was made; `hits / lookups` is the hit rate."""

    lookups: int = 0
    hits: int = 0
    bytes_read: int = 0


class ExpertSource(Protocol):
    """Where leased experts lie (`arena`, in `format`), and how to get a lease."""

    @property
    def arena(self) -> _native.Arena: ...

    @property
    def format(self) -> Format: ...

    @property
    def stats(self) -> SourceStats: ...

    def lease(self, layer: int, expert_ids: Sequence[int], scan: Collection[int] = ()) -> Lease:
        """Lease experts of a layer, each named once.

        `scan` names those that only prompt tokens asked for: they pass through the cache without displacing what
        decode uses.
        """
        ...

    def close(self) -> None: ...


LARGEST_ALIGNMENT = 4096  # of reads, in bytes; what a plan assumes before a file is opened


def slot_regions(records: Mapping[Key, ExpertRecord], alignment: int = LARGEST_ALIGNMENT) -> list[int]:
    """Bytes that each piece of an expert takes in a slot; their sum is the size of a slot.

    A piece is read outwards to whole blocks of `alignment` bytes (O_DIRECT asks for it), so its data begin up to a
    block into its region.
    """
    num_pieces = len(next(iter(records.values())).pieces) if records else 0
    return [
        max(
            round_up(record.pieces[i].offset % alignment + record.pieces[i].nbytes, alignment)
            for record in records.values()
        )
        for i in range(num_pieces)
    ]


class ExpertFiles:
    """Knows how one expert record lies in a slot, and starts reads into one."""

    def __init__(
        self, store: _native.Store, records: Mapping[Key, ExpertRecord], *, open_file: Callable[[str], int]
    ) -> None:
        self._store = store
        self._records = records
        first = next(iter(records.values()))
        self.format: Format = first.gate.format
        self._file_ids = {str(piece.path): 0 for record in records.values() for piece in record.pieces}
        for path in self._file_ids:
            self._file_ids[path] = open_file(path)
        self.alignment = max(store.info(file_id)[2] for file_id in self._file_ids.values())
        self._region_bytes = slot_regions(records, self.alignment)
        self.slot_bytes = sum(self._region_bytes)

    def expert_bytes(self, key: Key) -> int:
        return self._records[key].nbytes

    def fetch(self, arena: _native.Arena, slot: int, key: Key) -> int:
        """Start reading an expert into a slot; returns the store's ticket."""
        pieces, checksums, dest = [], [], slot * self.slot_bytes
        for piece, region in zip(self._records[key].pieces, self._region_bytes, strict=True):
            pieces.append((self._file_ids[str(piece.path)], piece.offset, piece.nbytes, dest))
            if piece.checksum is not None:
                checksums.append(piece.checksum)
            dest += region
        return self._store.fetch(arena, pieces, checksums or None)

    def offsets(self, slot: int, key: Key) -> tuple[int, int, int]:
        """Bytes from the arena's start to gate, up and down of an expert that lies in a slot."""
        record = self._records[key]
        starts, dest = [], slot * self.slot_bytes
        for piece, region in zip(record.pieces, self._region_bytes, strict=True):
            starts.append(dest + piece.offset % self.alignment)
            dest += region
        gate, up, down = record.gate, record.up, record.down
        return (
            starts[gate.piece] + gate.offset,
            starts[up.piece] + up.offset,
            starts[down.piece] + down.offset,
        )

    def failure(self, key: Key, message: str, kind: str | None) -> ArgosyError:
        """The sentence for a read that failed, naming file, layer and expert."""
        layer, expert = key
        pieces = self._records[key].pieces
        where = f"{pieces[0].path.name}: layer {layer}, expert {expert}"
        if kind == "checksum":
            return CorruptRecord(
                f"{where}: the bytes do not match their checksum ({message})",
                hint="the file changed after it was packed; pack the checkpoint again, or check the drive",
                path=str(pieces[0].path),
                layer=layer,
                expert=expert,
            )
        return ReadFailed(
            f"{where}: {message}",
            path=str(pieces[0].path),
            offset=pieces[0].offset,
            layer=layer,
            expert=expert,
        )


class ResidentSource:
    """Every expert in memory, read once at start; a lease is then a look-up."""

    def __init__(
        self,
        store: _native.Store,
        files: ExpertFiles,
        records: Mapping[Key, ExpertRecord],
        *,
        progress: Progress | None = None,
    ) -> None:
        self.format = files.format
        self.stats = SourceStats()
        self.arena = _native.Arena(max(1, files.slot_bytes * len(records)))
        self._slot_of = {key: slot for slot, key in enumerate(records)}
        num_experts = 1 + max(expert for _, expert in records)
        num_layers = 1 + max(layer for layer, _ in records)
        self._offsets = np.zeros((num_layers, num_experts, 3), np.int64)
        in_flight: dict[int, Key] = {}
        waiting = iter(self._slot_of.items())
        num_landed = 0
        try:
            while num_landed < len(records):
                # A few dozen reads in flight keep every reader busy; more would only lengthen a clean-up after ^C.
                while len(in_flight) < 32 and (following := next(waiting, None)) is not None:
                    key, slot = following
                    in_flight[files.fetch(self.arena, slot, key)] = key
                for ticket, message, kind in store.wait_any(list(in_flight)):
                    key = in_flight.pop(ticket)
                    if message is not None:
                        raise files.failure(key, message, kind)
                    self._offsets[key] = files.offsets(self._slot_of[key], key)
                    self.stats.bytes_read += files.expert_bytes(key)
                    num_landed += 1
                if progress is not None:
                    progress("reading experts", num_landed / len(records))
        finally:
            for ticket in in_flight:
                store.cancel(ticket)

    def lease(self, layer: int, expert_ids: Sequence[int], scan: Collection[int] = ()) -> Lease:
        self.stats.lookups += len(expert_ids)
        self.stats.hits += len(expert_ids)
        return _ResidentLease(ExpertGroup(expert_ids, self._offsets[layer, list(expert_ids)]))

    def close(self) -> None:
        self.arena.close()


class _ResidentLease:
    def __init__(self, group: ExpertGroup) -> None:
        self._group = group

    def __enter__(self) -> _ResidentLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def __iter__(self) -> Iterator[ExpertGroup]:
        yield self._group
