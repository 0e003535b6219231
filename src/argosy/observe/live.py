"""Compare the expert cache's recent hit rate with the best possible one, for a server's page.

    last choices of a Recorder  ─ in a thread of its own, at most every EVERY_S seconds ─>  RecentCache

Choices are replayed only on request. The first half of the tokens fills the replayed cache; the second half is
counted if it has at least FEWEST_TOKENS. The numbers are sums over all requests and name no expert.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from argosy.observe.recorder import Recorder
from argosy.observe.replay import hit_rates

EVERY_S = 10.0
FEWEST_TOKENS = 256


@dataclass(frozen=True, slots=True)
class RecentCache:
    """Hit rates over the last `tokens` decode tokens: the engine's own, and those of a replay of its choices."""

    tokens: int
    hit_rate: float
    lru: float
    optimum: float


class LiveCache:
    """Returns the last result at once, and starts a new replay if that result is old.

    Attributes:
        num_slots: the experts that fit in memory; set it when that changes.

    Args:
        clock: seconds.
    """

    def __init__(
        self, recorder: Recorder, *, num_experts: int, num_slots: int, clock: Callable[[], float] = monotonic
    ) -> None:
        self._recorder = recorder
        self._num_experts = num_experts
        self.num_slots = num_slots
        self._clock = clock
        self._found: RecentCache | None = None
        self._begun_at: float | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def __call__(self) -> RecentCache | None:
        """Return the last result, or None until there are enough tokens. Never waits for a replay."""
        with self._lock:
            is_old = self._begun_at is None or self._clock() - self._begun_at >= EVERY_S
            if is_old and (self._thread is None or not self._thread.is_alive()):
                self._begun_at = self._clock()
                self._thread = threading.Thread(target=self._find, name="argosy-replay", daemon=True)
                self._thread.start()
        return self._found

    def _find(self) -> None:
        recent = self._recorder.recent()
        half = len(recent.choices) // 2
        if half < FEWEST_TOKENS:
            return
        rates = hit_rates(
            recent.choices,
            recent.steps,
            num_experts=self._num_experts,
            slots=self.num_slots,
            counted_from=half,
            policies=("lru", "optimum"),
        )
        lookups = int(recent.lookups[-1] - recent.lookups[half])
        hits = int(recent.hits[-1] - recent.hits[half])
        self._found = RecentCache(
            len(recent.choices) - half, hits / max(1, lookups), rates["lru"], rates["optimum"]
        )
