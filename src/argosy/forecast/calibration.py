"""Measure the rates of this machine that a forecast needs, within a minute, and keep them.

    memory, products, attention, the drive, small models  ->  Rates, in the user's cache

Products of 1 to 64 tokens are timed with weights in a CPU cache, which is arithmetic, and with weights that no cache
holds: the rest of their time is waiting for memory. Each is compared with a probe of int8 arithmetic at that moment,
because cores of a virtual machine run at half their speed while a neighbour uses their other thread. The drive is read
at several record sizes, and then while products keep cores and memory busy, with and without transcoding, which says
how much of one the other hides. The engine runs two tiny models of different depth, which give the overhead of a layer
beyond its products, and two with experts of usual sizes, which give that of a layer's first miss and of each further
one.

Elsewhere: `machine/kept_rates.py` keeps the result; `machine/rates.py` has its form, and guesses for machines that were
not measured.
"""

from __future__ import annotations

import errno
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import date
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import IO, NamedTuple, get_args

import numpy as np

from argosy import _native
from argosy.checkpoint.geometry import dense_shapes, expert_shapes
from argosy.checkpoint.safetensors_write import TensorToWrite, write_safetensors
from argosy.config import MIB, Format, KvDtype, SamplingParams
from argosy.engine.engine import Engine
from argosy.errors import DiskFull, UsageError, is_disk_full
from argosy.experts.resident import Progress
from argosy.machine import resources, tuning
from argosy.machine.rates import (
    MEASURED_SPREAD,
    MOST_MEASURED_SPREAD,
    NUM_TOKENS,
    Rates,
)
from argosy.model.families import CONFIG_FILE, FAMILIES

_ARENA_BYTES = 192 << 20  # larger than most last-level caches
_TILE_BYTES = 4 << 20  # random bytes, which repeat
_COLD_BYTES = 12 << 20  # read in a sample
_ROWS, _COLS, _MANY_TOKENS = 768, 2048, 64
_MOST_WAITING = 8  # tokens; with more, arithmetic takes many times as long as reading weights
_NUM_CACHED = 2  # matrices, 12 MB in float32, which last-level caches hold
_ENCODER_ROWS = 512  # patches in a product, as towers have them
_KV_DTYPES: tuple[KvDtype, ...] = get_args(KvDtype)
_KEYS_BYTES = 64 << 20  # keys and values: more than most last-level caches hold
_POSITIONS, _BLOCK, _HEAD_DIM = 1024, 16, 128
_SAMPLE_S, _ROUNDS = 0.005, 8  # for each call, in each round
_PROBE_S = 0.05  # for so long, arithmetic is taken to keep its rate
_DRIVE_S = 0.15  # for each size of record, in each round
_RECORD_BYTES = (256 << 10, 1 << 20, 4 << 20, 16 << 20)
_ALONE_BYTES = 4 << 20  # a record that is read alone
_NUM_READERS = 4
_AT_ONCE, _MOST_PIECES = 8, 8192  # matrices of 0.9 MB that are read and transcoded: in flight, and in all
_NUM_BUSY = 96  # matrices of the products that keep cores busy: more than caches hold, so memory is busy, too
_FILE_BYTES = 512 << 20  # the temporary file, if no model is there to be read
_SMALLEST_FILE_BYTES = 64 << 20
_BESIDE = ("router", "sampling", "other")  # parts of a ledger beside arithmetic and waiting
_STEPS = 64
_SHARES = (0.75, 0.5, 0.25)  # of experts in memory, where misses are measured


