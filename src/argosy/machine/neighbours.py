"""Measure how busy other processes kept this machine during a measurement.

    with Neighbours() as others: ...   ->  seconds, cores that other processes used, the busiest of them by name

Elsewhere: `resources.py` reads what this process may use.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Another process that used less than this share of a core is not named.
_WORTH_NAMING = 0.05


@dataclass
class Neighbours:
    """A stretch of time, and the processor time that processes other than this one and its children used in it."""

    seconds: float = 0.0
    load: float = 0.0  # one-minute load average at the end
    other_cores: float = 0.0
    others: str = ""  # the busiest ones: "python 0.97, cc1plus 0.40"
    _started: float = 0.0
    _before: dict[int, tuple[str, int, int]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._before = _processes()
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._started
        self.load = os.getloadavg()[0]
        after, own = _processes(), os.getpid()
        shares: dict[str, float] = {}
        for pid, (name, parent, ticks) in after.items():
            if own in (pid, parent) or _has_ancestor(after, pid, own):
                continue
            used = ticks - self._before.get(pid, ("", 0, 0))[2]
            if used > 0:
                shares[name] = shares.get(name, 0.0) + used / _TICKS_PER_S / max(self.seconds, 1e-9)
        self.other_cores = sum(shares.values())
        named = sorted(shares.items(), key=lambda item: -item[1])[:3]
        self.others = ", ".join(f"{name} {share:.2f}" for name, share in named if share >= _WORTH_NAMING)

    def __str__(self) -> str:
        named = f" ({self.others})" if self.others else ""
        return f"load {self.load:.1f}, others used {self.other_cores:.2f} cores{named}"


def _processes() -> dict[int, tuple[str, int, int]]:
    """Process id -> (name, parent, CPU ticks so far)."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            text = Path("/proc", entry, "stat").read_text(errors="replace")
        except OSError:
            continue  # the process ended meanwhile
        name = text[text.index("(") + 1 : text.rindex(")")]
        fields = text[text.rindex(")") + 2 :].split()
        shown = "".join(character if character.isprintable() else "?" for character in name)
        found[int(entry)] = (shown, int(fields[1]), int(fields[11]) + int(fields[12]))
    return found


def _has_ancestor(processes: Mapping[int, tuple[str, int, int]], pid: int, ancestor: int) -> bool:
    while pid in processes and pid != ancestor:
        pid = processes[pid][1]
    return pid == ancestor
