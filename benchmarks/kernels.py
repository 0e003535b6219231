"""How close do the products get to the machine's limits: reading weights for one token, arithmetic for many?

    python benchmarks/kernels.py --rows 768 --cols 2048

For every format and number of threads: bytes of weights per second with one token, weights cold, over a plain read of
memory; and operations per second with more tokens, two per multiply-add. For quantized formats these are int8
operations, over the peak rate of the instruction or over what the same plain read allows, whichever is less; q8 counts
twice, because its activations have two bytes. Figures are the best of many short samples,
and limits are the best of all probes of the run, one before each figure: a neighbour can only slow a sample down.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np

from argosy import _native
from argosy.config import AskAhead, Format
from argosy.machine import tuning
from common import Report, Sample, verdict
from engines import passes

FORMATS = get_args(Format)
FLOATS = ("f32", "f16", "bf16", "f8")  # formats with float32 activations
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


if __name__ == "__main__":
    main()