def calibrate(
    files: Sequence[Path], *, threads: int | None = None, progress: Progress | None = None
) -> Rates:
    """Measure this machine.

    Args:
        files: the model's files; the drive is measured by reading the largest. If it is small, or there
            are none, a temporary file in the current directory is written and read.
        threads: for products; None: as many as an engine has.

    Raises:
        DiskFull: there is no room for the temporary file.   UsageError: it cannot be written.
    """
    tell = progress or (lambda what, share: None)
    cores = threads or tuning.measured_threads()
    tell("measuring products and the drive", 0.0)
    choices = tuning.choose(cores, _native.instruction_sets()[-1])
    runtime = _native.Runtime(cores, choices.tunings())
    with closing(runtime), closing(_Kernels(runtime, cores)) as kernels, _file_to_read(files) as path:
        reads = _DriveRates(path)
        # Rounds of both in turn: a neighbour of a virtual machine takes bandwidth for many seconds at a time.
        for number in range(_ROUNDS):
            tell("measuring products and the drive", 0.05 + 0.7 * number / _ROUNDS)
            kernels.measure()
            reads.measure()
        rates, varied = kernels.rates, kernels.varied
        memory_bytes_per_s = kernels.memory_bytes_per_s
        keys_values = {dtype: kernels.share_of_memory(f"keys and values {dtype}") for dtype in _KV_DTYPES}
        waits = {
            format: tuple(kernels.wait(format, min(tokens, _MOST_WAITING)) for tokens in NUM_TOKENS)
            for format in get_args(Format)
        }
        int8_operations = kernels.int8_operations
        drive = reads.result(cores)
    overheads = _overheads(cores, int8_operations, tell)
    tell("done", 1.0)
    return Rates(
        cores=cores,
        memory_bytes_per_s=memory_bytes_per_s,
        int8_operations=int8_operations,
        operations={
            format: tuple(rates[f"{format} {tokens}"] for tokens in NUM_TOKENS) for format in get_args(Format)
        },
        waits=waits,
        encoder_operations=rates["encoder"],
        keys_values=keys_values,
        attention_operations={dtype: rates[f"attention {dtype}"] for dtype in _KV_DTYPES},
        prompt_attention_operations={dtype: rates[f"prompt attention {dtype}"] for dtype in _KV_DTYPES},
        drive=drive.rates,
        drive_spread=drive.spread,
        drive_latency_s=drive.latency_s,
        overlap=drive.overlap,
        transcoding_overlap=drive.transcoding_overlap,
        read_cpu_s_per_byte=drive.read_cpu_s_per_byte,
        transcode_cpu_s_per_byte=drive.transcode_cpu_s_per_byte,
        layer_s=overheads.layer_s,
        streamed_layer_s=overheads.streamed_layer_s,
        missing_layer_s=overheads.missing_layer_s,
        missing_layer_s_per_byte=overheads.missing_layer_s_per_byte,
        miss_s=overheads.miss_s,
        step_s=overheads.step_s,
        spread=min(MOST_MEASURED_SPREAD, max(MEASURED_SPREAD, varied)),
        source=f"measured {date.today().isoformat()}, {resources.cpu_model()[:100]}, {cores} threads",
    )


# ── products and attention ──────────────────────────────────────────────────────────────────────────────────────────


class _Timed(NamedTuple):
    """A call to time, and the bytes that it reads or the operations that it does.

    is_arithmetic: arithmetic bounds it, and not memory.
    """

    name: str
    call: Callable[[], object]
    work: float
    is_arithmetic: bool = True


