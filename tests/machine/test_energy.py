"""The meter sums the counters of packages and memory, over their wraps, and is absent where one cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from argosy.machine.energy import EnergyMeter
from tests.machine.powercap import RANGE, write_zones


def test_packages_and_memory_are_summed_and_parts_of_packages_are_not(tmp_path: Path) -> None:
    zones = write_zones(tmp_path, {"package-0": 100, "core": 1, "dram": 10, "package-1": 200, "psys": 7})
    meter = EnergyMeter.find(tmp_path)
    assert meter is not None
    for name, passed in {
        "package-0": 3_000_000,
        "core": 9_000_000,
        "dram": 500_000,
        "psys": 50_000_000,
    }.items():
        zones.advance(name, passed)
    assert meter.read() == pytest.approx(3.5)
    zones.advance("package-1", 1_000_000)
    assert meter.read() == pytest.approx(4.5)
    assert meter.read() == pytest.approx(4.5)


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    zones = write_zones(tmp_path, {"package-0": RANGE - 1_000_000})
    meter = EnergyMeter.find(tmp_path)
    assert meter is not None
    zones.set("package-0", 999_999)  # a million before the wrap, the wrap itself, and 999,999 after it
    assert meter.read() == pytest.approx(2.0)


@pytest.mark.parametrize("fault", ["no zones", "no directory", "not readable", "no number", "no range"])
def test_there_is_no_meter_without_all_counters(tmp_path: Path, fault: str) -> None:
    root = tmp_path / "powercap"
    if fault != "no directory":
        root.mkdir()
    if fault not in ("no directory", "no zones"):
        write_zones(root, {"package-0": 1, "package-1": 1})
        path = root / "intel-rapl:1" / ("max_energy_range_uj" if fault == "no range" else "energy_uj")
        path.unlink()
        if fault == "not readable":  # as root reads everything, a directory stands for a file that is refused
            path.mkdir()
        elif fault == "no number":
            path.write_text("-5\n")
    assert EnergyMeter.find(root) is None


def test_a_counter_that_goes_away_leaves_no_number(tmp_path: Path) -> None:
    write_zones(tmp_path, {"package-0": 1})
    meter = EnergyMeter.find(tmp_path)
    assert meter is not None
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.read() is None
