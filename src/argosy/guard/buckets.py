"""Rate limits: each name may act N times a minute.

    name  ->  Buckets.take  ->  0: allowed, or seconds to wait

The table of names is bounded; the name counted longest ago is forgotten first.

Elsewhere: a name is a network in `strangers.py` and a person in `users.py`.
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
        most_names: the size of the table.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, most_names: int = MOST_NAMES) -> None:
        self._clock, self._most_names = clock, most_names
        self._lock = threading.Lock()
        # name -> actions left, and when that was computed
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, per_minute: int) -> int:
        """Count one action; return 0 if it is allowed, or the seconds until the next one is."""
        now = self._clock()
        with self._lock:
            left, at = self._left.pop(name, (float(per_minute), now))
            left = min(float(per_minute), left + (now - at) * per_minute / 60)
            if len(self._left) >= self._most_names:
                self._left.popitem(last=False)
            self._left[name] = (max(0.0, left - 1), now)
        return 0 if left >= 1 else max(1, math.ceil((1 - left) * 60 / per_minute))
