"""The seam between layers and weights: ask for experts, get a lease.

    router  ->  expert source  ->  kernel

A layer asks for the experts its tokens chose. The lease hands them over in groups: first all that are in memory,
then each group as it lands, so that reading and computing overlap. Weights of a group stay where they are until the
next group is asked for, or the lease ends. What is resident decides how fast a token comes, never which token comes.

`ResidentSource` holds every expert; `cache.CachedSource` holds what the budget allows. A model can be tested with
any other object that has these methods.

Elsewhere: choosing experts is `native/kernels/route.h`; the bytes on disk are `checkpoint/`; reading is `native/store`.
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
Progress = Callable[[str, float], None]  # what is going on, and the share done from 0 to 1


class Lease(Protocol):
    """A promise that weights stay until given back: iterate once, inside `with`, over groups of experts.

    The experts of a group, named as they were asked for, can be computed now; they lie where the source's `offsets`
    say.
    """

    def __enter__(self) -> Lease: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __iter__(self) -> Iterator[Sequence[int]]: ...


@dataclass(slots=True)
class SourceStats:
    """Counters since the source was made; `hits / lookups` is the hit rate.

    A miss whose read was under way before the lease asked counts in `reads_ahead`; what was read ahead for nothing
    counts in `idle_reads`. `bytes_read` has both.
    """

    lookups: int = 0
    hits: int = 0
    bytes_read: int = 0
    reads_ahead: int = 0
    idle_reads: int = 0


class ExpertSource(Protocol):
    """Where leased experts lie (`arena`), in which formats, and how to get a lease."""

    @property
    def arena(self) -> _native.Arena: ...

    @property
    def stats(self) -> SourceStats: ...

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Bytes from the arena's start to gate, up and down: int64 [layers, experts, 3].

        Always the same array; it says where an expert lies from when a lease hands it over until that lease ends.
        """
        ...

    @property
    def is_resident(self) -> bool:
        """Whether every expert is in memory for good; then `offsets` never change, and nobody needs a lease."""
        ...

    @property
    def num_resident(self) -> int:
        """How many experts are in memory, or on their way there."""
        ...

    def formats(self, layer: int) -> tuple[Format, Format, Format]:
        """The formats of gate, up and down of a layer's experts."""
        ...

    def lease(self, layer: int, expert_ids: Sequence[int], scan: Collection[int] = ()) -> Lease:
        """Lease experts of a layer, each named once.

        `scan` names those that only prompt tokens asked for: they pass through the cache without displacing what
        decode uses.
        """
        ...

    def wants_guess(self, *, is_sweep: bool) -> bool:
        """Whether it would do something with a guess in this step."""
        ...

    def guess(self, layer: int, by_rank: Sequence[Sequence[int]], *, is_sweep: bool) -> None:
        """Say what the next lease may ask for, while the present one is open, so that its reads can begin.

        Never waits. What a token alone needs is read while the drive has little else to do; a prompt needs most of a
        layer, so what is guessed in a sweep is read right behind what is needed now, and passes through as a scan does.

        Args:
            by_rank: the experts that routers rank first, those that they rank second and not first ...
        """
        ...

    def count_resident(self, lookups: int) -> None:
        """Count experts that were used without a lease."""
        ...

    def close(self) -> None: ...


LARGEST_ALIGNMENT = 4096  # of reads, in bytes; what a plan assumes before a file is opened
MATRIX_ALIGNMENT = 64  # where a transcoded matrix may begin


def _lay_out(record: ExpertRecord, alignment: int) -> tuple[list[int], int]:
    """Where each piece of an expert goes in its memory, and how much memory that is.

    A plain piece is read outwards to whole blocks of `alignment` bytes (O_DIRECT asks for it), so its data begin up to
    a block behind its place. A transcoded one takes exactly its matrices, where it does not complete those of another.
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
    """What the place of an expert in an arena must be a multiple of."""
    return MATRIX_ALIGNMENT if all(piece.transcode for piece in record.pieces) else alignment


def slot_bytes(records: Mapping[Key, ExpertRecord], alignment: int = LARGEST_ALIGNMENT) -> int:
    """Bytes of a slot that can hold any expert: those of the largest.

    Where formats differ from layer to layer (Q4_K_M files keep some `down` in Q6_K), smaller experts leave part of it
    unused.
    """
    return round_up(
        max((_lay_out(record, alignment)[1] for record in records.values()), default=0), alignment
    )


def resident_bytes(records: Mapping[Key, ExpertRecord], alignment: int = LARGEST_ALIGNMENT) -> int:
    """Bytes of an arena that holds every expert, one behind the other."""
    end = 0
    for record in records.values():
        end = round_up(end, _starts_at(record, alignment)) + _lay_out(record, alignment)[1]
    return end


# Most bytes of Python objects for each expert: a `Record` with its entry in nanobind's table of instances; and while
# all of them are read at once, the pairs, places and tickets of `ResidentReading`.
_RECORD_OBJECT_BYTES = 192
_READING_BYTES = 256


def dict_bytes(num_entries: int) -> int:
    """Bytes of a dict that grew to so many entries, its keys and values not included."""
    return sys.getsizeof(dict.fromkeys(range(num_entries)))


def bookkeeping_bytes(records: Mapping[Key, ExpertRecord]) -> int:
    """Most bytes that `ExpertFiles`, and a source's offsets, come to hold beside the records."""
    kinds = Counter((len(r.pieces), r.pieces[0].checksum is not None) for r in records.values())
    native = sum(count * _native.record_bytes(*kind) for kind, count in kinds.items())
    num_layers, num_experts = _extent(records)
    tables = 2 * np.dtype(np.int64).itemsize * 3 * num_layers * num_experts
    return tables + native + len(records) * _RECORD_OBJECT_BYTES + dict_bytes(len(records))