class _Kernels:
    """Times products and attention in rounds; their rates are medians.

    A forecast covers minutes in which others use the machine, too, so the fastest call would promise too much.
    """

    def __init__(self, runtime: _native.Runtime, cores: int) -> None:
        self._memory, self._cores = ExitStack(), cores
        self._probes: list[float] = []  # seconds for a byte of memory, in each round
        self._calls = [
            *_products(runtime, self._memory), _encoder_product(runtime, self._memory), *_attention(runtime)
        ]  # fmt: skip
        self._medians: dict[str, list[float]] = {one.name: [] for one in self._calls}
        # Operations per second of the int8 probe beside each call that arithmetic bounds.
        self._int8: dict[str, list[float]] = {one.name: [] for one in self._calls if one.is_arithmetic}

    def measure(self) -> None:
        """Do a round."""
        self._probes.append(1.0 / _native.memory_probe(self._cores, max(256, 8 * self._cores) * MIB))
        int8, probed_at = 0.0, -_PROBE_S
        for one in self._calls:
            if one.is_arithmetic:
                if time.perf_counter() - probed_at > _PROBE_S:
                    int8, probed_at = _native.int8_probe(self._cores), time.perf_counter()
                self._int8[one.name].append(int8)
            self._medians[one.name].append(_median_s(one.call))

    @property
    def int8_operations(self) -> float:
        """The mean over all rounds: arithmetic of some virtual machines changes its rate every few seconds."""
        return statistics.harmonic_mean([rate for rounds in self._int8.values() for rate in rounds])

    @property
    def rates(self) -> dict[str, float]:
        """Work per second of each call that arithmetic bounds, at the mean rate of the probes."""
        shares = {
            one.name: statistics.median(
                one.work / took / probed
                for took, probed in zip(self._medians[one.name], self._int8[one.name], strict=True)
            )
            for one in self._calls
            if one.is_arithmetic
        }
        return {name: share * self.int8_operations for name, share in shares.items()}

    @property
    def memory_bytes_per_s(self) -> float:
        """The mean over all rounds: the memory of some virtual machines changes its rate every few seconds."""
        return len(self._probes) / sum(self._probes)

    def share_of_memory(self, name: str) -> float:
        """The bytes per second of a call over those of memory in the same round."""
        work = self._work(name)
        return statistics.median(
            work / took * probed for took, probed in zip(self._medians[name], self._probes, strict=True)
        )

    def wait(self, format: Format, tokens: int) -> float:
        """`Rates.waits` of a format and a number of tokens, against the memory of the same round."""
        cold, cached = f"cold {format} {tokens}", f"{format} {tokens}"
        size = _native.matrix_bytes(format, _ROWS, _COLS)
        matrices = self._work(cold) / self._work(cached) * _NUM_CACHED
        shares = [
            (took / matrices - took_cached / _NUM_CACHED) / (size * probed)
            for took, took_cached, probed in zip(
                self._medians[cold], self._medians[cached], self._probes, strict=True
            )
        ]
        return max(1e-9, statistics.median(shares))

    def _work(self, name: str) -> float:
        return next(one.work for one in self._calls if one.name == name)

    @property
    def varied(self) -> float:
        """The factor between the fastest and the slowest round: the median of all calls."""
        return statistics.median(max(rounds) / min(rounds) for rounds in self._medians.values())

    def close(self) -> None:
        self._calls.clear()  # they hold memory that is about to be closed
        self._memory.close()


