"""Where the wall time of a step goes, by one stopwatch that is never stopped."""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter

PARTS = ("router", "attention_and_dense", "expert_compute", "waiting_for_reads", "sampling", "other")
NATIVE_PARTS = PARTS[:3]  # what native code measures itself, in the order in which it tells


class PartClock:
    """`mark(part)` gives the time since the last mark to a part, so the parts sum to the whole."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last = perf_counter()

    def mark(self, part: str) -> None:
        now = perf_counter()
        self.seconds[part] += now - self._last
        self._last = now

    def mark_native(self, seconds: Iterable[float]) -> None:
        """The time since the last mark: what native code measured to each of `NATIVE_PARTS`, the rest to `other`."""
        self.mark("other")
        for part, spent in zip(NATIVE_PARTS, seconds, strict=True):
            self.seconds[part] += spent
            self.seconds["other"] -= spent
