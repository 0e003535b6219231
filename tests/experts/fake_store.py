"""A store without threads or files: the test decides in which order reads land, and which of them fail.

A read scribbles over its destination when it starts and delivers the bytes when it lands, so weights that move while
still in use are detected.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import ExpertMatrix, ExpertRecord
from argosy.checkpoint.landing import Piece
from argosy.experts.files import ExpertFiles, Key
from tests.native import _native_testing

WIDTH, HIDDEN = 3, 5
MATRIX_BYTES = WIDTH * HIDDEN * 4
RUNTIME = _native.Runtime(1)
PiecePlace = tuple[int, int, int, int]  # file id, offset, nbytes, destination


def make_records(
    keys: list[Key], *, num_pieces: int, start: int = 3, gap: int = 7
) -> tuple[dict[Key, ExpertRecord], dict[str, NDArray[np.uint8]]]:
    """Make records of experts whose gate, up and down lie in 1, 2 or 3 pieces, and the content of their file."""
    path = Path("experts.bin")
    records: dict[Key, ExpertRecord] = {}
    offset = start
    for key in keys:
        sizes = {1: [3], 2: [2, 1], 3: [1, 1, 1]}[num_pieces]
        pieces, matrices = [], []
        for i, count in enumerate(sizes):
            pieces.append(Piece(path, offset, count * MATRIX_BYTES))
            matrices += [(i, j * MATRIX_BYTES) for j in range(count)]
            offset += count * MATRIX_BYTES + gap
        shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
        gate, up, down = (
            ExpertMatrix(*place, "f32", *shape) for place, shape in zip(matrices, shapes, strict=True)
        )
        records[key] = ExpertRecord(tuple(pieces), gate, up, down)
    rng = np.random.default_rng(0)
    content = rng.integers(0, 256, offset + 100, np.uint8)
    for record in records.values():
        for piece in record.pieces:
            weights = rng.standard_normal(piece.nbytes // 4, np.float32)
            content[piece.offset : piece.offset + piece.nbytes] = weights.view(np.uint8)
    return records, {str(path): content}


class Truth:
    """The outputs of experts, computed directly from the content of their file."""

    ROW = np.array([[0.5, -1.0, 2.0, 0.25, -3.0]], np.float32)

    def __init__(self, records: dict[Key, ExpertRecord], files: dict[str, NDArray[np.uint8]]) -> None:
        self._records, self._files = records, files
        self._outputs: dict[Key, list[float]] = {}

    def _output(self, key: Key) -> list[float]:
        if key not in self._outputs:
            record, out = self._records[key], np.empty((1, HIDDEN), np.float32)
            gate, up, down = (
                _native.Matrix(
                    self._files[str(record.pieces[one.piece].path)],
                    record.pieces[one.piece].offset + one.offset,
                    one.format,
                    one.rows,
                    one.cols,
                )
                for one in record.matrices
            )
            _native_testing.swiglu(RUNTIME, gate, up, down, self.ROW, out)
            self._outputs[key] = out[0].tolist()
        return self._outputs[key]

    def check(self, table: _native.ExpertTable, layer: int, experts: Sequence[int]) -> None:
        """Check that the experts' bytes are where the table says: running them now gives their own outputs."""
        dispatch, rows, out = inputs(experts)
        table.run(RUNTIME, layer, experts, dispatch, rows, out)
        self.check_outputs(layer, experts, dispatch, out)

    def check_outputs(
        self, layer: int, experts: Sequence[int], dispatch: _native.Dispatch, out: NDArray[np.float32]
    ) -> None:
        for expert in experts:
            (row,) = dispatch.assignments(expert)
            assert out[row].tolist() == self._output((layer, expert))


def inputs(
    experts: Sequence[int], scan: Collection[int] = ()
) -> tuple[_native.Dispatch, NDArray[np.float32], NDArray[np.float32]]:
    """Make a dispatch of one token per expert, its rows and room for outputs; prompt tokens chose those in `scan`."""
    choices = np.array(experts, np.int32)[:, None]
    is_decode = np.array([expert not in scan for expert in experts])
    rows = np.repeat(Truth.ROW, len(experts), axis=0)
    return _native.Dispatch(choices, is_decode, max(experts) + 1), rows, np.full_like(rows, np.nan)