def _median_s(call: Callable[[], object]) -> float:
    call()
    times: list[float] = []
    end = time.perf_counter() + _SAMPLE_S
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _products(runtime: _native.Runtime, memory: ExitStack) -> Iterator[_Timed]:
    """Products of each format with each of NUM_TOKENS, with weights in a CPU cache and with weights in none."""
    arena = memory.enter_context(closing(_native.Arena(_ARENA_BYTES)))
    bits = np.random.default_rng(0).integers(0, 256, _TILE_BYTES, dtype=np.uint8)
    # Finite and normal numbers in every format.
    arena.array().reshape(-1, _TILE_BYTES)[:] = np.bitwise_or(np.bitwise_and(bits, 0x3B), 0x20)

    def timed(
        format: Format, num_tokens: int, count: int, *, all_of: int | None = None
    ) -> Callable[[], object]:
        """Products with the next `count` matrices of so many, or of all that there are."""
        size = _native.matrix_bytes(format, _ROWS, _COLS)
        number = all_of or _ARENA_BYTES // size
        matrices = [_native.Matrix(arena, i * size, format, _ROWS, _COLS) for i in range(number)]
        x = np.ones((num_tokens, _COLS), np.float32)
        outs = [np.empty((num_tokens, _ROWS), np.float32) for _ in range(count)]
        starts = cycle(range(0, number - count + 1, count))
        return lambda: _native.matmul(runtime, matrices[(at := next(starts)) : at + count], x, outs)

    for format in get_args(Format):
        size = _native.matrix_bytes(format, _ROWS, _COLS)
        cold = max(1, _COLD_BYTES // size)
        for tokens in NUM_TOKENS:
            work = 2.0 * tokens * _ROWS * _COLS
            call = timed(format, tokens, _NUM_CACHED, all_of=_NUM_CACHED)
            yield _Timed(f"{format} {tokens}", call, _NUM_CACHED * work)
            if tokens <= _MOST_WAITING:
                call = timed(format, tokens, cold)
                yield _Timed(f"cold {format} {tokens}", call, cold * work, is_arithmetic=False)


def _encoder_product(runtime: _native.Runtime, memory: ExitStack) -> _Timed:
    """`linear`, of which towers for pictures are made, with bfloat16 weights."""
    arena = memory.enter_context(closing(_native.Arena(_native.matrix_bytes("bf16", _ROWS, _COLS))))
    arena.array()[:] = 0x3B
    matrix = _native.Matrix(arena, 0, "bf16", _ROWS, _COLS)
    x, out = np.ones((_ENCODER_ROWS, _COLS), np.float32), np.empty((_ENCODER_ROWS, _ROWS), np.float32)
    return _Timed(
        "encoder", lambda: _native.linear(runtime, matrix, x, out), 2.0 * _ENCODER_ROWS * _ROWS * _COLS
    )


def _attention(runtime: _native.Runtime) -> Iterator[_Timed]:
    """Attention with each format of the KV cache, of one token and of many.

    One token whose heads have keys of their own waits for memory, one whose heads share them waits for arithmetic.
    """

    def timed(name: str, dtype: KvDtype, num_heads: int, kv_heads: int, num_tokens: int) -> _Timed:
        shape = _native.KvShape.keys_values(kv_heads, _HEAD_DIM)
        num_blocks = _POSITIONS // _BLOCK
        nbytes = _native.kv_cache_bytes([shape], num_blocks, _BLOCK, dtype)
        num_layers = -(-_KEYS_BYTES // nbytes)
        cache = _native.KvCache([shape] * num_layers, num_blocks, _BLOCK, dtype)
        keys = np.full((_POSITIONS, kv_heads, _HEAD_DIM), 0.1, np.float32)
        for layer in range(num_layers):
            _native.kv_write(runtime, cache, layer, keys, keys, np.arange(_POSITIONS))
        query = np.ones((num_tokens, num_heads, _HEAD_DIM), np.float32)
        out = np.empty((num_tokens, num_heads * _HEAD_DIM), np.float32)
        table = np.arange(num_blocks, dtype=np.int32)[None]
        sequence = np.zeros(num_tokens, np.int32)
        order = np.arange(_POSITIONS - num_tokens, _POSITIONS, dtype=np.int32)
        layers = cycle(range(num_layers))

        def call() -> None:
            _native.attention(runtime, cache, next(layers), query, table, sequence, order, 0.1, 0, out)

        is_arithmetic = kv_heads < num_heads
        operations = 4 * num_heads * _HEAD_DIM * (int(order.sum()) + num_tokens)
        return _Timed(f"{name} {dtype}", call, operations if is_arithmetic else nbytes, is_arithmetic)

    for dtype in _KV_DTYPES:
        yield timed("keys and values", dtype, 16, 16, 1)
        yield timed("attention", dtype, 32, 4, 1)
        yield timed("prompt attention", dtype, 32, 4, _MANY_TOKENS)


# ── the drive ───────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _file_to_read(files: Sequence[Path]) -> Iterator[str]:
    """A name of a file on the drive to measure: the largest of `files`, or a temporary one."""
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
    spread: the factor between the median of the rounds and the farthest of them.
    latency_s: how much longer a record takes alone than its share of records that are read together.
    The others: see `Rates`.
    """

    rates: tuple[tuple[int, float], ...]
    spread: float
    latency_s: float
    overlap: float
    transcoding_overlap: float
    read_cpu_s_per_byte: float
    transcode_cpu_s_per_byte: float


class _DriveRates:
    """Times reads of a file in rounds; their rates are medians."""

    def __init__(self, path: str) -> None:
        self._path, self._bytes, self._is_direct = path, os.stat(path).st_size, True
        self._together: dict[int, list[float]] = {size: [] for size in _RECORD_BYTES}
        self._alone: list[float] = []

    def measure(self) -> None:
        """Do a round."""
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
        # Alone and together in turn, because products change their rate every few seconds on some machines.
        alone = []
        together_s = [[0.0, 0.0, 0.0] for _ in kinds]  # of reads, of products, and as long as both took
        with _busy(cores) as products:
            for _ in range(_ROUNDS // 2):
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
        """Read for about `seconds`; returns the bytes that were read, and the seconds it took."""
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
        """Read for about `seconds`, and take what is read for 4-bit weights that readers transcode.

        The file has anything in it, so these are weights of a kind of which no byte is invalid: a reader stops at the
        first scale that is no finite number.
        """
        nbytes = _ROWS * _COLS // 2
        slot_bytes = _native.matrix_bytes("int4", _ROWS, _COLS)
        numbers = np.random.default_rng().integers(self._bytes // nbytes, size=_MOST_PIECES)
        places = [int(number) * nbytes for number in numbers]
        begin, done = time.perf_counter(), 0
        with (
            closing(_native.Store(_NUM_READERS)) as store,
            closing(_native.Arena(_AT_ONCE * slot_bytes)) as arena,
        ):
            file = store.open(self._path, self._is_direct)

            def fetch(number: int, slot: int) -> int:
                piece = (file, places[number], nbytes, slot * slot_bytes, "int4_quants", _ROWS, _COLS)
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
    """The share of the shorter of two kinds of work that the longer one hides, from their times alone and together."""
    return min(1.0, max(0.0, (reading_s + computing_s - together_s) / min(reading_s, computing_s)))


class _Products:
    """Runs products in a thread, and counts them."""

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
    """Keep `threads` cores busy with products with one token, until the end of the context."""
    runtime = _native.Runtime(threads)
    size = _native.matrix_bytes("q4", _ROWS, _COLS)
    arena = _native.Arena(_NUM_BUSY * size)
    arena.array()[:] = 0x21
    matrices = [_native.Matrix(arena, i * size, "q4", _ROWS, _COLS) for i in range(_NUM_BUSY)]
    x = np.ones((1, _COLS), np.float32)
    outs = [np.empty((1, _ROWS), np.float32) for _ in matrices]
    products = _Products(lambda: _native.matmul(runtime, matrices, x, outs))
    try:
        yield products
    finally:
        products.stop()
        matrices.clear()
        arena.close()
        runtime.close()


# ── the engine's own time ───────────────────────────────────────────────────────────────────────────────────────────


class _Size(NamedTuple):
    """The size of a model with random float16 weights."""

    layers: int
    hidden: int
    width: int
    experts: int
    chosen: int

    @property
    def record_bytes(self) -> int:
        return 3 * 2 * self.hidden * self.width


# Two models are as small as the kernels allow. Two have experts of usual sizes, several of which may miss in one layer.
_FEW, _MANY = _Size(4, 256, 64, 16, 4), _Size(20, 256, 64, 16, 4)
_MIDDLING, _LARGE = _Size(4, 512, 256, 16, 8), _Size(3, 1024, 512, 16, 8)


class _Overheads(NamedTuple):
    """Seconds that neither products nor reads explain.

    layer_s: per layer.   streamed_layer_s: more, if the layer's experts are streamed.
    missing_layer_s: more, if any of them misses.   missing_layer_s_per_byte: per byte of a record.
    miss_s: for each further expert that misses.   step_s: per step.
    """

    layer_s: float
    streamed_layer_s: float
    missing_layer_s: float
    missing_layer_s_per_byte: float
    miss_s: float
    step_s: float


class _Token(NamedTuple):
    """A decode step of a small model: median seconds, mean ones without arithmetic and waiting, and the hit rate."""

    seconds: float
    beside_s: float
    hit_rate: float


def _overheads(cores: int, int8_operations: float, tell: Progress) -> _Overheads:
    """Run the small models; seconds are for that rate of int8 arithmetic."""
    with tempfile.TemporaryDirectory(prefix="argosy-calibration-") as scratch:

        def tokens(size: _Size, *shares: float | None) -> list[_Token]:
            """With every expert in memory, or a share of them; medians of three turns."""
            path = Path(scratch) / f"{size.layers}-{size.hidden}"
            _write_model(path, size)
            most = size.layers * size.experts - 1
            slots = [None if share is None else min(most, int(share * (most + 1))) for share in shares]
            turns = [
                [_token(path, cores, int8_operations, expert_slots=one) for one in slots] for _ in range(3)
            ]
            return [
                _Token(*map(statistics.median, zip(*found, strict=True)))
                for found in zip(*turns, strict=True)
            ]

        tell("running small models", 0.8)
        few, few_streamed = tokens(_FEW, None, 1.0)
        many, many_streamed = tokens(_MANY, None, 1.0)
        tell("running small models", 0.9)
        first, further = [], []  # bytes of a record and seconds of a layer's first miss; seconds of another
        for size in (_MIDDLING, _LARGE):
            all_here, *missing = tokens(size, 1.0, *_SHARES)
            layer_s, miss_s = _solved(
                [
                    (
                        size.layers * (1.0 - one.hit_rate**size.chosen),
                        size.layers * size.chosen * (1.0 - one.hit_rate),
                        one.beside_s - all_here.beside_s,
                    )
                    for one in missing
                ]
            )
            first.append((size.record_bytes, layer_s))
            further.append(miss_s)
    missing_layer_s, missing_layer_s_per_byte = _line(*first)
    layers = _MANY.layers - _FEW.layers
    layer_s = max(1e-6, (many.seconds - few.seconds) / layers)
    return _Overheads(
        layer_s=layer_s,
        streamed_layer_s=max(1e-6, (many_streamed.seconds - few_streamed.seconds) / layers - layer_s),
        missing_layer_s=missing_layer_s,
        missing_layer_s_per_byte=missing_layer_s_per_byte,
        miss_s=max(1e-6, statistics.mean(further)),
        step_s=max(1e-6, few.seconds - _FEW.layers * layer_s),
    )


def _solved(samples: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Seconds of a layer's first miss and of each further one, neither below zero, that fit best.

    Args:
        samples: layers with misses, misses, and the seconds that they cost.
    """
    layers, misses, seconds = (np.array(column) for column in zip(*samples, strict=True))
    counts = np.stack([layers, misses - layers], 1)
    found, *_ = np.linalg.lstsq(counts, seconds, rcond=None)
    for one, other in ((0, 1), (1, 0)):
        if found[one] < 0.0:
            alone = counts[:, other]
            found[one], found[other] = 0.0, max(0.0, float(alone @ seconds) / max(1e-9, float(alone @ alone)))
    return float(found[0]), float(found[1])


def _line(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """The line through two points: its value at 0, and its slope. Noise makes neither fall below almost nothing."""
    slope = max(1e-15, (second[1] - first[1]) / (second[0] - first[0]))
    return max(1e-6, first[1] - slope * first[0]), slope


def _write_model(path: Path, size: _Size) -> None:
    raw = {
        "model_type": "qwen3_moe", "hidden_size": size.hidden, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "num_hidden_layers": size.layers, "num_experts": size.experts,
        "num_experts_per_tok": size.chosen, "moe_intermediate_size": size.width, "intermediate_size": 64,
        "vocab_size": 512, "max_position_embeddings": 512, "norm_topk_prob": True, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "eos_token_id": 0,
    }  # fmt: skip
    family = FAMILIES["qwen3_moe"]
    config, layout = family.parse_config(raw), family.LAYOUTS[0]
    numbers = np.random.default_rng(0).normal(scale=0.05, size=1 << 20).astype("<f2")

    def tensor(name: str, shape: tuple[int, ...]) -> TensorToWrite:
        return name, "F16", shape, np.resize(np.roll(numbers, len(name)), shape).tobytes

    tensors = [tensor(layout.dense_name(name), shape) for name, shape in dense_shapes(config)]
    for layer in config.moe_layers:
        for expert in range(config.num_experts):
            names = layout.names_of_expert(layer, expert)
            tensors += [tensor(*pair) for pair in zip(names, expert_shapes(config), strict=True)]
    path.mkdir()
    (path / CONFIG_FILE).write_text(json.dumps(raw))
    write_safetensors(path / "model.safetensors", tensors)


def _token(path: Path, cores: int, int8_operations: float, *, expert_slots: int | None) -> _Token:
    """Run a small model; seconds are for that rate of int8 arithmetic."""
    with Engine.open(
        path,
        memory="2GiB",
        threads=cores,
        context=256,
        max_sequences=1,
        expert_slots=expert_slots,
        media=False,
    ) as engine:
        probes = [_native.int8_probe(cores)]
        sequence = engine.submit([1, 2, 3], SamplingParams(max_tokens=_STEPS, ignore_eos=True))
        times, beside = [], []
        before = engine.ledger
        while sequence.result is None:
            begin, earlier = time.perf_counter(), engine.ledger
            engine.step()
            times.append(time.perf_counter() - begin)
            parts = engine.ledger.parts
            beside.append(sum(parts[part] - earlier.parts[part] for part in _BESIDE))
        probes.append(_native.int8_probe(cores))
        lookups = engine.ledger.lookups - before.lookups
        hit_rate = (engine.ledger.hits - before.hits) / lookups if lookups else 1.0
    warm, factor = _STEPS // 4, statistics.mean(probes) / int8_operations
    # A mean beside arithmetic and waiting, because misses are in some steps and not in others.
    return _Token(factor * statistics.median(times[warm:]), factor * statistics.mean(beside[warm:]), hit_rate)
