"""Where experts lie in their files and in memory: reads of whole experts, and the table that finds them afterwards.

    checkpoint's records  ->  places in an arena  ->  reads, and `_native.ExpertTable`

Elsewhere: `checkpoint/` describes the bytes on disk; `native/store` reads; `cache.py` decides which expert gets a slot.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import ExpertRecord, ExpertRecords
from argosy.checkpoint.formats import round_up
from argosy.errors import ArgosyError, CheckpointError, CorruptRecord, ReadFailed

Key = tuple[int, int]  # (layer, expert)
Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """The arithmetic of experts, apart from their weights.

    activation: between the products of an expert.
    biases: by layer, the biases of gate and up, float32 [experts, width], and of down, [experts, hidden]; or None.
    activations: by layer, those that differ; None: they do not.
    """

    activation: _native.Activation = ("silu", 0.0, 0.0)
    biases: Mapping[int, tuple[Vector | None, Vector | None, Vector | None]] = field(default_factory=dict)
    activations: Mapping[int, _native.Activation | None] = field(default_factory=dict)


LARGEST_ALIGNMENT = 4096  # the alignment of reads, in bytes, that a plan assumes before files are opened
MATRIX_ALIGNMENT = _native.MATRIX_ALIGNMENT  # where a transcoded matrix may begin


def _lay_out(record: ExpertRecord, alignment: int) -> tuple[list[int], int]:
    """Return the place of each piece in an expert's memory, and the size of that memory.

    A piece that completes another takes no memory; for the others see `Piece.place_bytes`.
    """
    places: list[int] = []
    end = 0
    for piece in record.pieces:
        if piece.completes is not None:
            place = places[piece.completes]
        else:
            place = round_up(end, MATRIX_ALIGNMENT if piece.transcode else alignment)
            end = place + piece.place_bytes(alignment)
        places.append(place)
    return places, end


def _starts_at(record: ExpertRecord, alignment: int) -> int:
    """The required alignment of an expert's place in an arena."""
    return MATRIX_ALIGNMENT if all(piece.transcode for piece in record.pieces) else alignment


def memory_of(record: ExpertRecord, alignment: int = LARGEST_ALIGNMENT) -> int:
    """Return the bytes of an expert in memory."""
    return _lay_out(record, alignment)[1]


def resident_bytes(records: Mapping[Key, ExpertRecord], alignment: int = LARGEST_ALIGNMENT) -> int:
    """Return the bytes of an arena that holds every expert, one after another."""
    end = 0
    for run in ExpertRecords.of(records).runs():
        starts_at, nbytes = _starts_at(run.record, alignment), memory_of(run.record, alignment)
        end = round_up(end, starts_at) + (run.num_experts - 1) * round_up(nbytes, starts_at) + nbytes
    return end


# Upper bounds for the bytes of Python objects per expert: a `Record` with its entry in nanobind's table of instances;
# and while all experts are read at once, the pairs, places and tickets of `ResidentReading`.
_RECORD_OBJECT_BYTES = 192
_READING_BYTES = 256


def dict_bytes(num_entries: int) -> int:
    """Return the bytes of a dict that grew to `num_entries`, not counting its keys and values."""
    return sys.getsizeof(dict.fromkeys(range(num_entries)))


def bookkeeping_bytes(records: Mapping[Key, ExpertRecord]) -> int:
    """Return the most bytes that `ExpertFiles` and a table can hold in addition to the records."""
    kinds: Counter[tuple[int, bool]] = Counter()
    for _, _, count, record in ExpertRecords.of(records).runs():
        kinds[len(record.pieces), record.pieces[0].checksum is not None] += count
    native = sum(count * _native.record_bytes(*kind) for kind, count in kinds.items())
    num_layers, num_experts = _extent(records)
    # The table holds an expert's place and the starts of its matrices.
    tables = (1 + 3) * np.dtype(np.int64).itemsize * num_layers * num_experts
    return tables + native + len(records) * _RECORD_OBJECT_BYTES + dict_bytes(len(records))


def resident_bookkeeping_bytes(records: Mapping[Key, ExpertRecord]) -> int:
    """Return the most bytes that reading every expert takes in addition to the arena, from `ResidentReading` on."""
    kinds: Counter[tuple[int, ...]] = Counter()
    for run in ExpertRecords.of(records).runs():
        kinds[tuple(piece.nbytes for piece in run.record.pieces)] += run.num_experts
    requests = sum(count * _native.request_bytes(sizes) for sizes, count in kinds.items())
    in_python = len(records) * _READING_BYTES + 2 * dict_bytes(len(records))
    return bookkeeping_bytes(records) + requests + in_python


