"""Keep measurements of this machine, and the rates that its drive reached while models ran.

    `--calibrate`                ->  the last measurements, for this machine, drive and version  ┐
    reads of models that ran     ->  the last runs that read a lot, for this drive               ┴─>  Rates

A drive has bad moments: others share it, and virtual ones have credits. So a drive's rate is the median of several
measurements, and their spread is its margin of error. What the drive did while models ran outranks what a
calibration found in its minute. A rate is printed with its age.

The files are in the user's cache, readable by their owner alone.

Elsewhere: `forecast/calibration.py` measures; the engine notes what its store read; `machine/rates.py` has guesses.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from argosy.config import MIB, counted
from argosy.directory import Directory
from argosy.errors import UsageError
from argosy.machine import resources, tuning
from argosy.machine.rates import FORMAT, Rates, guess
from argosy.strict_json import JsonError, parse_json
from argosy.user_directories import measurement_file

_MOST_MEASURED = 5
_MOST_RUNS = 32
_RECENT_RUNS = 8  # their median counts
_RECENT_S = 30 * 86_400.0  # older runs are forgotten
_FEWEST_BYTES = 1 << 30  # fewer bytes say little
_MOST_SPREAD = 4.0
_FULL_RECORD_BYTES = 1 << 20


class Run(NamedTuple):
    """The rate of a drive during one run.

    at: when the run ended, in seconds since 1970.   bytes_per_s: while the drive was busy.   read_bytes: size of
    one read.
    """

    at: float
    bytes_per_s: float
    read_bytes: float


@dataclass(slots=True)
class _Reads:
    nbytes: float = 0.0
    reads: float = 0.0
    busy_s: float = 0.0


class DriveReads:
    """Sums what a store reads during a run: one sum for steps with prompts, one for steps without.

    The faster of the two shows what the drive can do: a prompt computes while it reads, which takes processor time
    from the readers, and a single token reads little at a time.
    """

    def __init__(self) -> None:
        self._reads = {True: _Reads(), False: _Reads()}

    def add(self, before: dict[str, float], after: dict[str, float], *, is_decode: bool) -> None:
        """Add the reads between two snapshots of `Store.stats`; reads from the page cache do not count."""
        if after["cached_bytes"] == before["cached_bytes"]:
            reads = self._reads[is_decode]
            reads.nbytes += after["bytes_read"] - before["bytes_read"]
            reads.reads += after["reads"] - before["reads"]
            reads.busy_s += after["busy_seconds"] - before["busy_seconds"]

    def note(self, path: Path) -> None:
        """Keep the drive's rate if the run read enough.

        Raises:
            OSError: the file cannot be written.
        """
        enough = [one for one in self._reads.values() if one.nbytes >= _FEWEST_BYTES and one.busy_s > 0]
        if not enough or (place := _drive_file(path)) is None:
            return
        best = max(enough, key=lambda one: one.nbytes / one.busy_s)
        run = Run(time.time(), best.nbytes / best.busy_s, best.nbytes / max(1.0, best.reads))
        _write(place, [*_runs(path), run][-_MOST_RUNS:])


def load(path: Path, *, threads: int | None = None) -> Rates | None:
    """Load this version's measurements of this machine and of the drive that holds `path`; None if there are none.

    Args:
        threads: the number of threads used for measuring; None: as many as an engine uses.

    Raises:
        UsageError: the file is damaged.
    """
    kept = _measured(_cache_file(path, threads or tuning.known_threads()))
    if not kept:
        return None
    newest = kept[-1][1]
    alike = [
        rates for _, rates in kept if [size for size, _ in rates.drive] == [size for size, _ in newest.drive]
    ]
    found = [[rates.drive[at][1] for rates in alike] for at in range(len(newest.drive))]
    drive = tuple(
        (size, statistics.median(rates)) for (size, _), rates in zip(newest.drive, found, strict=True)
    )
    spread = max([newest.drive_spread, *map(_spread, found)])
    times = "once" if len(kept) == 1 else f"{len(kept)} times, the last"
    told = f"measured {times} {_age(kept[-1][0])}"
    return _as_seen(replace(newest, drive=drive, drive_spread=spread, drive_source=told), path)


def rates_here(path: Path, *, threads: int | None = None) -> Rates:
    """Load measurements of this machine, as `load` does, or guess the rates.

    Raises:
        UsageError: the file of measurements is damaged.
    """
    if (measured := load(path, threads=threads)) is not None:
        return measured
    return _as_seen(guess(resources.cpu_model(), threads or tuning.known_threads()), path)


def save(rates: Rates, path: Path) -> Path:
    """Add a measurement to the earlier ones; return the file."""
    place = _cache_file(path, rates.cores)
    try:
        kept = _measured(place)
    except UsageError:  # a damaged file is replaced
        kept = []
    entries = [{"at": at, "rates": one.as_dict()} for at, one in [*kept, (time.time(), rates)]]
    _write(place, entries[-_MOST_MEASURED:])
    return place


def _as_seen(rates: Rates, path: Path) -> Rates:
    """Replace the drive's rate by that of recent runs, if there are any."""
    runs = _runs(path)[-_RECENT_RUNS:]
    if not runs:
        return rates
    rate = statistics.median(run.bytes_per_s for run in runs)
    size = statistics.median(run.read_bytes for run in runs)
    factor = rate / rates.drive_rate(max(size, _FULL_RECORD_BYTES))
    times = "one run of a model" if len(runs) == 1 else f"{len(runs)} runs of models, the last"
    return replace(
        rates,
        drive=tuple((size, rate * factor) for size, rate in rates.drive),
        drive_spread=max(
            _spread([run.bytes_per_s for run in runs]), 1.0 if len(runs) > 2 else rates.drive_spread
        ),
        drive_source=f"{rate / 1e9:.2g} GB/s in {times} {_age(runs[-1].at)}",
    )


