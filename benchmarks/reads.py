"""How near do demand reads through the store come to the drive's own speed at the same record size?

    python benchmarks/reads.py [--path DIR] [--records 1MiB 2.5MiB 9MiB] [--repeats 5] [--readers 4]

Decode asks for the experts that a layer misses, computes, and asks again: 8 records at shuffled places are fetched
together into expert slots, each checked against its CRC, and the next 8 only when all are in. The ceiling is plain
O_DIRECT reads of the same records by 1, 2 and 4 threads, the fastest of them, in turn with the store. Both fill as many
slots, one after another: a buffer that stays in the processor's cache is filled faster than any expert slot can be. The
bytes are compared with a plain read first.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from argosy import _native
from argosy.config import MIB, format_bytes, parse_size
from common import Report, alternate

MISSES = 8  # of one layer
PROBE_READERS = (1, 2, 4)
CHUNK_BYTES = 8 * MIB
ARENA_BYTES = 256 * MIB  # as in native/store/drive_probe.cpp
PAGE_BYTES = 4096


class Records:
    """Records of one size in a file, read through a store as a layer's misses."""

    def __init__(self, path: Path, record_bytes: int, readers: int) -> None:
        self.path = path
        self.record_bytes = record_bytes
        self.slot_bytes = -(-record_bytes // PAGE_BYTES) * PAGE_BYTES
        self.count = path.stat().st_size // self.slot_bytes
        self.store = _native.Store(readers)
        self.file_id = self.store.open(str(path))
        self.num_slots = max(1, ARENA_BYTES // self.slot_bytes // MISSES) * MISSES
        self.arena = _native.Arena(self.num_slots * self.slot_bytes)
        self.arena.array()[:] = 0  # slots of a running engine have their pages
        with path.open("rb") as file:
            self.checksums = [_native.crc32c_wide(self._plain(file, number)) for number in range(self.count)]

    def _plain(self, file: object, number: int) -> bytes:
        file.seek(number * self.slot_bytes)  # type: ignore[attr-defined]
        content: bytes = file.read(self.record_bytes)  # type: ignore[attr-defined]
        return content

    def fetch(self, numbers: list[int], first_slot: int = 0) -> None:
        """One layer: all issued, then waited for as they land."""
        waiting = [
            self.store.fetch(
                self.arena,
                [(self.file_id, number * self.slot_bytes, self.record_bytes, slot * self.slot_bytes)],
                [self.checksums[number]],
            )
            for slot, number in enumerate(numbers, first_slot)
        ]
        while waiting:
            for ticket, message, _ in self.store.wait_any(waiting):
                if message is not None:
                    raise SystemExit(message)
                waiting.remove(ticket)

    def check(self) -> int:
        """Compare every record with a plain read; returns how many."""
        memory = self.arena.array()
        with self.path.open("rb") as file:
            for first in range(0, self.count, MISSES):
                numbers = list(range(first, min(first + MISSES, self.count)))
                self.fetch(numbers)
                for slot, number in enumerate(numbers):
                    begin = slot * self.slot_bytes
                    if memory[begin : begin + self.record_bytes].tobytes() != self._plain(file, number):
                        raise SystemExit(f"record {number} differs from a plain read")
        return self.count

    def through_store(self, num_records: int) -> dict[str, float]:
        numbers: list[int] = []
        while len(numbers) < num_records:
            numbers += random.sample(range(self.count), self.count)
        before = self.store.stats()
        for first in range(0, num_records, MISSES):
            self.fetch(numbers[first : first + MISSES], first % self.num_slots)
        after = self.store.stats()
        return {"bytes": after["bytes_read"] - before["bytes_read"]}

    def close(self) -> None:
        self.store.close()
        self.arena.close()


def measure(
    report: Report, path: Path, record_bytes: int, *, readers: int, repeats: int, run_bytes: int
) -> None:
    records = Records(path, record_bytes, readers)
    try:
        num_records = max(1, run_bytes // records.slot_bytes // MISSES) * MISSES

        def store() -> dict[str, float]:
            return records.through_store(num_records)

        def probe(num_readers: int) -> Callable[[], dict[str, float]]:
            def run() -> dict[str, float]:
                speed = _native.drive_probe(str(path), records.slot_bytes, num_records, num_readers, True)
                return {"GB/s": speed / 1e9}

            return run

        store()  # both start warm
        samples = alternate({"store": store, **{f"raw {n}": probe(n) for n in PROBE_READERS}}, repeats)
        for sample in samples["store"]:
            sample.values["GB/s"] = sample.values["bytes"] / sample.seconds / 1e9
        size = format_bytes(record_bytes)
        facts = {"record_bytes": record_bytes, "readers": readers, "misses": MISSES}
        reached = report.figure(
            f"store, {size}, {readers} readers", "GB/s", samples["store"], "GB/s", **facts
        )
        ceilings = {
            n: report.figure(
                f"raw O_DIRECT, {size}, {n} readers", "GB/s", samples[f"raw {n}"], "GB/s", **facts
            )
            for n in PROBE_READERS
        }
        # Per round the store stands beside the fastest raw reads of the same few seconds.
        rounds = zip(samples["store"], *(samples[f"raw {n}"] for n in PROBE_READERS), strict=True)
        paired = [s.values["GB/s"] / max(raw.values["GB/s"] for raw in raws) for s, *raws in rounds]
        print(f"  ratio of each round: {', '.join(f'{ratio:.2f}' for ratio in paired)}", file=sys.stderr)
        report.neighbours([sample for group in samples.values() for sample in group])
        report.ratio(f"ratio of medians, {size}", reached, max(ceilings.values()), target=">= 0.9")
    finally:
        records.close()


def write_random(path: Path, file_bytes: int) -> None:
    generator = np.random.default_rng(11)
    with path.open("wb") as file:
        for _ in range(file_bytes // CHUNK_BYTES):
            file.write(generator.bytes(CHUNK_BYTES))
        file.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--path", type=Path, default=Path("."), help="directory on the drive to measure")
    parser.add_argument("--records", nargs="+", default=["1MiB", "2.5MiB", "9MiB"], help="record sizes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--file-size", default="1GiB")
    parser.add_argument("--run-size", default="512MiB", help="bytes of one timed stretch")
    arguments = parser.parse_args()

    report = Report("reads", state="file of random bytes, records shuffled, slots touched before")
    with tempfile.TemporaryDirectory(dir=arguments.path, prefix="argosy-reads-") as folder:
        path = Path(folder) / "records.bin"
        write_random(path, parse_size(arguments.file_size))
        sizes = [parse_size(text) for text in arguments.records]
        checked = 0
        for record_bytes in sizes:
            records = Records(path, record_bytes, arguments.readers)
            _, _, _, is_direct, why_not = records.store.info(records.file_id)
            if not is_direct:
                raise SystemExit(f"no O_DIRECT here, so there is no ceiling to compare with: {why_not}")
            checked += records.check()
            records.close()
        report.correct(f"{checked} records equal to a plain read, and to their checksums")
        report.opening()
        for record_bytes in sizes:
            measure(
                report,
                path,
                record_bytes,
                readers=arguments.readers,
                repeats=arguments.repeats,
                run_bytes=parse_size(arguments.run_size),
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
