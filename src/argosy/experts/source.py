"""The interface between layers and weights: ask for experts, get a lease.

    router  ->  expert source  ->  kernel

A layer asks for the experts that its tokens chose. The lease hands them over in groups: first all that are resident,
then each group as it lands, so that reading and computing overlap. The weights of a group stay in place until the next
group is requested or the lease ends. What is resident decides how fast a token comes, never which token comes.

`ResidentSource` holds every expert; `cache.CachedSource` holds as many as the budget allows. Tests can use any other
object with these methods.

Elsewhere: `native/kernels/route.h` chooses experts; `checkpoint/` describes the bytes on disk; `native/store` reads.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
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
from argosy.errors import ArgosyError, CheckpointError, CorruptRecord, ReadFailed

Key = tuple[int, int]  # (layer, expert)
Progress = Callable[[str, float], None]  # the current task, and the share done from 0 to 1


class Lease(Protocol):
    """A promise that weights stay until given back: iterate once, inside `with`, over groups of experts.

    The experts of a group, named by their ids, can be computed now; the source's `offsets` say where they are.
    """

    def __enter__(self) -> Lease: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __iter__(self) -> Iterator[Sequence[int]]: ...


@dataclass(slots=True)
class SourceStats:
    """Counters since the source was created; `hits / lookups` is the hit rate.

    A miss whose read had started before the lease asked counts in `reads_ahead`; a read-ahead that was not needed
    counts in `idle_reads`. `bytes_read` includes both.
    """

    lookups: int = 0
    hits: int = 0
    bytes_read: int = 0
    reads_ahead: int = 0
    idle_reads: int = 0


class ExpertSource(Protocol):
    """Gives leases, and says where leased experts are (`arena`, `offsets`) and in which formats."""

    @property
    def arena(self) -> _native.Arena: ...

    @property
    def stats(self) -> SourceStats: ...

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Bytes from the arena's start to gate, up and down: int64 [layers, experts, 3].

        Always the same array. An expert's entry is valid from when a lease hands the expert over until that lease ends.
        """
        ...

    @property
    def is_resident(self) -> bool:
        """Whether every expert stays in memory permanently; then `offsets` never change, and leases are unnecessary."""
        ...

    @property
    def num_resident(self) -> int:
        """How many experts are in memory or being read."""
        ...

    def formats(self, layer: int) -> tuple[Format, Format, Format]:
        """The formats of gate, up and down of a layer's experts."""
        ...

    def lease(self, layer: int, expert_ids: Sequence[int], scan: Collection[int] = ()) -> Lease:
        """Lease experts of a layer, each named once.

        `scan` names the experts that only prompt tokens asked for: they pass through the cache without displacing
        experts that decode uses.
        """
        ...

    def wants_guess(self, *, is_sweep: bool) -> bool:
        """Whether a guess would be of use in this step."""
        ...

    def guess(self, layer: int, by_rank: Sequence[Sequence[int]], *, is_sweep: bool) -> None:
        """Tell which experts the next lease may ask for, while the current one is open, so that their reads can begin.

        Never waits. A guess for decode is read while the drive has little else to do. A prompt needs most of a layer,
        so a guess in a sweep is read right after the experts needed now, and passes through the cache as a scan does.

        Args:
            by_rank: the experts that routers rank first, then those that they rank second and not first ...
        """
        ...

    def count_resident(self, lookups: int) -> None:
        """Count experts that were used without a lease."""
        ...

    def close(self) -> None: ...


LARGEST_ALIGNMENT = 4096  # alignment of reads, in bytes, that a plan assumes before a file is opened
MATRIX_ALIGNMENT = 64  # where a transcoded matrix may begin


def _lay_out(record: ExpertRecord, alignment: int) -> tuple[list[int], int]:
    """The place of each piece in an expert's memory, and the size of that memory.

    A plain piece is rounded outwards to whole blocks of `alignment` bytes, which O_DIRECT requires, so its data begin
    up to a block after its place. A transcoded piece takes exactly its matrices, or nothing if it completes another.
    """
    places: list[int] = []
    end = 0
    for piece in record.pieces:
        if piece.completes is not None:
            place = places[piece.completes]
        elif piece.transcode is not None:
            place = round_up(end, MATRIX_ALIGNMENT)
            end = place + piece.landed_bytes
        else:
            place = round_up(end, alignment)
            end = place + round_up(piece.offset % alignment + piece.nbytes, alignment)
        places.append(place)
    return places, end


def _starts_at(record: ExpertRecord, alignment: int) -> int:
    """The required alignment of an expert's place in an arena."""
    return MATRIX_ALIGNMENT if all(piece.transcode for piece in record.pieces) else alignment


