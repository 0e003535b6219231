"""Measure the drive: alone, and while products keep cores and memory busy, with and without transcoding."""

from __future__ import annotations

import errno
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from argosy import _native
from argosy.config import MIB
from argosy.errors import DiskFull, UsageError, is_disk_full
from argosy.forecast.product_rates import COLS, ROWS
from argosy.machine import resources

ROUNDS = 8  # per calibration
_DRIVE_S = 0.15  # for each size of record, in each round
_RECORD_BYTES = (256 << 10, 1 << 20, 4 << 20, 16 << 20)
_ALONE_BYTES = 4 << 20  # a record read alone
_NUM_READERS = 4
_AT_ONCE, _MOST_PIECES = 8, 8192  # matrices of 0.9 MB to read and transcode: in flight, and in all
_NUM_BUSY = 96  # matrices of the products that keep cores busy: more than caches hold, so memory is also busy
_FILE_BYTES = 512 << 20  # the temporary file, if there is no model to read
_SMALLEST_FILE_BYTES = 64 << 20


@contextmanager
def file_to_read(files: Sequence[Path]) -> Iterator[str]:
    """Yield a file on the drive to measure: the largest of `files`, or a temporary one."""
    largest = max(files, key=lambda path: path.stat().st_size, default=None)
    if largest is not None and largest.stat().st_size >= _SMALLEST_FILE_BYTES:
        yield str(largest)
        return
    directory = largest.parent if largest is not None and os.access(largest.parent, os.W_OK) else Path.cwd()
    room = resources.free_disk_bytes(directory) // 4
    try:
        if room < _SMALLEST_FILE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryFile(dir=directory) as file:
            _fill(file, min(room, _FILE_BYTES))
            yield f"/proc/self/fd/{file.fileno()}"
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(
                f"measuring the drive needs a temporary file in {directory}, which has no room for it",
                path=directory,
                needed_bytes=4 * _SMALLEST_FILE_BYTES,
                free_bytes=4 * room,
            ) from error
        raise UsageError(
            f"measuring the drive needs a temporary file in {directory}: {error.strerror}",
            hint="run it in a directory of your own, on the drive where the models are",
        ) from error