def _spread(rates: Sequence[float]) -> float:
    """Return the factor between the median and the rate farthest from it."""
    middle = statistics.median(rates)
    return min(_MOST_SPREAD, max(middle / min(rates), max(rates) / middle))


def _age(at: float) -> str:
    seconds = max(0.0, time.time() - at)
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            number = int(seconds // length)
            return f"{counted(number, unit)} ago"
    return "just now"


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _cache_file(path: Path, threads: int) -> Path:
    drive = resources.drive_of(path)
    facts = (
        resources.cpu_model(), threads, resources.memory_limit().total_bytes >> 30, os.uname().nodename,
        drive.device if drive else None, metadata.version("argosy"), FORMAT,
    )  # fmt: skip
    return measurement_file("rates", facts)


def _drive_file(path: Path) -> Path | None:
    drive = resources.drive_of(path)
    return None if drive is None else measurement_file("drive", (os.uname().nodename, drive.device))


def _measured(place: Path) -> list[tuple[float, Rates]]:
    """Return the kept measurements, oldest first.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        with Directory(place.parent) as cache:
            data = cache.read(place.name, MIB)
    except OSError:
        return []
    try:
        entries = parse_json(data)
        if not isinstance(entries, list) or not 1 <= len(entries) <= _MOST_MEASURED:
            raise JsonError(f"is not a list of 1 to {_MOST_MEASURED} measurements")
        for entry in entries:
            if not isinstance(entry, dict) or entry.keys() != {"at", "rates"} or not _is_number(entry["at"]):
                raise JsonError("contains a measurement without a time")
        return [(float(entry["at"]), Rates.from_value(entry["rates"])) for entry in entries]
    except JsonError as error:
        raise UsageError(
            f"the rates of this machine cannot be read: {error}", hint="`--calibrate` measures them again"
        ) from None


def _runs(path: Path) -> list[Run]:
    """Return the recent runs of a drive, oldest first; an unreadable file counts as empty."""
    if (place := _drive_file(path)) is None:
        return []
    try:
        with Directory(place.parent) as cache:
            entries = parse_json(cache.read(place.name, MIB))
    except (OSError, JsonError):
        return []
    found = [
        Run(*map(float, entry))
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, list) and len(entry) == len(Run._fields) and all(map(_is_number, entry))
    ]
    now = time.time()
    return [run for run in found if now - _RECENT_S < run.at <= now + 60]


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 1e15  # type: ignore[operator]


def _write(place: Path, value: object) -> None:
    with Directory(place.parent, make=True, mode=0o700) as cache, cache.replacing(place.name) as write:
        write(json.dumps(value).encode())