def _extent(records: Mapping[Key, ExpertRecord]) -> tuple[int, int]:
    """Return the layers and experts per layer of a table with a place for each record."""
    return 1 + max((key[0] for key in records), default=-1), 1 + max((key[1] for key in records), default=-1)


class ExpertFiles:
    """Knows the layout of an expert record in memory, and starts reads of several records.

    Args:
        records: where every expert of the model is stored.
        share: the experts that this process reads; None: all of them. `self.records` holds only these.
    """

    def __init__(
        self,
        store: _native.Store,
        records: Mapping[Key, ExpertRecord],
        *,
        open_file: Callable[[str], int],
        share: Collection[Key] | None = None,
    ) -> None:
        self.records = records if share is None else {key: records[key] for key in share}
        self._all_records = records  # the table has a row for every expert, wherever it runs
        self._store = store
        paths = {str(path) for path in ExpertRecords.of(self.records).paths}
        self._file_ids = {path: open_file(path) for path in sorted(paths)}
        self._reads: dict[Key, _native.Record] = {}
        self.alignment = max(store.info(file_id)[2] for file_id in self._file_ids.values())

    def table(self, arena: _native.Arena, arithmetic: Arithmetic) -> _native.ExpertTable:
        """Create the table of experts in an arena; no expert has a place yet."""
        some = next(iter(self._all_records.values()))
        table = _native.ExpertTable(arena, hidden=some.up.cols, activation=arithmetic.activation)
        for layer, starts in self._starts().items():
            one = self._all_records[layer, 0]
            gate_bias, up_bias, down_bias = arithmetic.biases.get(layer, (None, None, None))
            table.add_layer(
                layer,
                formats=one.formats,
                width=one.up.rows,
                starts=np.array(starts, np.int64),
                gate_bias=gate_bias,
                up_bias=up_bias,
                down_bias=down_bias,
                activation=arithmetic.activations.get(layer),
            )
        return table

    def _starts(self) -> dict[int, list[list[int]]]:
        """Return, by layer, the offsets in bytes of each expert's matrices from its place."""
        found: dict[int, list[list[int]]] = {}
        for layer, _, count, record in ExpertRecords.of(self._all_records).runs():
            places, _ = _lay_out(record, self.alignment)
            pieces = zip(record.pieces, places, strict=True)
            starts = [place + piece.inset(self.alignment) for piece, place in pieces]
            one = [starts[matrix.piece] + matrix.offset for matrix in record.matrices]
            found.setdefault(layer, []).extend([one] * count)
        return found

    def expert_bytes(self, key: Key) -> int:
        """Return the bytes read for one expert."""
        return self.records[key].nbytes

    def places(self) -> tuple[dict[Key, int], int]:
        """Return each expert's place when one arena holds all, one after another, and the size of that arena."""
        places, end = {}, 0
        for layer, first, count, record in ExpertRecords.of(self.records).runs():
            starts_at, nbytes = _starts_at(record, self.alignment), memory_of(record, self.alignment)
            for expert in range(first, first + count):
                places[layer, expert] = round_up(end, starts_at)
                end = places[layer, expert] + nbytes
        return places, end

    def fetch(
        self, arena: _native.Arena, experts: Sequence[tuple[Key, int]], *, urgency: _native.Urgency = "now"
    ) -> list[int]:
        """Start reading (expert, place in the arena) pairs; return the store's tickets, all or none."""
        return self._store.fetch_many(arena, [(self.read(key), place) for key, place in experts], urgency)

    def reads(self, arena: _native.Arena) -> _native.ExpertReads:
        """Describe the reads of experts into the slots of a cache."""
        return _native.StoreReads(self._store, arena, self.read)

    def read(self, key: Key) -> _native.Record:
        """Return how to read an expert; created on first use."""
        if (known := self._reads.get(key)) is not None:
            return known
        record = self.records[key]
        places, _ = _lay_out(record, self.alignment)
        pieces = [
            piece.read_into(place, self._file_ids[str(piece.path)])
            for piece, place in zip(record.pieces, places, strict=True)
        ]
        checksums = [piece.checksum for piece in record.pieces if piece.checksum is not None]
        self._reads[key] = made = _native.Record(pieces, checksums or None)
        return made

    def failure(self, key: Key, message: str, kind: str | None) -> ArgosyError:
        """Return the error for a failed read; it names file, layer and expert."""
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
