"""How close do demand reads through the store come to the drive's own speed at the same record size?

    python benchmarks/reads.py [--path DIR] [--records 1MiB 2.5MiB 9MiB] [--blocks Q4_0 Q8_0 Q4_K] [--shape 768x2048]
                               [--readers 2 4 8] [--repeats 5] [--short]

Decode requests the experts that a layer misses, computes, and requests again: 8 records at shuffled places are fetched
together into expert slots, and the next 8 only when all have landed. A record of `--records` is one piece as in a pack,
checked against its CRC. One of `--blocks` is an expert as in a GGUF: three slices of stacked tensors at 32-byte-aligned
offsets, each a matrix of `--shape` (or its transpose), transcoded as it lands. The ceiling is plain O_DIRECT reads of
the same piece size by 1, 2 and 4 threads, the fastest of them, alternating with the store. Both fill equally many slots
in sequence: a buffer that stays in the processor's cache is filled faster than any expert slot can be. The data that
lands is first compared with a plain read.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.block_types import BLOCK_SIZES, SLOT_FORMATS
from argosy.checkpoint.landing import MatrixRef
from argosy.config import MIB, format_bytes, parse_size
from common import Report, alternate, drop_page_cache

MISSES = 8  # per layer
PROBE_READERS = (1, 2, 4)
CHUNK_BYTES = 8 * MIB
ARENA_BYTES = 256 * MIB  # the same as in native/store/drive_probe.cpp
PAGE_BYTES = 4096


class Records:
    """Records in a file, read through a store like a layer's misses. Subclasses define a record."""

    name: str
    piece_bytes: int  # size of one read
    slot_bytes: int
    count: int

    def __init__(self, path: Path) -> None:
        self.path = path

    def record(self, number: int) -> tuple[list[_native.Piece], list[int] | None]:
        """A record's pieces, relative to a slot, and their checksums."""
        raise NotImplementedError

    def is_whole(self, number: int, slot: NDArray[np.uint8]) -> bool:
        """Whether a slot holds the same data as a plain read of the file."""
        raise NotImplementedError

    def start(self, readers: int) -> None:
        drop_page_cache(self.path)  # otherwise the store would read cached pages
        self.store = _native.Store(readers)
        self.file_id = self.store.open(str(self.path))
        self.num_slots = max(1, ARENA_BYTES // self.slot_bytes // MISSES) * MISSES
        self.arena = _native.Arena(self.num_slots * self.slot_bytes)
        self.arena.array()[:] = 0  # touch the pages, as in a running engine

    def fetch(self, numbers: list[int], first_slot: int = 0) -> None:
        """Fetch one layer: issue all reads, then wait for them as they land."""
        waiting = self.store.fetch_many(
            self.arena,
            [
                (_native.Record(*self.record(number)), slot * self.slot_bytes)
                for slot, number in enumerate(numbers, first_slot)
            ],
        )
        while waiting:
            for ticket, message, _ in self.store.wait_any(waiting):
                if message is not None:
                    raise SystemExit(message)
                waiting.remove(ticket)

    def check(self) -> int:
        """Compare every record with a plain read; returns the number of records."""
        memory = self.arena.array()
        for first in range(0, self.count, MISSES):
            numbers = list(range(first, min(first + MISSES, self.count)))
            self.fetch(numbers)
            for slot, number in enumerate(numbers):
                if not self.is_whole(number, memory[slot * self.slot_bytes :][: self.slot_bytes]):
                    raise SystemExit(f"{self.name}: record {number} differs from a plain read")
        return self.count

    def through_store(self, num_records: int) -> dict[str, float]:
        numbers: list[int] = []
        while len(numbers) < num_records:
            numbers += random.sample(range(self.count), self.count)
        before = self.store.stats()
        for first in range(0, num_records, MISSES):
            self.fetch(numbers[first : first + MISSES], first % self.num_slots)
        after = self.store.stats()
        if after["cached_bytes"]:
            raise SystemExit(f"{self.name}: the page cache answered, which says nothing about the drive")
        return {name: after[name] - before[name] for name in ("bytes_read", "transcode_seconds")}

    def plain_read(self, offset: int, nbytes: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(nbytes)

    def close(self) -> None:
        self.store.close()
        self.arena.close()


class PackRecords(Records):
    """Records of one piece each, with a checksum."""

    def __init__(self, path: Path, record_bytes: int) -> None:
        super().__init__(path)
        self.name = format_bytes(record_bytes)
        self.record_bytes = record_bytes
        self.piece_bytes = self.slot_bytes = -(-record_bytes // PAGE_BYTES) * PAGE_BYTES
        self.count = path.stat().st_size // self.slot_bytes
        self._checksums = [_native.crc32c_wide(self._content(number)) for number in range(self.count)]

    def _content(self, number: int) -> bytes:
        return self.plain_read(number * self.slot_bytes, self.record_bytes)

    def record(self, number: int) -> tuple[list[_native.Piece], list[int] | None]:
        place = (self.file_id, number * self.slot_bytes, self.record_bytes, 0)
        return [place], [self._checksums[number]]

    def is_whole(self, number: int, slot: NDArray[np.uint8]) -> bool:
        return slot[: self.record_bytes].tobytes() == self._content(number)


class BlockRecords(Records):
    """Records of three slices of stacked tensors, in GGUF blocks that become panels."""

    def __init__(self, path: Path, block_type: str, rows: int, cols: int) -> None:
        super().__init__(path)
        self.block_type = block_type
        self.shapes = ((rows, cols), (rows, cols), (cols, rows))
        matrix = MatrixRef("", path, 0, 0, SLOT_FORMATS[block_type], rows, cols)
        width, size = BLOCK_SIZES[block_type]
        self.piece_bytes = rows * cols // width * size
        self.name = f"{block_type} 3 x {format_bytes(self.piece_bytes)}"
        self.places = [0, matrix.landed_bytes, 2 * matrix.landed_bytes]
        self.landed = [replace(matrix, rows=r, cols=c).landed_bytes for r, c in self.shapes]
        self.slot_bytes = -(-(self.places[2] + self.landed[2]) // PAGE_BYTES) * PAGE_BYTES
        third = path.stat().st_size // 3
        self.count = (third - PAGE_BYTES) // self.piece_bytes
        self.tensors = [i * third // 32 * 32 + 32 * (i + 1) for i in range(3)]

    def record(self, number: int) -> tuple[list[_native.Piece], list[int] | None]:
        return [
            (
                self.file_id,
                start + number * self.piece_bytes,
                self.piece_bytes,
                place,
                self.block_type,
                rows,
                cols,
            )
            for start, place, (rows, cols) in zip(self.tensors, self.places, self.shapes, strict=True)
        ], None

    def is_whole(self, number: int, slot: NDArray[np.uint8]) -> bool:
        return all(
            np.array_equal(
                slot[place : place + nbytes],
                _native.transcode(
                    self.block_type,
                    np.frombuffer(
                        self.plain_read(start + number * self.piece_bytes, self.piece_bytes), np.uint8
                    ),
                    rows,
                    cols,
                ),
            )
            for start, place, nbytes, (rows, cols) in zip(
                self.tensors, self.places, self.landed, self.shapes, strict=True
            )
        )


def measure(
    report: Report, records: Records, readers: list[int], *, repeats: int, run_bytes: int, is_judged: bool
) -> None:
    """Measure the store with each number of readers, alternating with raw reads."""
    num_records = max(1, run_bytes // records.slot_bytes // MISSES) * MISSES
    pieces = max(1, run_bytes // records.piece_bytes)

    def store(num_readers: int) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            records.start(num_readers)
            try:
                began = time.perf_counter()
                figures = records.through_store(num_records)
                seconds = time.perf_counter() - began
                speed = figures["bytes_read"] / seconds / 1e9
                return {"GB/s": speed, "cores": figures["transcode_seconds"] / seconds}
            finally:
                records.close()

        return run

    def probe(num_readers: int) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            path, nbytes = str(records.path), records.piece_bytes
            return {"GB/s": _native.drive_probe(path, nbytes, pieces, num_readers, True) / 1e9}

        return run

    variants = {f"store {n}": store(n) for n in readers} | {f"raw {n}": probe(n) for n in PROBE_READERS}
    samples = alternate(variants, repeats)
    reached, ceilings = {}, {}
    for n in readers:
        facts = {"record": records.name, "readers": n, "misses": MISSES}
        label = f"store, {records.name}, {n} readers"
        reached[n] = report.figure(label, "GB/s", samples[f"store {n}"], "GB/s", **facts)
        if isinstance(records, BlockRecords):
            report.figure("  of it transcoding", "cores", samples[f"store {n}"], "cores", **facts)
    for n in PROBE_READERS:
        label = f"raw O_DIRECT, {format_bytes(records.piece_bytes)}, {n} readers"
        ceilings[n] = report.figure(label, "GB/s", samples[f"raw {n}"], "GB/s", readers=n)
    report.neighbours([sample for group in samples.values() for sample in group])
    for n in readers:
        # In each round, compare the store with the fastest raw reads of the same few seconds.
        rounds = zip(samples[f"store {n}"], *(samples[f"raw {m}"] for m in PROBE_READERS), strict=True)
        paired = [s.values["GB/s"] / max(raw.values["GB/s"] for raw in raws) for s, *raws in rounds]
        print(f"  ratio of each round: {', '.join(f'{ratio:.2f}' for ratio in paired)}", file=sys.stderr)
        label = f"ratio of medians, {records.name}, {n}"
        target, row = (">= 0.9", 8) if is_judged else ("", None)
        report.ratio(label, reached[n], max(ceilings.values()), target=target, row=row)


def write_random(path: Path, file_bytes: int) -> None:
    generator = np.random.default_rng(11)
    with path.open("wb") as file:
        for _ in range(file_bytes // CHUNK_BYTES):
            file.write(generator.bytes(CHUNK_BYTES))
        file.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--path", type=Path, default=Path("."), help="directory on the drive to measure")
    parser.add_argument("--records", nargs="*", default=["1MiB", "2.5MiB", "9MiB"], help="record sizes")
    parser.add_argument("--blocks", nargs="*", default=["Q4_0", "Q8_0"], choices=list(SLOT_FORMATS))
    parser.add_argument("--shape", default="768x2048", help="rows x columns of gate and up")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--readers", type=int, nargs="+", default=[4])
    parser.add_argument("--file-size", default="1GiB")
    parser.add_argument("--run-size", default="512MiB", help="bytes of one timed stretch")
    parser.add_argument(
        "--short", action="store_true", help="one record size, one block type, a small file, once"
    )
    arguments = parser.parse_args()
    if arguments.short:
        arguments.records, arguments.blocks, arguments.repeats = ["1MiB"], ["Q4_0"], 1
        arguments.file_size = arguments.run_size = "128MiB"
    rows, cols = (int(text) for text in arguments.shape.split("x"))

    report = Report("reads", state="file of random bytes, records shuffled, slots touched before")
    with tempfile.TemporaryDirectory(dir=arguments.path, prefix="argosy-reads-") as folder:
        path = Path(folder) / "records.bin"
        write_random(path, parse_size(arguments.file_size))
        kinds: list[Records] = [PackRecords(path, parse_size(text)) for text in arguments.records]
        kinds += [BlockRecords(path, block_type, rows, cols) for block_type in arguments.blocks]
        checked = 0
        for records in kinds:
            records.start(max(arguments.readers))
            _, _, _, is_direct, why_not = records.store.info(records.file_id)
            if not is_direct:
                raise SystemExit(f"no O_DIRECT here, so there is no ceiling to compare with: {why_not}")
            checked += records.check()
            records.close()
        report.correct(f"{checked} records equal to a plain read, checked or transcoded")
        report.opening()
        run_bytes = parse_size(arguments.run_size)
        for records in kinds:
            measure(
                report,
                records,
                arguments.readers,
                repeats=arguments.repeats,
                run_bytes=run_bytes,
                is_judged=not arguments.short,  # a short stretch is mostly its start and end
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
