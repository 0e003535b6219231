"""How close do the products get to the machine's limits: reading weights for one token, arithmetic for many?

    python benchmarks/kernels.py --rows 768 --cols 2048
    python benchmarks/kernels.py --peer --formats iq2_xxs iq3_s --tokens 1 2 4 6 32 128 512      # beside llama.cpp

For every format and number of threads: bytes of weights per second with one token, weights cold, over a plain read of
memory; and operations per second with more tokens, two per multiply-add. For quantized formats these are int8
operations, over the peak rate of the instruction or over what the same plain read allows, whichever is less; q8 counts
twice, because its activations have two bytes. Figures are the best of many short samples,
and limits are the best of all probes of the run, one before each figure: a neighbour can only slow a sample down.

With `--peer`, each figure is how many times as fast as llama.cpp's product of the same blocks Argosy's is: the ratio of
the medians of samples that take turns in this process, then that of the best samples, weights cold in both. The blocks
are random, so an index of a grid may be any. For one token the share of a plain read follows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import get_args

import gguf
import numpy as np
from numpy.typing import NDArray

import ggml
from argosy import _native
from argosy.checkpoint.block_types import SLOT_FORMATS
from argosy.config import MEASURED_FORMATS, AskAhead, Format
from argosy.machine import tuning
from common import Report, Sample, verdict
from engines import passes
from gguf_blocks import RANDOM_TYPES, random_blocks, to_blocks

FORMATS = MEASURED_FORMATS
FLOATS = FORMATS[: FORMATS.index("q8")]  # formats with float32 activations
ARENA_BYTES = 256 << 20  # eight times the last-level cache of the machine this was written on
COLD_SAMPLE_BYTES = 12 << 20  # takes about half a millisecond
TARGET = ">= 0.95"  # share of a plain read, for one token
TARGETS = {"q2_k": ">= 0.88"}


class Matrices:
    """An arena full of matrices of one format. Any bytes are valid quants; these are also finite in all formats."""

    def __init__(self, memory: _native.Arena, format: Format, rows: int, cols: int) -> None:
        size = _native.matrix_bytes(format, rows, cols)
        self.format, self.rows, self.cols, self.nbytes = format, rows, cols, size
        self.all = [
            _native.Matrix(memory, i * size, format, rows, cols) for i in range(memory.nbytes // size)
        ]
        self._next = 0

    def take(self, count: int) -> Sequence[_native.Matrix]:
        """The next `count` matrices; the cache has dropped them by the time they come round again."""
        if self._next + count > len(self.all):
            self._next = 0
        self._next += count
        return self.all[self._next - count : self._next]


def best_rate(work: Callable[[], float], seconds: float) -> float:
    """The best rate (amount done per second) that `work` reaches."""
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        amount = work()
        best = max(best, amount / (time.perf_counter() - begin))
    return best


def require_right(runtime: _native.Runtime, memory: _native.Arena, matrices: Matrices) -> None:
    rows, cols = matrices.rows, matrices.cols
    x = np.random.default_rng(1).standard_normal((9, cols), dtype=np.float32)
    out = np.empty((9, rows), np.float32)
    _native.matmul(runtime, [matrices.all[0]], x, [out])
    weights = _native.dequantize(matrices.format, memory.array()[: matrices.nbytes], rows, cols)
    expected = x.astype(np.float64) @ weights.T.astype(np.float64)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(weights).T.astype(np.float64)
    # An 8-bit activation is off by up to 1/254 of the largest in its group.
    if not np.all(np.abs(out - expected) <= 0.01 * magnitude):
        raise SystemExit(f"{matrices.format}: the product is not that of the dequantised weights")
    alone = np.empty((1, rows), np.float32)
    for token in range(9):
        _native.matmul(runtime, [matrices.all[0]], x[token : token + 1], [alone])
        if not np.array_equal(alone[0], out[token]):
            raise SystemExit(f"{matrices.format}: a token's product depends on the others in the call")


def read_rate(runtime: _native.Runtime, matrices: Matrices, seconds: float) -> float:
    """Bytes of weights per second with one token and weights that are in no cache."""
    count = max(1, COLD_SAMPLE_BYTES // matrices.nbytes)
    x = np.ones((1, matrices.cols), np.float32)
    outs = [np.empty((1, matrices.rows), np.float32) for _ in range(count)]

    def work() -> float:
        _native.matmul(runtime, matrices.take(count), x, outs)
        return count * matrices.nbytes

    return best_rate(work, seconds)


def product_operations(matrices: Matrices, tokens: int) -> int:
    """Operations of the product with one matrix."""
    return 2 * passes(matrices.format) * tokens * matrices.rows * matrices.cols


def product_rate(runtime: _native.Runtime, matrices: Matrices, tokens: int, seconds: float) -> float:
    """Operations per second."""
    x = np.random.default_rng(2).standard_normal((tokens, matrices.cols), dtype=np.float32)
    outs = [np.empty((tokens, matrices.rows), np.float32) for _ in range(2)]
    operations = 2 * product_operations(matrices, tokens)

    def work() -> float:
        _native.matmul(runtime, matrices.take(2), x, outs)
        return operations

    return best_rate(work, seconds)


def finite_bits(memory: _native.Arena) -> None:
    """Fill memory with random bytes that are finite scales in every format."""
    bits = np.random.default_rng(0).integers(0, 256, memory.nbytes, dtype=np.uint8)
    np.bitwise_and(bits, 0x3B, out=memory.array())
    # Otherwise some bfloat16 scales would be subnormal numbers, which are slow.
    np.bitwise_or(memory.array(), 0x20, out=memory.array())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--cols", type=int, default=2048)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="*", default=[2, 4, 8, 32, 128])
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=FORMATS)
    sets = _native.instruction_sets()
    parser.add_argument("--instruction-set", choices=sets, default=sets[-1])
    parser.add_argument("--ask-ahead", choices=get_args(AskAhead), help="default: measured for each format")
    parser.add_argument("--seconds", type=float, default=0.5, help="per figure")
    parser.add_argument("--peer", action="store_true", help="ratios to llama.cpp's products")
    options = parser.parse_args()

    report = Report("kernels")
    name = options.instruction_set
    memory = _native.Arena(ARENA_BYTES)
    finite_bits(memory)
    formats = [Matrices(memory, format, options.rows, options.cols) for format in options.formats]
    with tempfile.TemporaryDirectory() as own_cache:
        os.environ["ARGOSY_CACHE"] = own_cache
        choices = {threads: tuning.choose(threads, name) for threads in options.threads}
    with Sample() as sample:
        for threads in options.threads:
            runtime = _native.Runtime(threads, choices[threads].tunings(options.ask_ahead), name)
            if options.peer:
                compare(report, runtime, memory, options, is_first=threads == options.threads[0])
                continue
            if threads == options.threads[0]:
                for matrices in formats:
                    require_right(runtime, memory, matrices)
                report.correct(
                    f"{len(formats)} formats: the dequantised weights' product, each token its own bits"
                )
                report.opening()
                report.line("prefetch", options.ask_ahead or "as measured for each format")
            measure(report, runtime, formats, options)
    report.line("others", str(sample))


def measure(
    report: Report, runtime: _native.Runtime, formats: Sequence[Matrices], options: argparse.Namespace
) -> None:
    """Print the table of one number of threads."""
    threads, name = runtime.num_threads, runtime.instruction_set
    shape = f"{options.rows} x {options.cols}, {threads} threads"
    report.line("shape", f"{shape}; best of {options.seconds} s a figure; shares are of the nearer limit")
    counts = "".join(f"{f'{tokens} tokens':>19}" for tokens in options.tokens)
    print(f"{'':<8}{'1 token, cold':>29}{counts}")
    read_wall = max(_native.memory_probe(threads, ARENA_BYTES, name) for _ in range(5))
    peak = _native.int8_probe(threads, name)
    for matrices in formats:
        read_wall = max(read_wall, _native.memory_probe(threads, ARENA_BYTES, name))
        rate = read_rate(runtime, matrices, options.seconds)
        facts = {"format": matrices.format, "shape": shape}
        target = "" if matrices.format in FLOATS else TARGETS.get(matrices.format, TARGET)
        said = verdict(rate / read_wall, target)
        cells = [f"{rate / 1e9:>10.1f} GB/s ({rate / read_wall:.2f}) {said:<6}"]
        report.record(
            "weights read",
            "GB/s",
            [rate / 1e9],
            [],
            wall=read_wall / 1e9,
            target=target,
            verdict=said,
            **facts,
        )
        for tokens in options.tokens:
            peak = max(peak, _native.int8_probe(threads, name))
            rate = product_rate(runtime, matrices, tokens, options.seconds)
            if matrices.format in FLOATS:
                cells.append(f"{rate / 1e9:>7.0f} Gop/s{'':7}")
                report.record("float32", "Gop/s", [rate / 1e9], [], tokens=tokens, **facts)
                continue
            # The rate that one read of the weights allows.
            operations_per_byte = product_operations(matrices, tokens) / matrices.nbytes
            limit = min(peak, read_wall * operations_per_byte)
            cells.append(f"{rate / 1e9:>7.0f} Gop/s ({rate / limit:.2f})")
            report.record(
                "int8", "Gop/s", [rate / 1e9], [], peak=peak / 1e9, limit=limit / 1e9, tokens=tokens, **facts
            )
        print(f"{matrices.format:<8}{''.join(cells)}")
    report.line("limits", f"read {read_wall / 1e9:.1f} GB/s, int8 {peak / 1e9:.0f} Gop/s")


# ── beside llama.cpp ────────────────────────────────────────────────────────────────────────────────────────────────


def blocks_of(block_type: str, rows: int, cols: int) -> NDArray[np.uint8]:
    """Blocks of one matrix."""
    random = np.random.default_rng(3)
    values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[block_type]]
    if block_type == "NVFP4":
        blocks = random.integers(0, 256, (rows * cols // values, nbytes), np.uint8)
        blocks[:, :4] = random.integers(0x30, 0x40, (len(blocks), 4))  # scales from 0.5 to 1.9
        return blocks.reshape(-1)
    if block_type in RANDOM_TYPES:
        return random_blocks(block_type, rows * cols // values, 1.0, random).reshape(-1)
    return to_blocks(block_type, random.standard_normal((rows, cols), np.float32)).reshape(-1)


class Beside:
    """The same matrix again and again, in Argosy's memory and in llama.cpp's."""

    def __init__(self, memory: _native.Arena, format: Format, rows: int, cols: int) -> None:
        (block_type,) = (name for name, slot in SLOT_FORMATS.items() if slot == format)
        blocks = blocks_of(block_type, rows, cols)
        self.ours = Matrices(memory, format, rows, cols)
        panels = _native.transcode(block_type, blocks, rows, cols)
        for number in range(len(self.ours.all)):
            memory.array()[number * self.ours.nbytes :][: self.ours.nbytes] = panels
        self.theirs = ggml.Products(block_type, rows, cols, len(self.ours.all), blocks)

    def samples(
        self, runtime: _native.Runtime, tokens: int, seconds: float
    ) -> tuple[list[float], list[float]]:
        """Seconds that a product takes, in Argosy and in llama.cpp; the samples take turns.

        Raises:
            SystemExit: their products differ.
        """
        x = np.random.default_rng(2).standard_normal((tokens, self.ours.cols), dtype=np.float32)
        count = min(len(self.ours.all), max(1, COLD_SAMPLE_BYTES // self.ours.nbytes) if tokens == 1 else 2)
        outs = [np.empty((tokens, self.ours.rows), np.float32) for _ in range(count)]
        graphs = self.theirs.prepare(x, runtime.num_threads, count)
        ours: list[float] = []
        theirs: list[float] = []
        end = time.perf_counter() + 2 * seconds
        while time.perf_counter() < end or len(ours) < 5:
            matrices = self.ours.take(count)
            begin = time.perf_counter()
            _native.matmul(runtime, matrices, x, outs)
            ours.append((time.perf_counter() - begin) / count)
            graph = graphs[len(theirs) % len(graphs)]
            begin = time.perf_counter()
            graph.run()
            theirs.append((time.perf_counter() - begin) / count)
            if runtime.num_threads > 1:
                ggml.wait_for_spinning_threads()
        expected = graphs[0].out(0)
        for graph in graphs:
            graph.free()
        # Both round activations to 8 bits, llama.cpp 256 of them together.
        if not np.abs(outs[0] - expected).max() <= 0.03 * np.abs(expected).max():
            raise SystemExit(f"{self.ours.format}: the product is not llama.cpp's")
        return ours[1:], theirs[1:]


def compare(
    report: Report,
    runtime: _native.Runtime,
    memory: _native.Arena,
    options: argparse.Namespace,
    *,
    is_first: bool,
) -> None:
    """Print how many times as fast as llama.cpp's each product is, for one number of threads."""
    threads, name = runtime.num_threads, runtime.instruction_set
    shape = f"{options.rows} x {options.cols}, {threads} threads"
    formats = [format for format in options.formats if format in SLOT_FORMATS.values()]
    for number, format in enumerate(formats):
        beside = Beside(memory, format, options.rows, options.cols)
        cells = []
        for tokens in options.tokens:
            ours, theirs = beside.samples(runtime, tokens, options.seconds)
            times = statistics.median(theirs) / statistics.median(ours)
            best = min(theirs) / min(ours)
            cells.append(f"{times:>8.2f}x {best:.2f}x")
            facts = {"format": format, "shape": shape, "tokens": tokens, "best": best}
            report.record("over llama.cpp", "x", [times], [], **facts)
            if tokens == 1:
                wall = max(_native.memory_probe(threads, ARENA_BYTES, name) for _ in range(3))
                rate = beside.ours.nbytes / statistics.median(ours)
                cells.append(f" ({rate / 1e9:.1f} GB/s, {rate / wall:.2f} of a read)")
                report.record("share of a read", "", [rate / wall], [], **facts)
        if number == 0 and is_first:
            report.correct(
                f"{format}: the product is llama.cpp's; every other one is checked before its figure"
            )
            report.opening()
        if number == 0:
            report.line(
                "shape", f"{shape}; {', '.join(map(str, options.tokens))} tokens; times llama.cpp's speed"
            )
        print(f"{format:<8}{''.join(cells)}", flush=True)
        beside.theirs.free()


if __name__ == "__main__":
    main()