def resident_bookkeeping_bytes(records: Mapping[Key, ExpertRecord]) -> int:
    """Most bytes that reading every expert takes beside the arena, from `ResidentReading` on."""
    kinds = Counter(tuple(piece.nbytes for piece in record.pieces) for record in records.values())
    requests = sum(count * _native.request_bytes(sizes) for sizes, count in kinds.items())
    in_python = len(records) * _READING_BYTES + 2 * dict_bytes(len(records))
    return bookkeeping_bytes(records) + requests + in_python


def _extent(records: Mapping[Key, ExpertRecord]) -> tuple[int, int]:
    """Layers and experts of a table with a place for each record."""
    return 1 + max((key[0] for key in records), default=-1), 1 + max((key[1] for key in records), default=-1)


class ExpertFiles:
    """Knows how an expert record lies in memory, and starts reads of several."""

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
        """Bytes that are read for an expert."""
        return self.records[key].nbytes

    def places(self) -> tuple[dict[Key, int], int]:
        """Where each expert lies when all are in one arena, one behind the other, and the bytes of that arena."""
        places, end = {}, 0
        for key, record in self.records.items():
            places[key] = round_up(end, _starts_at(record, self.alignment))
            end = places[key] + _lay_out(record, self.alignment)[1]
        return places, end

    def fetch(
        self, arena: _native.Arena, experts: Sequence[tuple[Key, int]], *, urgency: _native.Urgency = "now"
    ) -> list[int]:
        """Start reading (expert, its place in the arena); returns the store's tickets, all or none."""
        return self._store.fetch_many(arena, [(self._read(key), place) for key, place in experts], urgency)

    def _read(self, key: Key) -> _native.Record:
        """How to read an expert, made when it is needed first."""
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
        """Bytes from the arena's start to gate, up and down of experts at their places: int64 [layers, experts, 3]."""
        offsets = self.starts.copy()
        for key, place in places.items():
            offsets[key] += place
        return offsets

    def failure(self, key: Key, message: str, kind: str | None) -> ArgosyError:
        """The sentence for a read that failed, naming file, layer and expert."""
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


_WATCHED = 32  # tickets: readers take them in their order, so a few of the oldest tell of the next that lands


class ResidentReading:
    """All experts on their way into memory; whoever waits for them may do something else first.

    Reads are under way once this exists. `finish` or `cancel` ends them.
    """

    def __init__(self, store: _native.Store, files: ExpertFiles) -> None:
        self._store = store
        self._files = files
        places, arena_bytes = files.places()
        self._offsets = files.offsets(places)
        self._arena = _native.Arena(max(1, arena_bytes))
        # All at once: nobody may be here to start the next while the tokenizer is being built.
        self._in_flight = dict(zip(files.fetch(self._arena, list(places.items())), places, strict=True))

    def finish(self, progress: Progress | None = None) -> ResidentSource:
        """Wait for every expert.

        Raises:
            ReadFailed: the drive refused.   CorruptRecord: an expert does not match its checksum.
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
        """Wait until no read moves bytes, and forget them all; harmless after `finish`."""
        for ticket in set(self._in_flight) - set(self._store.drop(list(self._in_flight))):
            self._store.cancel(ticket)
        self._in_flight.clear()


def load_resident(
    store: _native.Store, files: ExpertFiles, *, progress: Progress | None = None
) -> ResidentSource:
    """Read every expert, and wait for it: `ResidentReading`, without a pause."""
    return ResidentReading(store, files).finish(progress)


class ResidentSource:
    """Every expert in memory, read once at start (`load_resident`); a lease is then all of them at once."""

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