class FakeStore:
    """Keeps the promises of `_native.Store`, with everything under the test's control.

    fail: (num_fetches so far) -> (message, kind) or None.   refuse: the number of a fetch that raises at once.
    begun: the share of reads that a reader begins as soon as they are requested.   given_up: the share of those
        that can still be dropped midway.
    """

    def __init__(
        self,
        files: dict[str, NDArray[np.uint8]],
        *,
        seed: int = 0,
        alignment: int = 64,
        fail: Callable[[int], tuple[str, str] | None] = lambda number: None,
        refuse: int | None = None,
        begun: float = 0.0,
        given_up: float = 0.0,
    ) -> None:
        self.alignment = alignment
        self.in_flight: dict[int, tuple[Any, list[PiecePlace]]] = {}
        self.log: list[tuple[str, int]] = []
        self.num_fetches = 0
        self.most_in_flight = 0
        self._paths = list(files)
        self._files = files
        self._random = random.Random(seed)
        self._fail = fail
        self._refuse = refuse
        self._begun_share = begun
        self._given_up_share = given_up
        self._begun: set[int] = set()
        self._given_up: set[int] = set()  # dropped midway
        self.ahead: set[int] = set()  # tickets that nothing waited for when they were requested
        self.guessed: set[int] = set()  # those of `ahead` that were guesses
        self.hurried: set[int] = set()

    def open(self, path: str) -> int:
        return self._paths.index(path)

    def info(self, file_id: int) -> tuple[str, int, int, bool, str]:
        path = self._paths[file_id]
        return path, len(self._files[path]), self.alignment, True, ""

    def fetch_many(
        self, arena: Any, records: list[tuple[_native.Record, int]], urgency: _native.Urgency = "now"
    ) -> list[int]:
        first = self.num_fetches + 1
        self.num_fetches += len(records)
        if self._refuse in range(first, first + len(records)):
            raise OSError("no")
        tickets = list(range(first, first + len(records)))
        for ticket, (record, base) in zip(tickets, records, strict=True):
            pieces = [
                (file_id, offset, nbytes, base + dest) for file_id, offset, nbytes, dest in record.pieces
            ]
            for file_id, offset, nbytes, dest in pieces:
                assert dest % self.alignment == 0
                begin, end = self._outwards(offset, nbytes)
                assert dest + end - begin <= arena.nbytes
                self._view(arena, dest, end - begin)[:] = 0xEE
                assert 0 <= file_id < len(self._paths)
            self.in_flight[ticket] = (arena, pieces)
            if self._random.random() < self._begun_share:
                self._begun.add(ticket)
        if urgency != "now":
            self.ahead |= set(tickets)
        if urgency == "maybe":
            self.guessed |= set(tickets)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        self.log.append(("fetch" if urgency == "now" else "ahead", len(records)))
        return tickets

    def hurry(self, tickets: list[int]) -> None:
        assert set(tickets) <= set(self.in_flight)
        self.hurried |= set(tickets)

    def wait_any(
        self, tickets: list[int], most_ms: int | None = None
    ) -> list[tuple[int, str | None, str | None]]:
        assert tickets, "nothing to wait for"
        assert set(tickets) <= set(self.in_flight)
        block = most_ms != 0
        self.log.append(("wait" if block else "poll", len(tickets)))
        if not block:
            tickets = [ticket for ticket in tickets if ticket in self._begun]
        done = self._random.sample(tickets, self._random.randint(min(block, len(tickets)), len(tickets)))
        results: list[tuple[int, str | None, str | None]] = []
        for ticket in done:
            arena, pieces = self.in_flight.pop(ticket)
            if ticket in self._given_up:
                results.append((ticket, "dropped before it was fully read", "dropped"))
                continue
            if (failure := self._fail(ticket)) is not None:
                results.append((ticket, *failure))
                continue
            for file_id, offset, nbytes, dest in pieces:
                begin, end = self._outwards(offset, nbytes)
                bytes_there = self._files[self._paths[file_id]][begin:end]
                self._view(arena, dest, len(bytes_there))[:] = bytes_there
            results.append((ticket, None, None))
        return results

    def drop(self, tickets: list[int]) -> list[int]:
        assert set(tickets) <= set(self.in_flight)
        dropped = [ticket for ticket in tickets if ticket not in self._begun]
        self._given_up |= {
            ticket
            for ticket in tickets
            if ticket in self._begun and self._random.random() < self._given_up_share
        }
        for ticket in dropped:
            del self.in_flight[ticket]
        self.log.append(("drop", len(dropped)))
        return dropped

    def cancel(self, ticket: int) -> bool:
        self.log.append(("cancel", ticket))
        return self.in_flight.pop(ticket, None) is not None

    def _outwards(self, offset: int, nbytes: int) -> tuple[int, int]:
        begin = offset // self.alignment * self.alignment
        return begin, -(-(offset + nbytes) // self.alignment) * self.alignment

    @staticmethod
    def _view(arena: Any, start: int, nbytes: int) -> NDArray[np.uint8]:
        return arena.array()[start : start + nbytes]  # type: ignore[no-any-return]


class FakeFiles(ExpertFiles):
    """Experts whose reads a `FakeStore` answers, or another stand-in written in Python."""

    def __init__(self, store: Any, records: Mapping[Key, ExpertRecord]) -> None:
        super().__init__(store, records, open_file=store.open)

    def reads(self, arena: _native.Arena) -> _native.ExpertReads:
        return _native_testing.ReadsInPython(
            self._store,
            fetch=lambda places, urgency: self.fetch(arena, places, urgency=urgency),
            bytes_of=lambda key: self.records[key].nbytes,
        )
