"""Something allowed so many times a minute, counted for each of many names.

    name  ->  Buckets.take  ->  0: allowed, or seconds to wait

The table of names is bounded; the name that was counted longest ago is forgotten first.

Elsewhere: names are networks in `strangers.py`, and persons in `users.py`.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

MOST_NAMES = 4096


class Buckets:
    """Any thread may use it.

    Args:
        most_names: in the table.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, most_names: int = MOST_NAMES) -> None:
        self._clock, self._most_names = clock, most_names
        self._lock = threading.Lock()
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # how many are left, and when

    def take(self, name: str, per_minute: int) -> int:
        """Count once more; return 0 if it is allowed, and otherwise after how many seconds one will be."""
        now = self._clock()
        with self._lock:
            left, at = self._left.pop(name, (float(per_minute), now))
            left = min(float(per_minute), left + (now - at) * per_minute / 60)
            if len(self._left) >= self._most_names:
                self._left.popitem(last=False)
            self._left[name] = (max(0.0, left - 1), now)
        return 0 if left >= 1 else max(1, math.ceil((1 - left) * 60 / per_minute))
