"""What was measured is kept for its machine, drive and version, with what the drive did while models ran."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from argosy.errors import UsageError
from argosy.machine import kept_rates
from argosy.machine.kept_rates import DriveReads
from argosy.machine.rates import Rates, guess
from argosy.machine.resources import usable_cores


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARGOSY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found = [1_800_000_000.0]
    monkeypatch.setattr(kept_rates.time, "time", lambda: found[0])
    return found


def test_rates_are_kept_privately_for_one_drive_and_version(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept_rates.load(tmp_path) is None
    rates = guess("AMD EPYC", usable_cores())
    place = kept_rates.save(rates, tmp_path)
    assert place.parent == own_cache
    assert place.stat().st_mode & 0o777 == 0o600
    assert kept_rates.load(tmp_path) == replace(rates, drive_source="measured once just now")
    assert kept_rates.load(Path("/proc")) is None  # another file system
    assert kept_rates.load(tmp_path, threads=usable_cores() + 1) is None
    monkeypatch.setattr(kept_rates.metadata, "version", lambda name: "99.0")
    assert kept_rates.load(tmp_path) is None


def test_rates_of_another_version_of_the_file_are_measured_again_and_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_rates.save(guess("", usable_cores()), tmp_path)
    monkeypatch.setattr(kept_rates, "FORMAT", "argosy-rates-99")
    assert kept_rates.load(tmp_path) is None
    assert not kept_rates.rates_here(tmp_path).is_measured


@pytest.mark.parametrize("layer_s", ["{", "1e-320", "0", "1e300"])
def test_a_damaged_file_is_named(tmp_path: Path, layer_s: str) -> None:
    place = kept_rates.save(guess("", usable_cores()), tmp_path)
    text = place.read_text()
    place.write_text(re.sub(r'("layer_s": )[^,]*', rf"\g<1>{layer_s}", text))
    assert place.read_text() != text
    with pytest.raises(UsageError, match="--calibrate"):
        kept_rates.load(tmp_path)


def measured(gb_per_s: float) -> Rates:
    rates = guess("AMD EPYC", usable_cores())
    return replace(rates, drive=((1 << 20, gb_per_s * 1e9), (4 << 20, gb_per_s * 1.1e9)), spread=1.1)


def ran(path: Path, gb_per_s: float) -> None:
    """A run of a model that read so much at that rate."""
    reads = DriveReads()
    before = {"bytes_read": 0.0, "reads": 0.0, "cached_bytes": 0.0, "busy_seconds": 0.0}
    nbytes = 4.0 * 2**30
    after = {"bytes_read": nbytes, "reads": nbytes / 2**20, "busy_seconds": nbytes / gb_per_s / 1e9}
    reads.add(before, before | after, is_decode=False)
    slow = {"bytes_read": 2e9, "reads": 2e3, "busy_seconds": 100.0}  # few reads at once
    reads.add(before, before | slow, is_decode=True)
    reads.note(path)


def loaded(path: Path) -> Rates:
    found = kept_rates.load(path)
    assert found is not None
    return found


def test_a_slow_moment_of_the_drive_is_one_of_several_measurements(tmp_path: Path, now: list[float]) -> None:
    for gb_per_s in (2.5, 2.6, 0.5):
        now[0] += 86_400
        kept_rates.save(measured(gb_per_s), tmp_path)
    now[0] += 7200
    found = loaded(tmp_path)
    assert [rate for _, rate in found.drive] == pytest.approx([2.5e9, 2.75e9])
    assert found.drive_spread == 4.0  # a fifth of the median, and no more than four
    assert found.drive_source == "measured 3 times, the last 2 hours ago"
    assert found.scaled(1 / 1.1).drive_rate(1 << 20) == pytest.approx(2.5e9 / 4.0)
    assert found.scaled(1.0).drive == found.drive
    for _ in range(10):
        kept_rates.save(measured(1.0), tmp_path)
    found = loaded(tmp_path)  # the last five
    assert found.drive_rate(1 << 20) == pytest.approx(1e9)
    assert found.drive_spread == pytest.approx(1.0)


def test_what_the_drive_did_while_models_ran_counts_before_a_calibration(
    tmp_path: Path, now: list[float]
) -> None:
    kept_rates.save(measured(0.5), tmp_path)
    now[0] += 3 * 86_400
    for gb_per_s in (2.0, 2.4, 2.2):
        ran(tmp_path, gb_per_s)
    now[0] += 120
    found = loaded(tmp_path)
    assert [rate for _, rate in found.drive] == pytest.approx([2.2e9, 2.42e9])
    assert found.drive_spread == pytest.approx(1.1)
    assert found.drive_source == "2.2 GB/s in 3 runs of models, the last 2 minutes ago"
    now[0] += 31 * 86_400
    assert loaded(tmp_path).drive_rate(1 << 20) == pytest.approx(0.5e9)
    assert loaded(tmp_path).drive_source == "measured once 34 days ago"


def test_runs_tell_the_rate_of_a_drive_that_was_never_measured(tmp_path: Path) -> None:
    ran(tmp_path, 1.5)
    found = kept_rates.rates_here(tmp_path)
    assert found.drive_rate(1 << 20) == pytest.approx(1.5e9)
    assert found.drive_source == "1.5 GB/s in one run of a model just now"
    assert not found.is_measured


def test_reads_of_the_page_cache_are_none_of_the_drive(tmp_path: Path) -> None:
    reads = DriveReads()
    before = {"bytes_read": 0.0, "reads": 0.0, "cached_bytes": 0.0, "busy_seconds": 0.0}
    reads.add(
        before, {"bytes_read": 8e9, "reads": 8e3, "cached_bytes": 1.0, "busy_seconds": 1.0}, is_decode=False
    )
    reads.note(tmp_path)
    reads.add(
        before, {"bytes_read": 5e8, "reads": 5e2, "cached_bytes": 0.0, "busy_seconds": 1.0}, is_decode=True
    )
    reads.note(tmp_path)  # too little to tell
    assert kept_rates.rates_here(tmp_path).drive_source == ""


def test_a_file_of_runs_that_cannot_be_read_is_as_none(tmp_path: Path, own_cache: Path) -> None:
    ran(tmp_path, 1.5)
    (place,) = own_cache.glob("drive-*.json")
    assert place.stat().st_mode & 0o777 == 0o600
    for damaged in ("{", "[[1]]", json.dumps([[1e9, "x", 1]]), "7"):
        place.write_text(damaged)
        assert kept_rates.rates_here(tmp_path).drive_source == ""
