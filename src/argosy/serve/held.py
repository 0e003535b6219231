"""Memory that bodies of requests may take, all together: a line of the memory plan.

    part of a body, cost of reading it  ->  Share.hold  ->  within the pool, or refused
    end of the request, however it ends ->  Share.release

A body costs more than its bytes: JSON as Python's objects takes up to forty times as much. So it is charged for what
reading it will take before it is read.

Elsewhere: what reading costs is `body.py`; the plan is `engine/memory_plan.py`.
"""

from __future__ import annotations

import threading

from argosy.engine.memory_plan import BODY_BYTES
from argosy.errors import Overloaded

_RETRY_S = 1


class Pool:
    """So many bytes for all requests."""

    def __init__(self, max_bytes: int = BODY_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.peak_bytes = 0
        self._lock = threading.Lock()

    def share(self) -> Share:
        return Share(self)

    def add(self, num_bytes: int) -> bool:
        """Take so many bytes if there is room for them; returns whether there was."""
        with self._lock:
            if self.num_bytes + num_bytes > self.max_bytes:
                return False
            self.num_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.num_bytes)
            return True

    def give_back(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes -= num_bytes


class Share:
    """The part of the pool that one request holds."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.num_bytes = 0

    @property
    def max_bytes(self) -> int:
        """The most that one request could hold alone."""
        return self._pool.max_bytes

    def hold(self, num_bytes: int) -> None:
        """Take so many more.

        Raises:
            Overloaded: the others leave no room for them.
        """
        if not self._pool.add(num_bytes):
            raise Overloaded("the server holds as many bodies of requests as it may", retry_after_s=_RETRY_S)
        self.num_bytes += num_bytes

    def shrink(self, num_bytes: int) -> None:
        """Hold no more than so many from here on."""
        surplus = max(0, self.num_bytes - num_bytes)
        self.num_bytes -= surplus
        self._pool.give_back(surplus)

    def release(self) -> None:
        self.shrink(0)
