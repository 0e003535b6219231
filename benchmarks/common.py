"""Shared by all benchmarks: machine facts, load from other processes, medians, ratios, CSV rows.

    with Sample() as sample: ...          ->  seconds, load average, cores that other processes used meanwhile
    probe_memory, probe_int8, probe_drive ->  the machine's rates at this moment, to compare with a sample
    alternate({"a": ..., "b": ...}, n)    ->  A B A B, so that a slow minute affects both
    Report("decode")                      ->  a table on stdout, rows in benchmarks/results/decode.csv

Elsewhere: memory caps are in `cgroup.py`; random checkpoints are in `make_checkpoint.py`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import mmap
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from argosy import _native
from argosy.config import GIB, format_bytes
from argosy.machine import resources
from argosy.machine.neighbours import Neighbours
from argosy.machine.probes import drive_rate, memory_rate

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
# Recorded routing and held-out texts, which we may not redistribute: `shared/data` beside the checkout, or named.
DATA = Path(os.environ.get("ARGOSY_BENCH_DATA", REPOSITORY.parent / "shared" / "data"))


def commit() -> str:
    """The measured commit, with a `+` if files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine_line() -> str:
    total = resources.memory_limit().total_bytes
    return (
        f"{resources.usable_cores()} cores ({resources.cpu_model()}), {_native.instruction_sets()[-1]}, "
        f"{format_bytes(total)}, commit {commit()}"
    )


def probe_memory(threads: int) -> float:
    """GB/s at which `threads` read memory at this moment, the median of three measurements."""
    return memory_rate(threads) / 1e9


def probe_int8(threads: int) -> float:
    """Gop/s of int8 products at this moment, two operations per multiply-add, the best of three measurements."""
    return max(_native.int8_probe(threads) for _ in range(3)) / 1e9


def probe_drive(path: Path, record_bytes: int) -> float:
    """GB/s at which the drive reads a file at this moment: `drive_rate`."""
    return drive_rate(path, record_bytes) / 1e9


def probe_new_memory() -> float:
    """Seconds a GiB to fault in memory that was free. In a virtual machine that returns free pages to its host, this
    can take longer than the reads that fill the memory.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, GIB, flags) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        start = time.perf_counter()
        np.frombuffer(memory, np.uint8)[::4096] = 1
        return time.perf_counter() - start


DRIVE_LOOKS = 3  # measurements before a sample, and again after it
DRIVE_RECORD_BYTES = 2 << 20


def look_at_drive(path: Path) -> list[float]:
    """The drive's current rate, measured several times: it changes by a fifth and more from one second to the next."""
    return [probe_drive(path, DRIVE_RECORD_BYTES) for _ in range(DRIVE_LOOKS)]


@dataclass
class Sample(Neighbours):
    """One timed stretch of work: its figures, and how busy other processes kept the machine meanwhile."""

    values: dict[str, float] = field(default_factory=dict)


def alternate(
    variants: Mapping[str, Callable[[], Mapping[str, float]]], repeats: int, *, log: bool = True
) -> dict[str, list[Sample]]:
    """Run the variants in turn for `repeats` rounds; each returns its figures by name."""
    samples: dict[str, list[Sample]] = {name: [] for name in variants}
    for number in range(repeats):
        for name, run in variants.items():
            with Sample() as sample:
                sample.values = dict(run())
            samples[name].append(sample)
            if log:
                figures = "  ".join(f"{key} {value:.4g}" for key, value in sample.values.items())
                print(f"  {number + 1}/{repeats} {name}: {figures}   [{sample}]", file=sys.stderr)
    return samples


