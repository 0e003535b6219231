"""Measure how the cost of every reader of strangers' data grows with its input.

    python -m tests.abuse.growth               every row: CPU at n, 2n and 4n, its ratio, and memory
    python -m tests.abuse.growth formats       the rows whose reader or shape has this word

A row is a reader and a shape of input. `n` is chosen so that one reading takes some milliseconds, or is the largest
input that the reader takes. A reader whose cost grows like n log n takes about 4.5 times as long for 4n; one that grows
like n squared takes 16 times. Only CPU time of this process counts, and a row that looks slow is measured again, so
another busy process fails no row. Memory is the peak that tracemalloc sees.

Elsewhere: `readers.py` has the rows; `test_growth.py` requires all of them to grow slowly.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from argosy.errors import ArgosyError

MOST_RATIO = 9.0  # of the cost of 4n over that of n: n log n has 4.5, n squared 16
_SURE_RATIO = 6.0  # below this, one measurement is enough
_LEAST_S = 0.003
_LONGEST_S = 0.6  # for a row that looks slow, n grows until 4n takes this long
_NUM_TRIES = 3
REFUSALS = (ValueError, ArgosyError)
_LEAST_BYTES = 1 << 16  # less counts as this much


@dataclass(frozen=True)
class Row:
    """A reader and a shape of input.

    make: the input of size n, which costs nothing.
    read: the reader; a refusal (ValueError or ArgosyError) counts as read.
    most: the largest n that the reader takes.
    """

    reader: str
    shape: str
    make: Callable[[int], Any]
    read: Callable[[Any], object]
    most: int = 1 << 20

    @property
    def name(self) -> str:
        return f"{self.reader}: {self.shape}"


@dataclass
class Growth:
    """What a row costs at n, 2n and 4n.

    ratio: of the CPU time at 4n to that at n; 0 if even the largest input costs too little to compare.
    memory_ratio: of the peaks of memory, likewise.
    """

    n: int = 0
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return self.seconds[2] / self.seconds[0] if len(self.seconds) == 3 else 0.0

    @property
    def memory_ratio(self) -> float:
        return self.peaks[1] / max(self.peaks[0], _LEAST_BYTES) if self.peaks else 0.0

    @property
    def is_slow(self) -> bool:
        return self.ratio > MOST_RATIO

    @property
    def is_large(self) -> bool:
        return self.memory_ratio > MOST_RATIO


def measure(row: Row, *, least_s: float = _LEAST_S) -> Growth:
    """The growth of a row."""
    n = min(64, max(1, row.most // 4))
    _seconds(row, n)  # whatever is imported or compiled once
    while (cost := _seconds(row, n)) < least_s and 4 * n < row.most:
        n = min(row.most // 4, n * (2 if cost > least_s / 4 else 4))
    if cost < least_s / 8:  # at a quarter of the largest input
        return Growth(n)
    costs = [cost, 0.0, _seconds(row, 4 * n)]
    while costs[2] > _SURE_RATIO * costs[0] and costs[2] < _LONGEST_S and 8 * n <= row.most:
        n *= 2
        costs = [_seconds(row, n), 0.0, _seconds(row, 4 * n)]
    for _ in range(_NUM_TRIES):
        if costs[2] <= MOST_RATIO * costs[0]:
            break
        costs = [max(costs[0], _seconds(row, n)), 0.0, min(costs[2], _seconds(row, 4 * n))]
    return Growth(n, costs)


def measure_memory(row: Row, n: int) -> list[int]:
    """Peaks of memory at n and 4n, beyond the input itself."""
    peaks = []
    for size in (n, 4 * n):
        given = row.make(size)
        tracemalloc.start()
        try:
            with suppress(*REFUSALS):
                row.read(given)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return peaks


def _seconds(row: Row, n: int) -> float:
    given = row.make(n)
    is_collecting = gc.isenabled()
    gc.disable()
    began = time.process_time()
    try:
        with suppress(*REFUSALS):
            row.read(given)
        return max(1e-9, time.process_time() - began)
    finally:
        if is_collecting:
            gc.enable()


def main(words: list[str]) -> int:
    from tests.abuse.readers import rows

    num_slow = 0
    print(
        f"{'reader: shape':64} {'n':>8} {'n ms':>7} {'2n':>7} {'4n':>7} {'ratio':>6} {'4n MB':>7} {'ratio':>6}"
    )
    scratch = tempfile.TemporaryDirectory()
    for row in rows(Path(scratch.name)):
        if not all(word in row.name for word in words):
            continue
        growth = measure(row)
        if growth.seconds:
            growth.seconds[1] = _seconds(row, 2 * growth.n)
        growth.peaks = measure_memory(row, max(1, growth.n // 4))
        shown = [f"{1e3 * one:7.2f}" for one in growth.seconds] or [f"{'-':>7}"] * 3
        mark = " SLOW" * growth.is_slow + " LARGE" * growth.is_large
        print(
            f"{row.name[:64]:64} {growth.n:8} {' '.join(shown)} {growth.ratio:6.1f} {growth.peaks[1] / 1e6:7.2f}"
            f" {growth.memory_ratio:6.1f}{mark}",
            flush=True,
        )
        num_slow += bool(mark)
    print(f"{num_slow} grow too fast")
    return 1 if num_slow else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
