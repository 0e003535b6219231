"""The expert cache over the real store, on a file system whose nth read fails, is short, wrong or slow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from argosy import _native
from argosy.checkpoint.files import ExpertRecord
from argosy.errors import ArgosyError, CorruptRecord, ReadFailed
from argosy.experts.cache import ExpertCache
from argosy.experts.files import ExpertFiles, Key
from tests.experts.fake_store import MATRIX_BYTES, Truth, make_records
from tests.native import _native_testing

KEYS = [(0, expert) for expert in range(10)]
ASKED = [1, 2, 4, 7, 8]


class Rig:
    """Ten experts in a real file with checksums, six slots, and one reader so that reads stay in order."""

    def __init__(
        self, directory: Path, faults: _native_testing.FaultyFileSystem | None, num_pieces: int = 1
    ) -> None:
        # A flipped bit is in the middle of a read; a record lies in the middle of its block.
        start, gap = (2000, 4096 - 3 * MATRIX_BYTES) if num_pieces == 1 else (3, 7)
        records, files = make_records(KEYS, num_pieces=num_pieces, start=start, gap=gap)
        (content,) = files.values()
        path = directory / "experts.bin"
        path.write_bytes(content.tobytes())
        self.content = {str(path): content}
        self.records = {key: _located(record, path, content) for key, record in records.items()}
        self.store = _native.Store(1, faults) if faults is not None else _native.Store(1)
        expert_files = ExpertFiles(self.store, self.records, open_file=self.store.open)
        self.truth = Truth(self.records, self.content)
        self.cache = ExpertCache(expert_files, num_slots=6, experts_per_token=2)

    def run(self) -> list[int]:
        found = []
        with self.cache.lease(0, ASKED) as lease:
            for group in lease:
                self.truth.check(self.cache.table, 0, group)
                found += group
        return sorted(found)


def _located(record: ExpertRecord, path: Path, content: np.ndarray) -> ExpertRecord:
    pieces = tuple(
        replace(
            piece,
            path=path,
            checksum=_native.crc32c_wide(content[piece.offset : piece.offset + piece.nbytes].tobytes()),
        )
        for piece in record.pieces
    )
    return replace(record, pieces=pieces)


def num_opening_reads(directory: Path) -> int:
    """Return the number of reads that opening the file takes, before the first expert is requested."""
    faults = _native_testing.FaultyFileSystem(1 << 40, "eio")
    Rig(directory, faults)
    return faults.num_reads


@pytest.mark.parametrize("nth", [1, 2, 5])
@pytest.mark.parametrize(
    ("kind", "error"), [("eio", ReadFailed), ("truncated", ReadFailed), ("flip", CorruptRecord)]
)
def test_a_failed_nth_read_is_named_and_the_next_lease_is_complete(
    tmp_path: Path, kind: str, error: type[ArgosyError], nth: int
) -> None:
    # A lease reads its experts in ascending order.
    faults = _native_testing.FaultyFileSystem(num_opening_reads(tmp_path) + nth, kind)
    rig = Rig(tmp_path, faults)
    key: Key = (0, ASKED[nth - 1])
    with pytest.raises(error, match=rf"experts\.bin: layer 0, expert {key[1]}: "):
        rig.run()
    assert rig.store.pending() == 0
    assert rig.cache.slots.slot(key) is None
    assert rig.run() == ASKED


@pytest.mark.parametrize("kind", ["eintr", "short"])
def test_an_interrupted_or_partial_read_is_continued(tmp_path: Path, kind: str) -> None:
    faults = _native_testing.FaultyFileSystem(num_opening_reads(tmp_path) + 2, kind, num_faults=3)
    assert Rig(tmp_path, faults, num_pieces=3).run() == ASKED


def test_a_lease_that_ends_during_slow_reads_waits_until_no_byte_moves(tmp_path: Path) -> None:
    first = num_opening_reads(tmp_path) + 1
    faults = _native_testing.FaultyFileSystem(first, "delay", num_faults=2, delay_seconds=0.1)
    rig = Rig(tmp_path, faults)
    with rig.cache.lease(0, ASKED):
        pass
    assert rig.store.pending() == 0
    assert not rig.cache.slots.resident()
    assert rig.run() == ASKED
