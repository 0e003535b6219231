"""Limit how many sequences may wait, and estimate when there will be room for another."""

from __future__ import annotations

import math
from collections import deque

from argosy.errors import Overloaded


class Admission:
    """Refuses sequences that would exceed the waiting limit.

    Args:
        max_sequences: maximum running sequences.   max_waiting: maximum waiting sequences; None: no limit.
    """

    def __init__(self, max_sequences: int, max_waiting: int | None) -> None:
        self._max_sequences = max_sequences
        self._max_waiting = max_waiting
        self._ends: deque[float] = deque(maxlen=16)  # when the last sequences ended

    def require_room(self, num_more: int, *, num_live: int) -> None:
        """Refuse `num_more` sequences if they exceed the limit; `num_live` already run or wait.

        Raises:
            Overloaded: they exceed the limit.
        """
        limit, num_waiting = self._max_waiting, max(0, num_live - self._max_sequences)
        if limit is not None and num_live + num_more > self._max_sequences + limit:
            waiting = "1 request is" if num_waiting == 1 else f"{num_waiting} requests are"
            raise Overloaded(
                f"the server is busy: {waiting} waiting (limit {limit})",
                retry_after_s=self.seconds_to_next(),
                hint="try again later",
                waiting=num_waiting,
                limit=limit,
            )

    def count_end(self, now: float) -> None:
        """Count the end of a sequence."""
        self._ends.append(now)

    def seconds_to_next(self) -> int:
        """Return the mean time between ends, in whole seconds from 1 to 60."""
        ends = self._ends
        mean = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else 1.0
        return min(60, max(1, math.ceil(mean)))