def slot_bytes(records: Mapping[Key, ExpertRecord], alignment: int = LARGEST_ALIGNMENT) -> int:
    """Bytes of a slot that can hold any expert: the size of the largest.

    If formats differ from layer to layer (Q4_K_M files have some `down` in Q6_K), smaller experts leave part of a slot
    unused.
    """
    return round_up(
        max((_lay_out(record, alignment)[1] for record in records.values()), default=0), alignment
    )


def resident_bytes(records: Mapping[Key, ExpertRecord], alignment: int = LARGEST_ALIGNMENT) -> int:
    """Bytes of an arena that holds every expert, one after another."""
    end = 0
    for record in records.values():
        end = round_up(end, _starts_at(record, alignment)) + _lay_out(record, alignment)[1]
    return end


# Upper bounds for the bytes of Python objects per expert: a `Record` with its entry in nanobind's table of instances;
# and while all experts are read at once, the pairs, places and tickets of `ResidentReading`.
_RECORD_OBJECT_BYTES = 192
_READING_BYTES = 256


def dict_bytes(num_entries: int) -> int:
    """Bytes of a dict that grew to `num_entries`, not counting its keys and values."""
    return sys.getsizeof(dict.fromkeys(range(num_entries)))


def bookkeeping_bytes(records: Mapping[Key, ExpertRecord]) -> int:
    """Most bytes that `ExpertFiles` and a source's offsets can hold in addition to the records."""
    kinds = Counter((len(r.pieces), r.pieces[0].checksum is not None) for r in records.values())
    native = sum(count * _native.record_bytes(*kind) for kind, count in kinds.items())
    num_layers, num_experts = _extent(records)
    tables = 2 * np.dtype(np.int64).itemsize * 3 * num_layers * num_experts
    return tables + native + len(records) * _RECORD_OBJECT_BYTES + dict_bytes(len(records))


def resident_bookkeeping_bytes(records: Mapping[Key, ExpertRecord]) -> int:
    """Most bytes that reading every expert takes in addition to the arena, from `ResidentReading` on."""
    kinds = Counter(tuple(piece.nbytes for piece in record.pieces) for record in records.values())
    requests = sum(count * _native.request_bytes(sizes) for sizes, count in kinds.items())
    in_python = len(records) * _READING_BYTES + 2 * dict_bytes(len(records))
    return bookkeeping_bytes(records) + requests + in_python


def _extent(records: Mapping[Key, ExpertRecord]) -> tuple[int, int]:
    """The layers and experts of a table that has a place for each record."""
    return 1 + max((key[0] for key in records), default=-1), 1 + max((key[1] for key in records), default=-1)