def _fill(file: IO[bytes], nbytes: int) -> None:
    generator = np.random.default_rng()
    for _ in range(nbytes // (8 * MIB)):
        file.write(generator.bytes(8 * MIB))
    file.flush()
    os.fsync(file.fileno())


class _Drive(NamedTuple):
    """The measurements of a drive.

    rates: (record bytes, bytes per second).
    spread: the factor between the median round and the farthest one.
    latency_s: how much longer a record takes alone than its share of a batch.
    For the others see `Rates`.
    """

    rates: tuple[tuple[int, float], ...]
    spread: float
    latency_s: float
    overlap: float
    transcoding_overlap: float
    read_cpu_s_per_byte: float
    transcode_cpu_s_per_byte: float


class DriveRates:
    """Times reads of a file in rounds; rates are medians."""

    def __init__(self, path: str) -> None:
        self._path, self._bytes, self._is_direct = path, os.stat(path).st_size, True
        self._together: dict[int, list[float]] = {size: [] for size in _RECORD_BYTES}
        self._alone: list[float] = []

    def measure(self) -> None:
        """Run one round."""
        for record_bytes, rates in self._together.items():
            nbytes, seconds = self._read(record_bytes, _NUM_READERS, _DRIVE_S)
            rates.append(nbytes / seconds)
        nbytes, seconds = self._read(_ALONE_BYTES, 1, _DRIVE_S)
        self._alone.append(nbytes / seconds)

    def result(self, cores: int) -> _Drive:
        together = {size: statistics.median(rates) for size, rates in self._together.items()}
        rate = together[_ALONE_BYTES]
        latency_s = max(1e-5, _ALONE_BYTES / statistics.median(self._alone) - _ALONE_BYTES / rate)
        kinds: tuple[Callable[[float], tuple[int, float]], ...] = (
            partial(self._read, _ALONE_BYTES, _NUM_READERS), self._transcode
        )  # fmt: skip
        cpu_s_per_byte = []
        for read in kinds:
            begin = time.process_time()
            nbytes, _ = read(2 * _DRIVE_S)
            cpu_s_per_byte.append(max(1e-15, (time.process_time() - begin) / nbytes))
        # Alternate alone and together, because on some machines products change their rate every few seconds.
        alone = []
        # seconds of reads alone, of products alone, and of both together
        together_s = [[0.0, 0.0, 0.0] for _ in kinds]
        with _busy(cores) as products:
            for _ in range(ROUNDS // 2):
                products.rate()
                time.sleep(_DRIVE_S)
                alone.append(products.rate())
                for read, sums in zip(kinds, together_s, strict=True):
                    nbytes, seconds = read(2 * _DRIVE_S)
                    for at, value in enumerate((nbytes / rate, seconds * products.rate(), seconds)):
                        sums[at] += value
        overlaps = [
            _overlap(reading_s, done / statistics.mean(alone), seconds)
            for reading_s, done, seconds in together_s
        ]
        rounds = self._together[_ALONE_BYTES]
        spread = max(rate / min(rounds), max(rounds) / rate)
        return _Drive(tuple(together.items()), spread, latency_s, *overlaps, *cpu_s_per_byte)

    def _read(self, record_bytes: int, readers: int, seconds: float) -> tuple[int, float]:
        """Read for about `seconds`; return the bytes read and the seconds taken."""
        most = self._bytes // record_bytes
        few = min(most, max(readers, (16 << 20) // record_bytes))
        try:
            first = _native.drive_probe(self._path, record_bytes, few, readers, self._is_direct)
        except RuntimeError:  # the file system has no direct reads
            self._is_direct = False
            first = _native.drive_probe(self._path, record_bytes, few, readers, False)
        count = min(most, max(few, int(first * seconds) // record_bytes))
        rate = _native.drive_probe(self._path, record_bytes, count, readers, self._is_direct)
        return count * record_bytes, count * record_bytes / rate

    def _transcode(self, seconds: float) -> tuple[int, float]:
        """Read for about `seconds`, treating the bytes as 4-bit weights that readers transcode.

        The file may contain anything, so the format is one in which every byte is valid: with others a reader would
        stop at the first non-finite scale.
        """
        nbytes = ROWS * COLS // 2
        slot_bytes = _native.matrix_bytes("int4", ROWS, COLS)
        numbers = np.random.default_rng().integers(self._bytes // nbytes, size=_MOST_PIECES)
        places = [int(number) * nbytes for number in numbers]
        begin, done = time.perf_counter(), 0
        with (
            closing(_native.Store(_NUM_READERS)) as store,
            closing(_native.Arena(_AT_ONCE * slot_bytes)) as arena,
        ):
            file = store.open(self._path, self._is_direct)

            def fetch(number: int, slot: int) -> int:
                piece = (file, places[number], nbytes, slot * slot_bytes, "int4_quants", ROWS, COLS)
                return store.fetch(arena, [piece])

            in_flight = {fetch(slot, slot): slot for slot in range(_AT_ONCE)}
            started = _AT_ONCE
            while in_flight:
                for ticket, message, _ in store.wait_any(list(in_flight)):
                    if message is not None:
                        raise OSError(message)
                    slot = in_flight.pop(ticket)
                    done += nbytes
                    if started < len(places) and time.perf_counter() - begin < seconds:
                        in_flight[fetch(started, slot)] = slot
                        started += 1
        return done, time.perf_counter() - begin


def _overlap(reading_s: float, computing_s: float, together_s: float) -> float:
    """The fraction of the shorter of two kinds of work hidden by the longer, from their times alone and together."""
    return min(1.0, max(0.0, (reading_s + computing_s - together_s) / min(reading_s, computing_s)))


class _Products:
    """Runs products in a thread and counts them."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call, self._is_over = call, threading.Event()
        self._done, self._counted, self._began = 0, 0, time.perf_counter()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def rate(self) -> float:
        """Products per second since the previous call."""
        now, done = time.perf_counter(), self._done
        rate = (done - self._counted) / (now - self._began)
        self._counted, self._began = done, now
        return max(rate, 1e-9)

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._is_over.is_set():
            self._call()
            self._done += 1


@contextmanager
def _busy(threads: int) -> Iterator[_Products]:
    """Keep `threads` cores busy with one-token products until the context ends."""
    runtime = _native.Runtime(threads)
    size = _native.matrix_bytes("q4", ROWS, COLS)
    arena = _native.Arena(_NUM_BUSY * size)
    arena.array()[:] = 0x21
    matrices = [_native.Matrix(arena, i * size, "q4", ROWS, COLS) for i in range(_NUM_BUSY)]
    x = np.ones((1, COLS), np.float32)
    outs = [np.empty((1, ROWS), np.float32) for _ in matrices]
    products = _Products(lambda: _native.matmul(runtime, matrices, x, outs))
    try:
        yield products
    finally:
        products.stop()
        matrices.clear()
        arena.close()
        runtime.close()
