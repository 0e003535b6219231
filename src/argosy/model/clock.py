"""Where the wall time of a step goes, by one stopwatch that is never stopped."""

from __future__ import annotations

from time import perf_counter

PARTS = ("router", "attention_and_dense", "expert_compute", "waiting_for_reads", "sampling", "other")


class PartClock:
    """`mark(part)` gives the time since the last mark to a part, so the parts sum to the whole."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last = perf_counter()

    def mark(self, part: str) -> None:
        now = perf_counter()
        self.seconds[part] += now - self._last
        self._last = now

    def mark_native(self, spent: tuple[float, float, float]) -> None:
        """The time since the last mark: what native code measured to router, dense and experts, the rest to `other`."""
        now = perf_counter()
        router, dense, experts = spent
        seconds = (
            self.seconds
        )  # no loop: after a step that streamed all weights, Python's own code is out of cache
        seconds["router"] += router
        seconds["attention_and_dense"] += dense
        seconds["expert_compute"] += experts
        seconds["other"] += now - self._last - router - dense - experts
        self._last = now