class Report:
    """Prints the findings of a benchmark, and appends them to a CSV file."""

    def __init__(self, script: str, *, state: str = "") -> None:
        self.script = script
        self._machine = machine_line()
        self._correct = ""
        self._width = 0
        self._has_header = False
        self._state = state

    def correct(self, sentence: str) -> None:
        """Print what was checked before anything was timed; call this first."""
        self._correct = sentence
        print(f"correct    {sentence}")

    def opening(self) -> None:
        print(f"machine    {self._machine}")
        if self._state:
            print(f"state      {self._state}")

    def line(self, name: str, text: str) -> None:
        print(f"{name:<10} {text}")

    def figure(self, label: str, unit: str, samples: Sequence[Sample], key: str, **facts: Any) -> float:
        """Print one table line: median, min and max of `sample.values[key]`; returns the median."""
        values = [sample.values[key] for sample in samples]
        if not self._has_header:
            print(f"{'':<46}{'median':>10}{'min':>10}{'max':>10}")
            self._has_header = True
        median = statistics.median(values)
        shown = "".join(f"{_short(value):>10}" for value in (median, min(values), max(values)))
        print(f"{label:<46}{shown}  {unit}")
        self.record(label, unit, values, samples, **facts)
        return median

    def ratio(self, label: str, over: float, under: float, *, target: str = "", **facts: Any) -> float:
        """Print one line with a quotient and whether it meets `target`, such as ">= 0.85"."""
        return self.shares(label, [over / under if under else math.nan], target=target, **facts)

    def shares(self, label: str, values: Sequence[float], *, target: str = "", **facts: Any) -> float:
        """Print one line with the median of quotients that each belong to one sample, judged like `ratio`."""
        median = statistics.median(values)
        said = verdict(median, target)
        several = f"{_short(min(values)):>10}{_short(max(values)):>10}" if len(values) > 1 else ""
        note = f"   target {target}: {said}" if target else ""
        print(f"{label:<46}{_short(median):>10}{several}{note}")
        self.record(label, "ratio", values, [], target=target, verdict=said, **facts)
        return median

    def record(
        self, label: str, unit: str, values: Sequence[float], samples: Sequence[Sample], **facts: Any
    ) -> None:
        """Append a row to benchmarks/results/<script>.csv."""
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.script}.csv"
        row = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": self._machine,
            "state": self._state,
            "correct": self._correct,
            "label": label,
            "unit": unit,
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "samples": json.dumps([round(value, 6) for value in values]),
            "load": max((sample.load for sample in samples), default=os.getloadavg()[0]),
            "other_cores": max((sample.other_cores for sample in samples), default=""),
            "others": "; ".join(sample.others for sample in samples if sample.others),
            "facts": json.dumps(facts, default=str),
        }
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    def neighbours(self, samples: Sequence[Sample]) -> None:
        """Print the busiest minute among the samples, so that a reader can discount them."""
        worst = max(samples, key=lambda sample: sample.other_cores)
        self.line("others", f"{worst} at worst")


def verdict(value: float, target: str) -> str:
    """ "met" or "missed"; "not measured" without a number, and an empty text without a target."""
    if not target:
        return ""
    if math.isnan(value):
        return "not measured"
    relation, number = target.split()[:2]
    is_met = value >= float(number) if relation == ">=" else value <= float(number)
    return "met" if is_met else "missed"


def _short(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def run_inside(script: str, arguments: Sequence[object]) -> list[str]:
    """The command that runs a benchmark's inner part in a fresh interpreter."""
    return [sys.executable, str(REPOSITORY / "benchmarks" / script), *map(str, arguments)]


def print_plan(report: Report, plan: Sequence[Sequence[Any]], budget_bytes: int) -> None:
    """Print the memory plan as `argosy show` does."""
    total = sum(nbytes for _, nbytes, _ in plan)
    report.line("plan", f"{format_bytes(total)} of {format_bytes(budget_bytes)}")
    for name, nbytes, note in plan:
        print(f"  {name:<18}{format_bytes(nbytes):>10}   {note}")


def print_parts(parts: Mapping[str, float], wall_s: float) -> None:
    """Print where the wall time went, from the ledger."""
    for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"  {part.replace('_', ' '):<22}{seconds:>8.2f} s {100 * seconds / max(wall_s, 1e-9):>5.0f} %")


def drop_page_cache(model: Path) -> None:
    """Drop the cached pages of a model's files: this needs no privilege, and affects no other file."""
    for path in model.iterdir() if model.is_dir() else [model]:
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def file_bytes(model: Path) -> int:
    """Size of a file, or of all files in a directory."""
    return sum(path.stat().st_size for path in (model.iterdir() if model.is_dir() else [model]))


def tidy_up_when_terminated() -> None:
    """Let SIGTERM end this process like an exception, so that machine settings are restored."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


class CannotSet(Exception):
    """This user may not change a setting of the machine."""


@contextlib.contextmanager
def read_ahead(path: Path, kib: int) -> Iterator[None]:
    """Set `read_ahead_kb` of the drive under `path`, and restore it at the end.

    Raises:
        CannotSet: there is no such setting, or it cannot be written.
    """
    device = path.stat().st_dev
    place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    setting = place / "queue" / "read_ahead_kb"
    if not setting.exists():
        setting = place.parent / "queue" / "read_ahead_kb"  # for a partition: the setting of its drive
    try:
        before = setting.read_text()
        setting.write_text(str(kib))
    except OSError as error:
        raise CannotSet(f"{setting}: {error.strerror}") from None
    try:
        yield
    finally:
        setting.write_text(before)