class ExpertFiles:
    """Knows the layout of an expert record in memory, and starts reads of several records."""

    def __init__(
        self, store: _native.Store, records: Mapping[Key, ExpertRecord], *, open_file: Callable[[str], int]
    ) -> None:
        self.records = records
        self._store = store
        paths = {str(piece.path) for record in records.values() for piece in record.pieces}
        self._file_ids = {path: open_file(path) for path in sorted(paths)}
        self._reads: dict[Key, _native.Record] = {}
        self.alignment = max(store.info(file_id)[2] for file_id in self._file_ids.values())
        num_layers, num_experts = _extent(records)
        self._formats = {layer: record.formats for (layer, _), record in records.items()}
        # int64 [layers, experts, 3]: bytes from an expert's place to gate, up and down.
        self.starts = np.zeros((num_layers, num_experts, 3), np.int64)
        self.slot_bytes = slot_bytes(records, self.alignment)
        for key, record in records.items():
            places, _ = _lay_out(record, self.alignment)
            starts = [
                place if piece.transcode else place + piece.offset % self.alignment
                for piece, place in zip(record.pieces, places, strict=True)
            ]
            self.starts[key] = [
                starts[matrix.piece] + matrix.offset for matrix in (record.gate, record.up, record.down)
            ]

    def formats(self, layer: int) -> tuple[Format, Format, Format]:
        return self._formats[layer]

    def expert_bytes(self, key: Key) -> int:
        """Bytes that are read for one expert."""
        return self.records[key].nbytes

    def places(self) -> tuple[dict[Key, int], int]:
        """The place of each expert when all are in one arena, one after another, and the size of that arena."""
        places, end = {}, 0
        for key, record in self.records.items():
            places[key] = round_up(end, _starts_at(record, self.alignment))
            end = places[key] + _lay_out(record, self.alignment)[1]
        return places, end

    def fetch(
        self, arena: _native.Arena, experts: Sequence[tuple[Key, int]], *, urgency: _native.Urgency = "now"
    ) -> list[int]:
        """Start reading (expert, place in the arena) pairs; return the store's tickets, all or none."""
        return self._store.fetch_many(arena, [(self._read(key), place) for key, place in experts], urgency)

    def _read(self, key: Key) -> _native.Record:
        """How to read an expert, created on first use."""
        if (known := self._reads.get(key)) is not None:
            return known
        record = self.records[key]
        places, _ = _lay_out(record, self.alignment)
        pieces: list[_native.Piece] = []
        checksums = []
        for piece, at in zip(record.pieces, places, strict=True):
            where = (self._file_ids[str(piece.path)], piece.offset, piece.nbytes, at)
            if (blocks := piece.transcode) is not None:
                pieces.append((*where, blocks.block_type, blocks.rows, blocks.cols, blocks.interleaved))
            else:
                pieces.append(where)
            if piece.checksum is not None:
                checksums.append(piece.checksum)
        self._reads[key] = made = _native.Record(pieces, checksums or None)
        return made

    def offsets(self, places: Mapping[Key, int]) -> NDArray[np.int64]:
        """Bytes from the arena's start to gate, up and down of the experts at `places`: int64 [layers, experts, 3]."""
        offsets = self.starts.copy()
        for key, place in places.items():
            offsets[key] += place
        return offsets

    def failure(self, key: Key, message: str, kind: str | None) -> ArgosyError:
        """The error for a failed read, naming file, layer and expert."""
        layer, expert = key
        pieces = self.records[key].pieces
        where = f"{pieces[0].path.name}: layer {layer}, expert {expert}"
        if kind == "checksum":
            return CorruptRecord(
                f"{where}: the bytes do not match their checksum ({message})",
                hint="the file changed after it was packed; pack the checkpoint again, or check the drive",
                path=str(pieces[0].path),
                layer=layer,
                expert=expert,
            )
        if kind == "not finite":
            return CheckpointError(
                f"layer {layer}, expert {expert}: {message}",
                hint="the file is damaged; download it again",
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


_WATCHED = 32  # tickets: readers take them in order, so the next to land is among the few oldest


class ResidentReading:
    """Reads all experts into memory while the caller does something else.

    Reads start when this is created. `finish` or `cancel` ends them.
    """

    def __init__(self, store: _native.Store, files: ExpertFiles) -> None:
        self._store = store
        self._files = files
        places, arena_bytes = files.places()
        self._offsets = files.offsets(places)
        self._arena = _native.Arena(max(1, arena_bytes))
        # All at once: nothing may run here to start the next read while the tokenizer is being built.
        self._in_flight = dict(zip(files.fetch(self._arena, list(places.items())), places, strict=True))

    def finish(self, progress: Progress | None = None) -> ResidentSource:
        """Wait for every expert.

        Raises:
            ReadFailed: the drive failed.   CorruptRecord: an expert does not match its checksum.
        """
        num_experts, bytes_read = len(self._in_flight), 0
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
                    bytes_read += self._files.expert_bytes(key)
                if progress is not None:
                    progress("reading experts", 1 - len(self._in_flight) / num_experts)
        finally:
            self.cancel()
        return ResidentSource(self._files, self._arena, self._offsets, bytes_read)

    def cancel(self) -> None:
        """Wait until no read moves bytes, and discard all reads; harmless after `finish`."""
        for ticket in set(self._in_flight) - set(self._store.drop(list(self._in_flight))):
            self._store.cancel(ticket)
        self._in_flight.clear()


def load_resident(
    store: _native.Store, files: ExpertFiles, *, progress: Progress | None = None
) -> ResidentSource:
    """Read every expert and wait: `ResidentReading` in one call."""
    return ResidentReading(store, files).finish(progress)


class ResidentSource:
    """Every expert in memory, read once at start (`load_resident`); a lease hands over all of its experts at once."""

    is_resident = True

    def __init__(
        self, files: ExpertFiles, arena: _native.Arena, offsets: NDArray[np.int64], bytes_read: int
    ) -> None:
        self.stats = SourceStats(bytes_read=bytes_read)
        self.arena = arena
        self.offsets = offsets
        self._files = files

    @property
    def num_resident(self) -> int:
        return len(self._files.records)

    def formats(self, layer: int) -> tuple[Format, Format, Format]:
        return self._files.formats(layer)

    def lease(self, layer: int, expert_ids: Sequence[int], scan: Collection[int] = ()) -> Lease:
        self.count_resident(len(expert_ids))
        return _ResidentLease(expert_ids)

    def wants_guess(self, *, is_sweep: bool) -> bool:
        return False

    def guess(self, layer: int, by_rank: Sequence[Sequence[int]], *, is_sweep: bool) -> None:
        pass

    def count_resident(self, lookups: int) -> None:
        self.stats.lookups += lookups
        self.stats.hits += lookups

    def close(self) -> None:
        self.arena.close()


class _ResidentLease:
    def __init__(self, expert_ids: Sequence[int]) -> None:
        self._expert_ids = expert_ids

    def __enter__(self) -> _ResidentLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def __iter__(self) -> Iterator[Sequence[int]]:
        yield self._expert_ids
