"""The energy that the processor packages and their memory have used, where the system measures it and lets us read it.

    /sys/class/powercap/intel-rapl:0            package-0        energy_uj counts up, and wraps at max_energy_range_uj
    /sys/class/powercap/intel-rapl:0/...:0:2    dram, on top of the package; core and uncore are inside it

The kernel exposes these counters (RAPL) on Intel and AMD processors. Since 2020 only root may read them
(CVE-2020-8694), unless the machine's owner allows it; a virtual machine usually has none. Without counters there is
no meter, and Argosy reports no number instead.

Elsewhere: `engine/energy.py` divides the energy among answers and estimates what is not measured.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_PACKAGE = re.compile(r"package-[0-9]+")
_ZONE = re.compile(r"intel-rapl:[0-9]+")
_MOST_ZONES = 64


@dataclass(slots=True)
class _Counter:
    """A counter of microjoules that wraps: after `wraps_at` comes 0."""

    path: Path
    wraps_at: int
    last: int

    def advance(self) -> int:
        """Return the microjoules since the last call.

        Raises:
            OSError, ValueError: the counter cannot be read.
        """
        now = _number(self.path)
        passed = now - self.last if now >= self.last else now - self.last + self.wraps_at + 1
        self.last = now
        return max(0, passed)


class EnergyMeter:
    """Counts joules from its creation on; `find` creates it.

    A counter wraps after some minutes at full power, so read it at least once a minute while its energy matters.
    """

    def __init__(self, counters: list[_Counter]) -> None:
        self._counters = counters
        self._microjoules = 0

    @classmethod
    def find(cls, root: Path | None = None) -> EnergyMeter | None:
        """Return this machine's meter, or None if there is none or this process may not read it."""
        root = POWERCAP if root is None else root
        counters: list[_Counter] = []
        try:
            for zone in sorted(root.iterdir()):
                if _ZONE.fullmatch(zone.name) and _PACKAGE.fullmatch(_text(zone / "name")):
                    counters.append(_counter(zone))
                    counters += [
                        _counter(part)
                        for part in sorted(zone.iterdir())
                        if part.name.startswith(f"{zone.name}:") and _text(part / "name") == "dram"
                    ]
        except (OSError, ValueError):  # without an unreadable counter the sum would be too small
            return None
        return cls(counters) if 0 < len(counters) <= _MOST_ZONES else None

    def read(self) -> float | None:
        """Return the joules since creation, or None if a counter can no longer be read."""
        with contextlib.suppress(OSError, ValueError):
            self._microjoules += sum(counter.advance() for counter in self._counters)
            return self._microjoules / 1e6
        return None


def _counter(zone: Path) -> _Counter:
    path = zone / "energy_uj"
    return _Counter(path, wraps_at=_number(zone / "max_energy_range_uj"), last=_number(path))


def _text(path: Path) -> str:
    with path.open() as file:
        return file.read(64).strip()


def _number(path: Path) -> int:
    text = _text(path)
    if not text.isascii() or not text.isdecimal():
        raise ValueError(f"{path} does not hold a number")
    return int(text)
