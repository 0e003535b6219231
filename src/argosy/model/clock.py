"""Divide the wall time of a step into parts, with one stopwatch that never stops."""

from __future__ import annotations

from time import perf_counter

PARTS = (
    "router", "attention_and_dense", "expert_compute", "waiting_for_reads", "sampling", "encoding", "other",
)  # fmt: skip


class PartClock:
    """`mark(part)` adds the time since the last mark to a part, so the parts sum to the total."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last = perf_counter()

    def mark(self, part: str) -> None:
        now = perf_counter()
        self.seconds[part] += now - self._last
        self._last = now

    def mark_encoding(self, encoding_s: float) -> None:
        """Divide the time since the last mark: `encoding_s` for rows of media; the rest goes to `other`."""
        now = perf_counter()
        self.seconds["encoding"] += encoding_s
        self.seconds["other"] += now - self._last - encoding_s
        self._last = now

    def mark_native(self, spent: tuple[float, float, float, float]) -> None:
        """Divide the time since the last mark by what native code spent (`Stack.take_seconds`); the rest is `other`."""
        now = perf_counter()
        router, dense, experts, waiting = spent
        # No loop: after a step that streamed all weights, Python's own code is out of the CPU cache.
        seconds = self.seconds
        seconds["router"] += router
        seconds["attention_and_dense"] += dense
        seconds["expert_compute"] += experts
        seconds["waiting_for_reads"] += waiting
        seconds["other"] += now - self._last - router - dense - experts - waiting
        self._last = now

    def mark_run(self, compute_s: float) -> None:
        """Divide the time since the last mark: `compute_s` in experts; an expert runner waited for the rest."""
        now = perf_counter()
        self.seconds["expert_compute"] += compute_s
        self.seconds["waiting_for_reads"] += now - self._last - compute_s
        self._last = now
