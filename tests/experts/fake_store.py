"""A store without threads or files: the test says in which order reads land, and which of them fail.

A read scribbles over its destination when it starts and brings the bytes when it lands, so weights that move while
somebody still uses them are seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import ExpertMatrix, ExpertRecord, Piece
from argosy.experts.source import Key

ROWS, COLS = 3, 5
MATRIX_BYTES = ROWS * COLS * 4
PiecePlace = tuple[int, int, int, int]  # file id, offset, nbytes, destination


def make_records(
    keys: list[Key], *, num_pieces: int, start: int = 3, gap: int = 7
) -> tuple[dict[Key, ExpertRecord], dict[str, NDArray[np.uint8]]]:
    """Records of experts whose gate, up and down lie in 1, 2 or 3 pieces, and the content of their file."""
    path = Path("experts.bin")
    records: dict[Key, ExpertRecord] = {}
    offset = start
    for key in keys:
        sizes = {1: [3], 2: [2, 1], 3: [1, 1, 1]}[num_pieces]
        pieces, matrices = [], []
        for i, count in enumerate(sizes):
            pieces.append(Piece(path, offset, count * MATRIX_BYTES))
            matrices += [ExpertMatrix(i, j * MATRIX_BYTES, "f32", ROWS, COLS) for j in range(count)]
            offset += count * MATRIX_BYTES + gap
        records[key] = ExpertRecord(tuple(pieces), *matrices)
    content = np.random.default_rng(0).integers(0, 256, offset + 100, np.uint8)
    return records, {str(path): content}


def matrix_content(
    records: dict[Key, ExpertRecord], files: dict[str, NDArray[np.uint8]], key: Key
) -> list[bytes]:
    """The bytes that gate, up and down of an expert must have."""
    record = records[key]
    found = []
    for matrix in (record.gate, record.up, record.down):
        piece = record.pieces[matrix.piece]
        start = piece.offset + matrix.offset
        found.append(files[str(piece.path)][start : start + MATRIX_BYTES].tobytes())
    return found


class FakeStore:
    """Does what `_native.Store` promises, with everything under the test's control.

    fail: (num_fetches so far) -> (message, kind) or None.   refuse: the number of a fetch that raises at once.
    begun: the share of reads that a reader has begun as soon as they are asked for.   given_up: the share of those
        that can still be given up half-way.
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
        self._given_up: set[int] = set()  # half-way
        self.ahead: set[int] = set()  # tickets that nobody waited for when they were asked for
        self.guessed: set[int] = set()  # those of them that were a guess
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

    def wait_any(self, tickets: list[int], block: bool = True) -> list[tuple[int, str | None, str | None]]:
        assert tickets, "nothing to wait for"
        assert set(tickets) <= set(self.in_flight)
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
